"""fopru: received and given attention, rank and row strategies."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import FoPru
from tokensieve.methods.fopru import keep_patches, significance

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    rows, columns = p["grid_hw"]
    tensors = (x["q"][None], x["k"][None], x["features"][None])
    found = significance(*tensors[:2])
    rank = keep_patches(*tensors, FoPru(ratio=p["ratio"]))
    row = keep_patches(*tensors, FoPru(ratio=p["ratio"], strategy="row"), rows)
    return {
        "score_given": found.given[0],
        "score_received": found.received[0],
        "rank_idx": rank[1][0],
        "row_ids": row[1][0, ::columns] // columns,
        "row_idx": row[1][0],
        "out_rank": rank[0][0],
        "out_row": row[0][0],
    }


FOPRU = Adapter("fopru", ("q", "k", "features"), _run)
