"""tsllava: the picture, the sampled tokens and their sequence, with the vectors' stand-in encoder (14 x 14 patch means times W)."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import TSLLaVA
from tokensieve.methods.tsllava import aggregate, even_index, sample_tokens, thumbnail

from .base import Adapter, Case

PATCH = 14


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    family = p["aggregation_method"][0]
    tokens = 0 if family == "X" else p["num_sampled_tokens"]
    method = TSLLaVA(frames=p["thumb_frames"], tokens=tokens, thumbnail_first=family == "Y")
    assert list(method.grid()) == p["grid_rows_cols"]

    def means(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images, PATCH)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return means(images).flatten(2).transpose(1, 2) @ x["W"]

    picture = thumbnail(x["frames"], method)[None]
    result = {"frame_idx": even_index(p["T"], method.frames), "thumb_small": means(picture)[0]}
    if family in "XYV":
        features = encode(x["frames"])
        result["token_idx"] = sample_tokens(features, tokens)[1][0]
        result["out"] = aggregate(features, encode(picture)[0], method)[0]
    return result


# half precision: the encoder of these vectors is a mean of pixels, which rounds; the choice of tokens does not depend on the dtype
TSLLAVA = Adapter("tsllava", ("frames", "W"), _run, half=False, atol=1e-5)
