"""prumerge, prumerge_plus: scores, centres, neighbours, merged tokens."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods import PruMerge, PruMergePlus
from tokensieve.methods.prumerge import joined_keys, keep_outliers
from tokensieve.methods.prumerge_plus import grid_marks
from tokensieve.ops import cosine_match

from .base import Adapter, Case


def _run(case: Case, method: PruMerge) -> dict[str, Any]:
    p, x = case.params, case.inputs
    query, key = x["q_cls"].view(1, 1, 1, -1), x["k"][None, None]
    done = keep_outliers(query, key, x["hidden"][None, 1:].float(), method)
    real = done.centers[0] >= 0
    centers = done.centers[0, real]
    count = method.count(done.scores)
    near = cosine_match(joined_keys(key), joined_keys(key), k=method.neighbors, exclude_self=True)[1][0].sort(1).values
    best = ops.select_topk(done.scores, int(count), order="score")[0]
    if isinstance(method, PruMergePlus) and not method.adaptive and len(centers) + 1 < p["tokens_out"]:
        twice = torch.cat([best, grid_marks(count, p["N"], 575, method.ratio)[0].nonzero()[:, 0]])
        assert torch.equal(twice.unique(), centers.sort().values)
        return {"score": done.scores[0], "topk_idx": best, "kept_idx": twice, "neighbours": near[twice]}
    out = done.tokens[0, [*real.nonzero()[:, 0].tolist(), done.tokens.shape[1] - 1]]
    assert len(out) == p["tokens_out"]
    return {"score": done.scores[0], "topk_idx": best, "kept_idx": centers, "neighbours": near[centers], "out": out}


def _options(case: Case) -> dict[str, Any]:
    return {"neighbors": case.params["knn"], "adaptive": case.params["if_adaptive"], "ratio": case.params["reduction_ratio_arg"]}


INPUTS = ("q_cls", "k", "hidden")
PRUMERGE = Adapter("prumerge", INPUTS, lambda case: _run(case, PruMerge(**_options(case))))
TWICE = "a centre that is chosen twice drops unrelated tokens from the official extra token"
PRUMERGE_PLUS = Adapter(
    "prumerge_plus", INPUTS, lambda case: _run(case, PruMergePlus(**_options(case), grid_end=575)), skipped={"out": TWICE}
)
