"""dart: pivots by key norm, then the tokens that resemble them least, in the official order of pivots."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import DART
from tokensieve.methods.dart import keep_different
from torch.nn.functional import rms_norm

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    start, N, pivots = p["image_start"], p["N"], p.get("pivot_image_token", 4)
    tokens = p.get("max_num_trunction")
    for name in ("retain_num", "retain_token_num", "retain_token_num_for_llava_next"):  # LLaVA-NeXT: this count and no other
        tokens = min(p[name], N - pivots) if p.get(name) is not None else tokens
    method = DART(tokens=tokens, ratio=p.get("reduction_ratio", 0.778), image_pivots=pivots, text_pivots=p.get("pivot_text_token", 4))
    position = torch.arange(x["keys"].shape[1])[None]
    image, text = (position >= start) & (position < start + N), position >= start + N
    hidden = rms_norm(x["hidden"].float(), x["norm_weight"].shape, x["norm_weight"].float(), 1e-5)
    kept, of_image, of_text = keep_different(method, hidden[None], x["keys"][None], image, text, [N], order=x["pivot_order"][None])
    return {
        "hidden_normed": hidden,
        "image_pivots": of_image[0],
        "text_pivots": of_text[0],
        "kept_idx": kept[0],
        "keep_all": torch.cat([torch.arange(start), kept[0], torch.arange(start + N, position.shape[1])]),
    }


DART_SET = Adapter("dart", ("hidden", "norm_weight", "keys", "pivot_order"), _run)
