"""tofu: matching and its three merges."""

from __future__ import annotations

from typing import Any

from tokensieve import ops
from tokensieve.methods import ToFu
from tokensieve.methods.tofu import merge_keeping_norm
from tokensieve.methods.tome import match

from .base import Adapter, Case
from .tome import lists


def _run(case: Case) -> dict[str, Any]:
    p, tokens = case.params, case.inputs["x"].float()
    prefix, N = int(p["class_token"]), tokens.shape[1]
    method = ToFu(keep=p["ratio"])
    most = (N - prefix) // 2
    r = min(p.get("r", method.merges(N - prefix)), most)
    assert r in (min(method.merges(N - prefix), most), min(method.merges(N), most))  # the spec leaves open whether CLS counts
    plan = match(case.inputs["metric"], r, prefix)
    modes = {f"out_{mode}": ops.merge_tokens(tokens, plan, mode=mode).tensors for mode in ("mean", "amax")}
    modes |= {"out_tofu": merge_keeping_norm(tokens, plan), "out_prune": ops.gather_tokens(tokens, plan.index)}
    return {**lists(plan, prefix, N // 2), **modes}


TOFU = Adapter("tofu", ("metric", "x"), _run, {"class_token": False})
