"""damro: negative tokens (LLaVA and InstructBLIP, images and crops) and contrastive logits."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import DAMRO
from tokensieve.methods.damro import contrastive_logits, negative_tokens

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = DAMRO(tokens=p["topk"], alpha=p["alpha"], beta=p["beta"], one_head=p["variant"] != "instructblip")
    patches = x["k"].shape[2] - 1
    out, index, scores = negative_tokens(x["q_cls"][:, :, None], x["k"], x["features"][:, -patches:], method)
    result = {"score": scores, "topk_idx": index}
    if x["features"].shape[1] == patches:  # with CLS in row 0 the official gather is off by one
        newline = next((x[name] for name in ("newline", "image_newline") if name in x), None)
        result["out"] = out if newline is None else torch.cat([out[0], newline.view(1, -1)])  # crops: the thumbnail's and a newline
    if "logits" in x:
        result["logits_out"] = contrastive_logits(x["logits"], x["logits_neg"], method.alpha, method.beta)
    return result


WRONG = "InstructBLIP: the official code gathers every patch's left neighbour"
INPUTS = ("q_cls", "k", "features", "logits", "logits_neg", "newline", "image_newline")
DAMRO_SET = Adapter("damro", INPUTS, _run, {"variant": "llava", "alpha": 2, "beta": 0.1}, skipped={"out": WRONG})
