"""turbo: two blocks, informed matching, sizes."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import Turbo
from tokensieve.methods.turbo import match_informed
from torch import Tensor

from . import blocks
from .base import Adapter, Case
from .tome import lists


def _run(case: Case) -> dict[str, Any]:
    p = case.params
    method = Turbo(r=tuple(p["r"]), alpha=p["alpha"], beta=p["beta"], gamma=p["gamma"], threshold=p["r_threshold"])
    x, last, out = case.inputs["x0"].float(), None, {}
    for layer, name in blocks.layers(case):
        q, k, v = (case.inputs[f"{name}{n}"] for n in "qkv")
        attended = blocks.attention(q, k, v, p["scale"], None if last is None else last.size)
        seen = blocks.view(case, layer, x + attended, last)
        scores = seen.cls_scores()
        last = blocks.run_step(method, seen)
        plan = match_informed(k, scores, x.shape[1] - last.index.shape[1], method.weight(layer))
        result = {"attn_cls": scores, "attn_out": attended, "x_out": last.tokens, "size_out": last.size, **lists(plan, 1, x.shape[1] // 2)}
        out |= {f"{name}{key}": value for key, value in result.items() if isinstance(value, Tensor)}
        x = last.tokens
    return out


TURBO = Adapter("turbo", ("x0", "l*_q", "l*_k", "l*_v"), _run)
