"""evit: blocks that keep and fuse, with gradients through the scores."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods import EViT

from . import blocks
from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, out = case.params, {}
    x = case.inputs["x0"].float()
    for layer, name in blocks.layers(case):
        leaves = blocks.leaves_of(case, name, x)
        attended = blocks.attention(leaves["q"], leaves["k"], leaves["v"], p["scale"], None)
        seen = blocks.view(case, layer, leaves["x"] + attended, None)
        seen = type(seen)(**{**vars(seen), "query": leaves["q"], "key": leaves["k"]})
        scores = seen.cls_scores()
        done = EViT(keep=p["keep_rates"][layer], fuse=p["fuse_token"]).step(seen)
        if done is None:  # everything stays, and there is no fused token
            assert x.shape[1] - 1 == p["left_tokens"][layer]
            x = seen.tokens.detach()
            out |= {f"{name}cls_attn": scores[:, 1:].detach(), f"{name}x_out": x, f"{name}attn_out": attended.detach()}
            continue
        index = done.index[:, 1 : done.index.shape[1] - p["fuse_token"]]
        assert index.shape[1] == p["left_tokens"][layer]
        rest = ops.complement_index(torch.cat([torch.zeros_like(index[:, :1]), index], 1), x.shape[1]) - 1
        result = {"cls_attn": scores[:, 1:], "idx": index - 1, "compl_idx": rest, "x_out": done.tokens, "attn_out": attended}
        out |= {f"{name}{key}": value.detach() for key, value in result.items()}
        if f"{name}grad_out" in case.inputs:
            out |= blocks.gradients(case, name, done.tokens, leaves)
        x = done.tokens.detach()
    return out


EVIT = Adapter("evit", ("x0", "l*_q", "l*_k", "l*_v", "l*_grad_out"), _run, {"fuse_token": False})
