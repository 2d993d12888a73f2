"""diffrate: inference of blocks that prune and merge by rank."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods import BlockStep, DiffRate
from tokensieve.methods.diffrate import importance_order, prune_and_merge

from . import blocks
from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, out, last = case.params, {}, None
    method = DiffRate(prune=tuple(p["prune_kept"]), merge=tuple(p["merge_kept"]))
    x = case.inputs["x0"].float()
    trace = torch.arange(x.shape[1]).expand(x.shape[0], -1).contiguous()
    for layer, name in blocks.layers(case):
        q, k, v = (case.inputs[f"{name}{n}"] for n in "qkv")
        kept, merged = method.prune[layer], method.merge[layer]
        size = None if last is None else last.size
        tokens = x + blocks.attention(q, k, v, q.shape[-1] ** -0.5, size)
        seen = blocks.view(case, layer, tokens, last)
        scores = seen.cls_scores()
        done = prune_and_merge(tokens, scores, kept, merged, size=size)
        plan, step = done.plan, method.step(seen)
        if step is None:  # nothing leaves: the method does nothing, the official code still puts tokens in order
            step = BlockStep(done.tokens, plan.index, plan.inverse, done.size)
        last = step
        order = importance_order(scores)
        leaving = order[:, merged - 1 : kept - 1]
        cosine = torch.zeros_like(scores).scatter(1, plan.source, plan.similarity)
        trace = ops.trace_tokens(trace, plan)
        result = {"order": order - 1, "x_out": last.tokens, "size_out": last.size, "source": trace}
        result |= {"dst_idx": plan.inverse.gather(1, leaving), "node_max": cosine.gather(1, leaving)}
        out |= {f"{name}{key}": value for key, value in result.items()}
        x = last.tokens
    return out


DIFFRATE = Adapter("diffrate", ("x0", "l*_q", "l*_k", "l*_v"), _run)
