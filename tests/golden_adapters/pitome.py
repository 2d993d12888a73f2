"""pitome: energies, both ways of matching, sizes."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods import PiToMe
from tokensieve.methods.pitome import energy, match_by_energy
from tokensieve.methods.tome import merge_weighted
from torch import Tensor

from . import blocks
from .base import Adapter, Case


def _places(index: Tensor, listed: Tensor) -> Tensor:
    """Where each token of `index` stands in its row of `listed`."""
    return (index[:, :, None] == listed[:, None, :]).int().argmax(2)


def _run(case: Case) -> dict[str, Any]:
    p, out = case.params, {}
    assert p["alpha"] == 1, "an ELU of another alpha is not built"
    prefix, size = int(p["class_token"]), None
    x = case.inputs["x0"].float()
    for layer, name in blocks.layers(case, "metric"):
        metric = case.inputs[f"{name}metric"].float()
        T = metric.shape[1] - prefix
        r, bsm = PiToMe(keep=p["ratios"][layer]).merges(T), p["use_bsm_pitome"][layer]
        assert r == p["r"][layer]
        scores = energy(metric[:, prefix:], p["margins"][layer])
        plan = match_by_energy(metric, scores, r, prefix, protect=not bsm)
        merged = merge_weighted(x, plan, size)
        assert isinstance(merged.tensors, Tensor)
        order = ops.select_topk(scores, T, order="score")
        taking = T if bsm else 2 * r
        a, b = order[:, 0:taking:2], order[:, 1:taking:2]
        sources = plan.source if bsm else a + prefix  # the official lists: by similarity, or all of them by energy
        receivers = plan.index.shape[1] - b.shape[1]
        result = {"energy": scores, "x_out": merged.tensors, "size_out": merged.size, "a_idx": a, "b_idx": b}
        result["dst_idx"] = plan.inverse.gather(1, sources) - receivers
        if bsm:
            result |= {"src_idx": _places(plan.source - prefix, a), "unm_idx": _places(plan.index[:, prefix:receivers] - prefix, a)}
        else:
            result["protected_idx"] = plan.index[:, prefix:receivers] - prefix
        out |= {f"{name}{key}": value for key, value in result.items()}
        x, size = merged.tensors, merged.size
    assert torch.isfinite(x).all()
    return out


PITOME = Adapter("pitome", ("x0", "l*_metric"), _run, {"class_token": True, "alpha": 1})
