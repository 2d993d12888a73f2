"""mirage: which images stay."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import MIRAGE
from tokensieve.methods.mirage import relevant_images

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    return {"relevance": relevant_images(case.inputs["confidence"], MIRAGE(top_k=case.params["k"]))[1]}


MIRAGE_SET = Adapter("mirage", ("confidence",), _run, {"k": 1})
