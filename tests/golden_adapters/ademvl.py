"""ademvl: scores of the parameter-free attention, and what is added."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import ADEMVL
from tokensieve.methods.ademvl import fuse, fusion_scores

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    x, method = case.inputs, ADEMVL(drop=case.params["drop"])
    inputs = (x["x"], x["image_embeds"], x["emb1"])
    return {"scores": fusion_scores(*inputs), "output": fuse(*(v.float() for v in inputs), x["emb2"], method)}


ADEMVL_SET = Adapter("ademvl", ("x", "image_embeds", "emb1", "emb2"), _run, {"drop": 0.1}, atol=1e-5, normwise=True)
