"""dynamicvit: the selection at inference, and the masked softmax of training with its gradients."""

from __future__ import annotations

from typing import Any

from tokensieve.methods.dynamicvit import keep_best, policy_attention

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    return _stages(case) if "x0" in case.inputs else _attention(case)


def _stages(case: Case) -> dict[str, Any]:
    out: dict[str, Any] = {}
    tokens = case.inputs["x0"]
    for stage, k in enumerate(case.params["num_keep"]):
        tokens, out[f"s{stage}_keep_idx"] = keep_best(tokens, case.inputs[f"s{stage}_logp_keep"], k)
        out[f"s{stage}_x"] = tokens
    return out


def _attention(case: Case) -> dict[str, Any]:
    leaves = [case.inputs[name].float().detach().requires_grad_() for name in ("q", "k", "v", "policy")]
    out = policy_attention(*leaves, eps=case.params["eps"])
    out.backward(case.inputs["grad_out"].float())
    return {"out": out.detach(), **{f"grad_{name}": leaf.grad for name, leaf in zip(("q", "k", "v", "policy"), leaves)}}


STAGES = tuple(f"s{stage}_logp_keep" for stage in range(32))
DYNAMICVIT = Adapter("dynamicvit", ("x0", "q", "k", "v", "policy", "grad_out", *STAGES), _run, {"eps": 1e-6})
