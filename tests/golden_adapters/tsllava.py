"""tsllava: the pictures, the sampled tokens and their sequence, with the vectors' stand-in encoder (14 x 14 patch means times W)."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import TSLLaVA
from tokensieve.methods.tsllava import aggregate, picture_frames, sample_tokens, thumbnails

from .base import Adapter, Case

PATCH = 14


def _method(p: dict[str, Any]) -> TSLLaVA:
    """V2: 6 frames in a picture, samples first; X: pictures alone; Y and W begin with them; Z: all frames; W and U have several."""
    name = p["aggregation_method"]
    family, number = name[0], int(name[1])
    frames, pictures = {1: (4, 2), 2: (4, 3), 3: (6, 2), 4: (6, 3)}[number] if family in "WU" else ({1: 4, 2: 6, 3: 8}[number], 1)
    tokens = p.get("num_sampled_tokens", 0)
    if family == "W" and "num_sampled_tokens" not in p:
        tokens = 1728 if name.endswith("a") else 2304
    return TSLLaVA(
        frames=frames, tokens=0 if family in "XZ" else tokens, thumbnail_first=family in "YW", pictures=None if family == "Z" else pictures
    )


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = _method(p)
    assert list(method.grid()) == p.get("grid_rows_cols", list(method.grid()))

    def means(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, PATCH)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return means(images).flatten(2).transpose(1, 2) @ x["W"]

    pictures, features = thumbnails(x["frames"], method), encode(x["frames"])
    return {
        "frame_idx": picture_frames(p["T"], method),
        "thumb_small": means(pictures),
        "token_idx": sample_tokens(features, method.tokens)[1][0],
        "out": aggregate(features, encode(pictures), method)[0],
    }


# half precision: the encoder of these vectors is a mean of pixels, which rounds; the choice of tokens does not depend on the dtype
TSLLAVA = Adapter("tsllava", ("frames", "W"), _run, {"aggregation_method": "V2"}, half=False, atol=1e-5)
