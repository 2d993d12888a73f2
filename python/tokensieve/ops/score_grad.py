"""Gradients of attention_scores with respect to query and key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checks import REDUCTIONS

_op = torch.ops.tokensieve.attention_scores_backward.default

# Positions of the tensors among the arguments of the C++ op.
_CONSTANTS = {4: "bias", 5: "lse", 6: "row_weights", 14: "head_weights"}
_ACCUMULATE = 15


@torch.library.register_fake("tokensieve::attention_scores_backward")
def _fake(grad: Tensor, grad_lse: Tensor | None, row_lse: Tensor, query: Tensor, key: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, *options = inputs
    ctx.is_tensor = [isinstance(o, Tensor) for o in options[:-1]]
    ctx.options = [None if isinstance(o, Tensor) else o for o in options[:-1]]
    ctx.save_for_backward(query, key, output[1], *(o for o in options[:-1] if isinstance(o, Tensor)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    needs = ctx.needs_input_grad
    result: list[Any] = [None] * len(needs)
    if needs[_ACCUMULATE]:
        result[_ACCUMULATE] = grad
    for position, name in _CONSTANTS.items():
        if needs[position]:
            _checks.bad_value("attention_scores", f"{name} must not require a gradient; only query, key and accumulate have one")
    if not (needs[0] or needs[1]) or (grad is None and grad_lse is None):
        return tuple(result)
    query, key, row_lse, *tensors = ctx.saved_tensors
    left = iter(tensors)
    options = [next(left) if is_tensor else o for is_tensor, o in zip(ctx.is_tensor, ctx.options, strict=True)]
    reductions = options[9:11]
    if REDUCTIONS["max"] in reductions:
        name = ("query_reduction", "head_reduction")[reductions.index(REDUCTIONS["max"])]
        _checks.bad_value("attention_scores", f"{name} must not be 'max' where a gradient is wanted")
    if torch.is_grad_enabled():
        _checks.bad_value("attention_scores", "create_graph must be False: its gradient has no gradient")
    if grad is None:
        grad = _no_gradient(query, options)
    dense_lse = None if grad_lse is None else grad_lse.contiguous()
    result[0], result[1] = _op(grad.contiguous(), dense_lse, row_lse, query, key, *options)
    return tuple(result)


def _no_gradient(query: Tensor, options: list[Any]) -> Tensor:
    """Zeros in the shape of the scores, for a loss of the normalisers alone."""
    B, H, L, _ = query.shape
    rows, heads = options[9:11]
    shape = (B, *((H,) if heads == 0 else ()), *((L,) if rows == 0 else ()), options[7] - options[6])
    return torch.zeros(shape, dtype=torch.float32, device=query.device)


torch.library.register_autograd("tokensieve::attention_scores", _backward, setup_context=_setup_context)
