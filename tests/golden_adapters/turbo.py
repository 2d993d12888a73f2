"""turbo: two blocks, informed matching, sizes."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import Turbo
from tokensieve.methods.turbo import ATTENTION_WEIGHT, match_informed
from torch import Tensor

from . import blocks
from .base import Adapter, Case
from .tome import lists


def _run(case: Case) -> dict[str, Any]:
    p = case.params
    alpha = p["alpha"] * p.get("hidden_constant", ATTENTION_WEIGHT) / ATTENTION_WEIGHT
    gamma = p["gamma"] - p.get("num_layer_start", 0)  # the exponent is |gamma - number of the block|
    method = Turbo(r=tuple(p["r"]), alpha=alpha, beta=p["beta"], gamma=gamma, threshold=p["r_threshold"])
    x, last, out = case.inputs["x0"].float(), None, {}
    for layer, name in blocks.layers(case):
        q, k, v = (case.inputs[f"{name}{n}"] for n in "qkv")
        attended = blocks.attention(q, k, v, p["scale"], None if last is None else last.size)
        seen = blocks.view(case, layer, x + attended, last)
        scores = seen.cls_scores()
        done = method.step(seen) if layer in method.blocks(seen.depth) else None
        if done is None:  # r = 0, or too few tokens
            x = seen.tokens
            size = torch.ones(x.shape[:2]) if last is None else last.size
            out |= {f"{name}attn_cls": scores, f"{name}attn_out": attended, f"{name}x_out": x, f"{name}size_out": size}
            continue
        last = done
        turn = method.blocks(seen.depth).index(layer)
        plan = match_informed(k, scores, x.shape[1] - last.index.shape[1], method.weight(turn))
        result = {"attn_cls": scores, "attn_out": attended, "x_out": last.tokens, "size_out": last.size, **lists(plan, 1, x.shape[1] // 2)}
        out |= {f"{name}{key}": value for key, value in result.items() if isinstance(value, Tensor)}
        x = last.tokens
    return out


TURBO = Adapter("turbo", ("x0", "l*_q", "l*_k", "l*_v"), _run)
