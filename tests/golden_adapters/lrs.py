"""lrs and lrs_text: the question's attention, both rules, tiles of the next level."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import LRS
from tokensieve.methods.lrs import hit_tiles, keep_ratio, keep_threshold, text_scores

from .base import Adapter, Case


def _lrs(case: Case) -> dict[str, Any]:
    p, scores, valid = case.params, case.inputs["attn"][None], case.inputs["valid"][None] > 0
    method, tiles = LRS(ratio=p["ratio"], threshold=p["thr"]), p["blocks"]
    ratio, ratio_count = keep_ratio(scores, method, p["W"], valid)
    above, above_count = keep_threshold(scores, method, valid)
    found, count = hit_tiles(keep_threshold(scores, method)[0], (p["H"], p["W"]), tuple(tiles))  # made without the mask
    number = found[0, : int(count)]
    return {
        "kept_ratio": ratio[0, : int(ratio_count)],
        "kept_threshold": above[0, : int(above_count)],
        "tiles": torch.stack([number // tiles[1], number % tiles[1]], 1),
    }


def _text(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = LRS(ratio=p["ratio"], threshold=p["threshold"])
    scores = text_scores(x["q_text"][None, :, None], x["k_img"][None])
    ratio, ratio_count = keep_ratio(scores, method, p["cols_incl_newline"])
    above, above_count = keep_threshold(scores, method)
    return {"score": scores[0], "kept_ratio": ratio[0, : int(ratio_count)], "kept_threshold": above[0, : int(above_count)]}


LRS_SET = Adapter("lrs", ("attn", "valid"), _lrs, {"ratio": 0.25, "thr": 0.2})
LRS_TEXT = Adapter("lrs_text", ("q_text", "k_img"), _text, {"ratio": 0.25, "threshold": 0.2})
