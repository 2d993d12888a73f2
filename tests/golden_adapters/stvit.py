"""stvit: maxima of windows, what they gather, and the generated tokens; its MLP is zero, its last projection the identity."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import STViT
from tokensieve.methods.stvit import window_maxima
from tokensieve.methods.stvit_layers import Generate

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    grid, channels = (p["H_img"], p["W_img"]), x["x"].shape[2]
    method = STViT(p["window"], p["sample_window"], p["key_window"], shortcut=p["shortcut"], layer_scale=p["layer_scale"])
    layer = Generate(channels, p["heads"], method)
    zeros = {name: torch.zeros_like(value) for name, value in layer.state_dict().items() if name.startswith("mlp")}
    given = {"q.weight": x["Wq"], "q.bias": x["bq"], "kv.weight": x["Wkv"], "kv.bias": x["bkv"]}
    last = {"proj.weight": torch.eye(channels), "proj.bias": torch.zeros(channels)}
    layer.load_state_dict({**layer.state_dict(), **zeros, **given, **last})
    with torch.no_grad():
        pooled = window_maxima(x["x"], grid, method.window, method.sample)
        gathered = layer.attend(pooled, layer.seen(pooled, x["x"], grid))
        return {"pooled": pooled.flatten(0, 1), "attn_windows": gathered.flatten(0, 1), "y": layer(x["x"], grid)}


STVIT = Adapter(
    "stvit",
    ("x", "Wq", "bq", "Wkv", "bkv"),
    _run,
    {"window": 7, "sample_window": 3, "key_window": 10, "shortcut": False, "layer_scale": 1e-5},
    half=False,
)
