"""vtc_cls: CLS attention summed over a slice of the layers."""

from __future__ import annotations

from typing import Any

from tokensieve.methods import VTCCLS
from tokensieve.methods.vtc_cls import keep_patches
from tokensieve.ops import select_topk

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = VTCCLS(tokens=p["token_num"], first_layer=p["start_layer"])
    layers = method.layers(x["k"].shape[0], x["k"].shape[0] - 2)
    assert layers == tuple(p.get("layers_used", layers))
    queries = [x["q_cls"][layer][None, :, None] for layer in layers]
    out, index, scores = keep_patches(queries, [x["k"][layer][None] for layer in layers], x["hidden"][None, 1:], method.tokens)
    order = select_topk(scores, method.tokens, order="score")
    return {"score": scores[0], "topk_idx": order[0], "kept_idx": index[0], "out": out[0]}


VTC_CLS = Adapter("vtc_cls", ("q_cls", "k", "hidden"), _run)
