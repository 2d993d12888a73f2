"""visionzip: dominant and contextual tokens of images, and of a thumbnail with its any-resolution crops."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import VisionZip
from tokensieve.methods.visionzip import choose, cls_scores, head_mean, merge, pack
from tokensieve.ops import complement_index, select_topk

from .base import Adapter, Case
from .fastervlm import _crops


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = VisionZip(p["dominant_arg"], p["contextual"])
    scores = cls_scores(x["q_cls"][:, :, None], x["k"])
    R, N = scores.shape
    splits = [(method.dominant - 1, method.contextual)] * R
    zipped = choose(scores, head_mean(x["k"]), splits)
    hidden = x["hidden"].float()
    out = merge(hidden[:, 0], hidden[:, 1:], zipped)
    if p.get("anyres"):
        out = pack(out, zipped, _crops(case), tuple(p["grid_hw"]))
    cls = torch.zeros(R, 1, dtype=torch.int64)
    kept = torch.cat([cls, zipped.dominant + 1], 1)
    rest = complement_index(kept, N + 1)
    return {
        "score": scores,
        "all_idx": torch.cat([cls, select_topk(scores, method.dominant - 1, order="score") + 1], 1),
        "kept_idx": kept,
        "rest_idx": rest,
        "target_pos": torch.searchsorted(rest[0], zipped.targets[0] + 1),
        "assign": zipped.labels[zipped.labels >= 0].view(R, -1),
        "out": out,
    }


VISIONZIP = Adapter("visionzip", ("q_cls", "k", "hidden"), _run, {"dominant_arg": 192, "contextual": 30})
