"""var_sink: sink tokens, and the heads that look at the image, in prefill and in a decode step."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import VAR
from tokensieve.methods.var_sink import image_heads, sink_score

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = VAR(dims=tuple(p["sink_dims"]), tau=p["tau"], rho=p["rho"], mass=p["summ"])
    score = sink_score(x["hidden"], method.dims)
    keys, rows = x["k"].shape[2], x["q"].shape[2]
    position = torch.arange(keys)[None]
    image = (position >= p["image_start"]) & (position < p["image_start"] + p["n_image"])
    sinks = torch.nn.functional.pad(score > method.tau, (0, keys - score.shape[1]))  # generated tokens are no sinks
    heads = image_heads(x["q"], x["k"], image, sinks, rho=method.rho, mass=method.mass)
    asks = position[:, keys - rows :] >= p["image_start"] + p["n_image"]  # only rows after the image are modified
    applies = (image & sinks).any(1)[:, None, None]
    return {
        "max_phi": score,
        "sink_idx": (score[0] > method.tau).nonzero()[:, 0],
        "portion": heads.sink_share,
        "img_sum": heads.image_mass,
        "selected": heads.chosen,
        "modified": heads.chosen & asks[:, None] & applies,
    }


LATER = "the redistribution of attention is not built yet"
VAR_SINK = Adapter(
    "var_sink",
    ("hidden", "q", "k", "v"),
    _run,
    {"tau": 20, "rho": 0.5, "summ": 0.2},
    skipped={"out": LATER, "row_changes": LATER},
)
