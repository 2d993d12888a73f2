"""aim_prune: PageRank importance of the stored layers, and the mask that it leaves to the layer behind."""

from __future__ import annotations

import re
from typing import Any

import torch
from tokensieve.methods import AIM
from tokensieve.methods.aim import importance, next_mask

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    rates = p["retain_rate"]
    first = next((layer for layer, rate in enumerate(rates) if rate < 1), len(rates))
    assert p["damping"] == 0, "a damped PageRank is not built"
    step = 1 - rates[first] if first < len(rates) else 0.125
    method = AIM(first=first, step=step, temperature=p["tau"], iterations=p["iters"])
    masks = x["token_mask_per_layer"].bool()
    text = torch.ones(masks.shape[2], dtype=torch.bool)
    text[p["pre_text"] : p["pre_text"] + p["n_visual"]] = False
    out: dict[str, Any] = {}
    for name in x:
        layer = int(name[1:]) if re.fullmatch(r"q\d+", name) else None
        if layer is None:
            continue
        scores = importance(x[f"q{layer}"], x[f"k{layer}"], masks[layer], temperature=method.temperature, iterations=method.iterations)
        out[f"importance{layer}"] = scores
        keep = method.keep_count(layer - method.first, int((~text).sum())) + int(text.sum())
        after = next_mask(scores, masks[layer], text.expand_as(masks[layer]), keep)
        assert torch.equal(after, masks[layer + 1]), f"layer {layer}: another mask for the layer behind"
        assert method.rate(layer) == rates[layer]
    return out


LAYERS = tuple(f"{kind}{layer}" for layer in range(128) for kind in "qk")
AIM_PRUNE = Adapter("aim_prune", ("token_mask_per_layer", *LAYERS), _run, {"tau": 0.1, "iters": 5, "damping": 0})
