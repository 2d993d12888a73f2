"""paint: the two streams of image tokens, and the last row's attention with their logits raised."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import PAINT
from tokensieve.methods.paint import boosted_attention, cls_scores, key_gains, streams

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = PAINT(alpha=p["alpha"], beta=p["beta"], local_ratio=p["local_ratio"])
    first, late = (cls_scores(x[f"q_cls_{layer}"][None, :, None], x[f"k_{layer}"][None]) for layer in ("first", "penult"))
    found = streams(first, late, method)
    gains = key_gains(found, method, p["image_start"], x["k"].shape[1])
    out = boosted_attention(x["q_last"][None, :, None], x["k"][None], x["v"][None].float(), gains)
    return {"local": found.local[0].nonzero()[:, 0], "summary": found.summary[0].nonzero()[:, 0], "out_last": out[0, :, 0]}


INPUTS = ("q_cls_first", "k_first", "q_cls_penult", "k_penult", "q_last", "k", "v")
PAINT_SET = Adapter("paint", INPUTS, _run, {"alpha": 0.7, "beta": 0.3, "local_ratio": 0.25})
