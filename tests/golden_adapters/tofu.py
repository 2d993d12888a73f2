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
    r = min(ToFu(keep=p["ratio"]).merges(N - prefix), (N - prefix) // 2)
    assert r == min(p["r"], (N - prefix) // 2)
    plan = match(case.inputs["metric"], r, prefix)
    modes = {f"out_{mode}": ops.merge_tokens(tokens, plan, mode=mode).tensors for mode in ("mean", "amax")}
    return {**lists(plan, prefix, N // 2), **modes, "out_tofu": merge_keeping_norm(tokens, plan)}


TOFU = Adapter("tofu", ("metric", "x"), _run)
