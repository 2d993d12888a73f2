"""The cheap way around autograd where no gradient can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def call(op: Any, differentiable: Sequence[Tensor | None], *arguments: Any) -> Any:
    """`op(*arguments)`; skips the Python autograd kernel that register_autograd installs (4 of 6 us a call) where nothing needs it."""
    if torch.compiler.is_compiling():
        return op(*arguments)
    if torch.is_grad_enabled():
        for tensor in differentiable:  # a loop: any() over a generator costs 0.2 us more
            if tensor is not None and tensor.requires_grad:
                try:
                    return op(*arguments)
                except RuntimeError as error:
                    if "functorch transforms" in str(error):
                        _refuse_transform(op)
                    raise
    if forward_ad._current_level >= 0:  # torch drops the tangents of such an op in silence
        _refuse_tangents(op, differentiable)
    with _BelowAutograd():
        return op._op(*arguments)  # what OpOverload.__call__ does, without its frame: 0.24 us


def _refuse_transform(op: Any) -> NoReturn:
    """torch.library's autograd kernels know no functorch: torch's message names neither the op nor a way out."""
    rule = "tensors must not be those of torch.func.grad, vjp, jacrev or vmap of a tensor that requires a gradient"
    raise ValueError(f"{_name(op)}: {rule}, got one; use Tensor.backward() or torch.autograd.grad") from None


def _refuse_tangents(op: Any, tensors: Sequence[Tensor | None]) -> None:
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        name = _name(op)
        raise ValueError(f"{name}: tensors must carry no forward-mode tangent (torch.func.jvp); gradients are reverse-mode only")


def _name(op: Any) -> str:
    name: str = op.name().replace("::", ".")
    return name
