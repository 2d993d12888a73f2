"""divprune: greedy order, kept tokens, distance to the nearest other token."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import DivPrune
from tokensieve.methods.divprune import keep_diverse, nearest_distance
from tokensieve.ops import select_diverse

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, tokens = case.params, case.inputs["features"][None]
    k = DivPrune(ratio=p["subset_ratio"]).keep_count(p["N"])
    out, index = keep_diverse(tokens, k)
    return {
        "select_order": select_diverse(tokens, k, order="pick")[0],
        "kept_idx": index[0],
        "out": out[0],
        "first_nn_dist": nearest_distance(tokens)[0],
    }


DIVPRUNE = Adapter("divprune", ("features",), _run)
