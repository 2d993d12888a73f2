"""tome: layers of blocks, matching from a given metric, every k-th and random matching; source maps, unmerging, gradients."""

from __future__ import annotations

import re
from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods import ToMe
from tokensieve.methods.tome import match, match_kth, match_random, merge_weighted
from torch import Tensor

from . import blocks
from .base import Adapter, Case


def lists(plan: ops.MergePlan, prefix: int, receivers: int) -> dict[str, Tensor]:
    """The plan in the numbering of the halves: even tokens from 0, odd tokens from 0."""
    staying = plan.index[:, : plan.index.shape[1] - receivers]
    if prefix:  # CLS is even; a distillation token is odd and a receiver of nothing
        staying = torch.stack([row[row % 2 == 0] for row in staying])
    return {"src_idx": plan.source // 2, "dst_idx": plan.destination // 2, "unm_idx": staying // 2}


def _blocks(case: Case) -> dict[str, Any]:
    p = case.params
    prefix = int(p.get("class_token", True)) + int(p.get("distill_token", False))
    method = ToMe(r=tuple(p["r"]), proportional=p.get("prop_attn", True))
    x, last, out = case.inputs["x0"].float(), None, {}
    trace = torch.arange(x.shape[1]).expand(x.shape[0], -1).contiguous()
    for layer, name in blocks.layers(case):
        leaves = blocks.leaves_of(case, name, x)
        size = None if last is None or not method.proportional else last.size
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        attended = blocks.attention(q, k, v, p.get("scale", q.shape[-1] ** -0.5), size)
        seen = blocks.view(case, layer, leaves["x"] + attended, last, prefix=prefix)
        done = method.step(seen)
        if done is None:  # r = 0
            x = seen.tokens.detach()
            size = torch.ones(x.shape[:2]) if last is None else last.size
            out |= {f"{name}attn_out": attended.detach(), f"{name}x_out": x, f"{name}size_out": size, f"{name}source": trace}
            continue
        last = done
        plan = match(case.inputs[f"{name}k"], x.shape[1] - last.index.shape[1], prefix)
        assert torch.equal(plan.index, last.index)
        trace = ops.trace_tokens(trace, plan)
        receivers = x.shape[1] // 2 - prefix // 2
        result = {"attn_out": attended, "x_out": last.tokens, "size_out": last.size, "source": trace, **lists(plan, prefix, receivers)}
        if prefix < 2:  # the official unmerge does not undo the order of a distillation token
            result["unmerged_sample"] = ops.unmerge_tokens(last.tokens, plan)[:, ::7]
        out |= {f"{name}{key}": value.detach() for key, value in result.items() if isinstance(value, Tensor)}
        if f"{name}grad_out" in case.inputs:
            out |= blocks.gradients(case, name, last.tokens, leaves)
        x = last.tokens.detach()
    return out


def _metric(case: Case) -> dict[str, Any]:
    """Matching from a metric that is no key: official unmerge, merge modes, sizes."""
    p, x = case.params, case.inputs
    prefix = int(p.get("class_token", False)) + int(p.get("distill_token", False))
    tokens = x["x"].float()
    N = tokens.shape[1]
    r = p["r"] if isinstance(p["r"], int) else p["r"][0]
    plan = match(x["metric"], min(r, (N - prefix) // 2), prefix)
    size = x["size"].reshape(tokens.shape[0], N).float() if "size" in x else None
    merged = merge_weighted(tokens, plan, size)
    start = torch.arange(N).expand(tokens.shape[0], -1).contiguous()
    trace = ops.trace_tokens(start, plan)
    result: dict[str, Any] = {**lists(plan, prefix, N // 2 - prefix // 2), "source": trace}
    for mode in ("mean", "sum", "amax"):
        done = ops.merge_tokens(tokens, plan, mode=mode).tensors
        result |= {f"{stem}{mode}": done for stem in ("out_", "x_", "merged_", "merge_", "")}
    result |= dict.fromkeys(("x_out", "out", "merged", "out_wavg", "x_wavg", "merged_wavg", "merge_wavg", "wavg", "out_x"), merged.tensors)
    result |= dict.fromkeys(("size_out", "out_size", "sizes", "merged_size"), merged.size)
    if prefix < 2:
        undone = ops.unmerge_tokens(merged.tensors, plan)
        result |= dict.fromkeys(("unmerged", "unmerge", "out_unmerged"), undone) | {"unmerged_sample": undone[:, ::7]}
    return result


def _other(case: Case) -> dict[str, Any]:
    """Every k-th and random receivers."""
    p, x = case.params, case.inputs
    tokens, out = x["x"].float(), {}
    N, k = tokens.shape[1], p["k"]
    plan = match_kth(x["metric"], k)
    ids = torch.arange(N // k * k)
    merged = merge_weighted(tokens, plan)
    out |= {"kth_dst_idx": plan.inverse[:, ids[ids % k != k - 1]], "kth_x": merged.tensors, "kth_size": merged.size}
    out |= {"kth_mean": ops.merge_tokens(tokens, plan).tensors}
    out |= {"kth_unmerge": ops.unmerge_tokens(merged.tensors, plan)[:, : len(ids)]}  # the tail is lost, there as here
    plan = match_random(x["metric"], p["r"], torch.Generator().manual_seed(p["torch_manual_seed"]))
    draws = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(p["torch_manual_seed"])).argsort(1)[:, : p["r"]]
    merged = merge_weighted(tokens, plan)
    out |= {"rand_a_idx": draws, "rand_b_idx": plan.index, "rand_dst_idx": plan.inverse.gather(1, draws)}
    out |= {"rand_x": merged.tensors, "rand_size": merged.size, "rand_unmerge": ops.unmerge_tokens(merged.tensors, plan)}
    return out


def _run(case: Case) -> dict[str, Any]:
    if any(re.fullmatch(r"l\d+_q", name) for name in case.inputs):
        return _blocks(case)
    return _other(case) if "k" in case.params else _metric(case)


TOME = Adapter(
    "tome",
    ("x0", "x", "metric", "size", "l*_q", "l*_k", "l*_v", "l*_grad_out"),
    _run,
    skipped={f"l{layer}_unmerged_sample": "with a distillation token the official unmerge leaves rows out of place" for layer in range(12)},
)
