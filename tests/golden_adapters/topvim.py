"""topvim: the released pruning step: unclipped scores, and CLS left out of the competition in the first sample only."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import ToPViM
from tokensieve.methods.topvim import keep_around_cls, scan_scores

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = ToPViM(keep=p["token_keep_ratio"], clipped=False)
    scores = scan_scores(x["ssm_out"], clipped=method.clipped)
    candidates = torch.ones_like(scores, dtype=torch.bool)
    candidates[0, p["cls_pos"]] = False  # the released code's mask; ours leaves CLS out everywhere
    k = method.keep_count(scores.shape[1] - 1)
    (hidden, residual), kept = keep_around_cls(scores, [x["hidden"], x["residual"]], k, cls=p["cls_pos"], candidates=candidates)
    return {"score": scores, "kept_sorted": kept, "hidden_out": hidden, "residual_out": residual}


TOPVIM = Adapter("topvim", ("ssm_out", "hidden", "residual"), _run, {"token_keep_ratio": 0.8})
