"""aim_merge: rounds of merging before the language model."""

from __future__ import annotations

from typing import Any

from tokensieve.methods.aim_merge import merge_planned, merge_rounds

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    """Rounds one by one: merged tokens of a half input stay in float32."""
    tokens, out = case.inputs["x"], {}
    plans = merge_rounds(tokens.float(), tuple(case.params["r"]))[1]
    merged = tokens.float()
    for step, plan in enumerate(plans):
        merged = merge_planned(merged, [plan])
        out |= {f"out{step}": merged, f"src{step}": plan.source // 2, f"dst{step}": plan.destination // 2}
    return out


AIM_MERGE = Adapter("aim_merge", ("x",), _run)
