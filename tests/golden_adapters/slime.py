"""slime and slime_router: the text-guided choice of local tokens."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import SliME
from tokensieve.methods.slime import keep_relevant, probabilities, text_scores
from torch import Tensor

from .base import Adapter, Case


def _choose(case: Case, tokens: Tensor, mask: Tensor | None) -> tuple[SliME, Tensor, Tensor, Tensor]:
    method, text = SliME(top_p=case.params["topp"], temperature=case.params["temp"]), case.inputs["text"][None]
    out, index, counts = keep_relevant(tokens, text, method, mask)
    n = int(counts[0])
    return method, text_scores(tokens, text, mask), index[0, :n], out[0, :n]


def _slime(case: Case) -> dict[str, Any]:
    x = case.inputs
    _, scores, index, out = _choose(case, x["local"][None], x["text_mask"][None])
    return {"score": scores[0], "kept_idx": index, "out": out}


def _router(case: Case) -> dict[str, Any]:
    x = case.inputs
    mask = None if bool(x["text_mask"].all()) else x["text_mask"][None]  # the vectors were made without a mask then
    method, scores, index, _ = _choose(case, x["local_tokens"][None], mask)
    return {"similarity": scores[0], "probs": probabilities(scores, method)[0], "selected": index}


DEFAULTS = {"topp": 0.95, "temp": 1}
SLIME = Adapter("slime", ("local", "text", "text_mask"), _slime, DEFAULTS)
SLIME_ROUTER = Adapter("slime_router", ("local_tokens", "text", "text_mask"), _router, DEFAULTS)
