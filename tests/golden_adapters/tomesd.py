"""tomesd: partition, matching, merging and its undoing. The file's own lists only say in which order it names tokens."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods import ToMeSD
from torch import Tensor

from .base import Adapter, Case


def _places(index: Tensor, listed: Tensor) -> Tensor:
    where = torch.zeros(int(listed.max()) + 1, dtype=torch.int64).scatter(0, listed, torch.arange(len(listed)))
    return where[index]


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs["x"].float()
    method = ToMeSD(ratio=p.get("ratio", 0.5), sx=p.get("sx", 2), sy=p.get("sy", 2), random=p.get("use_rand", True))
    generator, offsets = torch.Generator().manual_seed(p.get("generator_seed", 0)), None
    if method.random and not p.get("via_compute_merge", True):  # it is compute_merge that draws nothing for an odd batch
        offsets = torch.randint(method.sx * method.sy, (p["h"] // method.sy, p["w"] // method.sx), generator=generator)
    plan = method.plan(case.inputs["metric"], (p["h"], p["w"]), offsets=offsets, generator=generator)
    assert plan is not None
    a, b = case.inputs["a_idx"].long(), case.inputs["b_idx"].long()
    kept = plan.index.shape[1] - len(b)
    targets = plan.index[0, kept:]
    sources = ops.complement_index(targets[None], x.shape[1])[0]
    rows = torch.cat([torch.arange(kept), kept + torch.searchsorted(targets, b)])  # their receivers follow in no defined order
    mean, total = (ops.merge_tokens(x, plan, mode=mode).tensors for mode in ("mean", "sum"))
    assert isinstance(mean, Tensor)
    assert isinstance(total, Tensor)
    result = {"src_idx": _places(plan.source, a), "dst_idx": _places(plan.destination, b), "unm_idx": _places(plan.index[:, :kept], a)}
    result |= {"merged_mean": mean[:, rows], "merged_sum_sample": total[:, rows][:, ::5]}
    same = torch.equal(a.sort().values, sources) and torch.equal(b.sort().values, targets)
    assert same, "another partition than the file's"
    return result | {"unmerged": ops.unmerge_tokens(mean, plan)}


TOMESD = Adapter("tomesd", ("metric", "x", "a_idx", "b_idx"), _run)
