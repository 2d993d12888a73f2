"""hired: marks, crop budgets, keep mask, packing."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import HiRED
from tokensieve.methods.hired import cls_scores, pack, select
from tokensieve.ops import gather_tokens

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = HiRED(rate=p["token_budget_rate"], alpha=p["alpha"])
    late = cls_scores(x["q_cls_late"][:, :, None], x["k_late"])
    scores = [cls_scores(x["q_cls_first"][:, :, None], x["k_first"]) if "q_cls_first" in x else late, late]
    kept = select(*scores, method)
    mask = torch.zeros(scores[1].shape[0], scores[1].shape[1] + 1, dtype=torch.bool)
    mask = mask.scatter_(1, kept.index % mask.shape[1], True)[:, :-1]  # -1 marks the column that is cut off
    result = {
        "score_first": scores[0],
        "score_late": scores[1],
        "spread_mask": kept.marked,
        "crop_budgets": kept.counts[1:],
        "mask": mask,
    }
    if late.shape[0] == 1:  # an image without crops
        return result | {"out": gather_tokens(x["features"], kept.index)[0]}
    height, width = p["image_size_hw"]
    rows, columns = p["grid_rows_cols"]
    if rows == columns:
        index, count = pack(kept, (width, height), (columns, rows), (p["side"], p["side"]))
        result["out"] = gather_tokens(x["features"].flatten(0, 1)[None], index)[0, : int(count)]
    return result


SWAPPED = "the official packing swaps rows and columns of a grid that is not square"
HIRED = Adapter(
    "hired",
    ("q_cls_first", "k_first", "q_cls_late", "k_late", "features"),
    _run,
    {"token_budget_rate": 1, "alpha": 1},
    skipped={"out": SWAPPED},
)
