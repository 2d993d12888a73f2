"""Blocks of the vectors from inside vision transformers: norms and projections are identities, the MLP adds nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from tokensieve.methods import BlockMethod, BlockStep, BlockView
from torch import Tensor

from .base import Case


def layers(case: Case, name: str = "q") -> Iterator[tuple[int, str]]:
    """(number, prefix) of every layer that has that input: l0_q, l1_q, ..."""
    found = sorted(int(m[1]) for m in (re.fullmatch(rf"l(\d+)_{name}", key) for key in case.inputs) if m)
    assert found
    assert found == list(range(len(found)))
    return ((layer, f"l{layer}_") for layer in found)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float, size: Tensor | None) -> Tensor:
    """(B, N, H * D) float32, log(size) added to the logits of a key."""
    bias = None if size is None else size.log()[:, None, None, :]
    q, k, v = (x.float() for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)


def view(
    case: Case, layer: int, tokens: Tensor, last: BlockStep | None, *, depth: int = 12, prefix: int = 1, bias: bool = True
) -> BlockView:
    """What a block method sees of layer `layer`, whose residual stream behind the attention is `tokens`."""
    query, key = case.inputs[f"l{layer}_q"], case.inputs[f"l{layer}_k"]
    size = None if last is None else last.size
    return BlockView(
        block=layer,
        depth=12,
        tokens=tokens,
        query=query,
        key=key,
        scale=case.params.get("scale", query.shape[-1] ** -0.5),
        prefix=prefix,
        cls=prefix > 0,
        patches=case.inputs["x0"].shape[1] - prefix,
        bias=size.log()[:, None, None, :] if size is not None else None,
        size=size,
    )


def run_step(method: BlockMethod, seen: BlockView) -> BlockStep:
    """A step that must do something."""
    done = method.step(seen)
    assert done is not None
    return done


def gradients(case: Case, name: str, output: Tensor, leaves: dict[str, Tensor]) -> dict[str, Any]:
    """Gradients of one layer for the upstream gradient in the file, by array name."""
    found = torch.autograd.grad(output, list(leaves.values()), case.inputs[f"{name}grad_out"].float(), retain_graph=True)
    return {f"{name}grad_{leaf}": grad.float() for leaf, grad in zip(leaves, found)}


def leaves_of(case: Case, name: str, x: Tensor) -> dict[str, Tensor]:
    """x, q, k, v of a layer as leaves of their own."""
    return {"x": x.detach().requires_grad_(), **{n: case.inputs[f"{name}{n}"].detach().requires_grad_() for n in "qkv"}}
