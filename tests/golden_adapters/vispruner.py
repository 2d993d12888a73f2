"""vispruner: CLS scores, attention part and diverse part."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import VisPruner
from tokensieve.methods.vispruner import keep_patches

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = VisPruner(tokens=p["visual_token_num"], important=p["important_ratio"])
    assert method.split() == (p["important"], p["diverse"])
    out, index, scores = keep_patches(x["q_cls"][None, :, None], x["k"][None], x["hidden"][None, 1:], method)
    return {"score": scores[0], "kept_idx": index[0], "out": out[0]}


VISPRUNER = Adapter("vispruner", ("q_cls", "k", "hidden"), _run, {"important_ratio": 0.5})
