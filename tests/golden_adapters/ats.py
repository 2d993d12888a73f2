"""ats: significance, sample points and the kept rows of one sampling layer."""

from __future__ import annotations

from typing import Any

from tokensieve.methods.ats import sample_tokens, sampled_attention, significance
from tokensieve.ops import select_topk

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    scores = significance(x["q"][:, :, :1], x["k"], x["v"])
    order = select_topk(scores, scores.shape[1], order="score").flip(1)
    chosen = sample_tokens(scores, p["n_ref_tokens"] - 1)
    rows, index = sampled_attention(x["q"], x["k"], x["v"], chosen)
    width = int(chosen.counts.max()) + 1  # the official code pads to the batch's largest count, which it reads on the host
    return {
        "sorted_scores": scores.gather(1, order),
        "sorted_idx": order,
        "out": rows[:, :width],
        "selected_x_idx": index[:, :width],
        "policy": (index[:, :width] >= 0).to(scores.dtype),
    }


ATS = Adapter(
    "ats",
    ("q", "k", "v", "x"),
    _run,
    skipped={"ys": "the sample points stay inside select_samples"},
    half=False,  # picks are 4e-6 apart on the cdf's axis: half inputs choose others
)
