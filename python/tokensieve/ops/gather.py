"""gather_tokens: the kept rows of several tensors at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import _autograd, _checks, _debug
from ._checks import explain

_op = torch.ops.tokensieve.gather_tokens.default
_op_out = torch.ops.tokensieve.gather_tokens_out.default
_op_backward = torch.ops.tokensieve.gather_tokens_backward.default


@overload
def gather_tokens(tensors: Tensor, index: Tensor) -> Tensor: ...
@overload
def gather_tokens(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]: ...


def gather_tokens(tensors: Tensor | Sequence[Tensor], index: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Rows of one or several tensors by one index list; a launch takes up to 8 tensors.

    Args:
        tensors: one (B, N, ...) tensor or a sequence of them, any widths and dtypes. After (B, N) at most one strided axis over contiguous
            elements: (B, N), (B, N, C) and transposed (B, N, H, D) views of (B, H, N, D) storage all work without a copy.
        index: (B, K) int64 in [-1, N); -1 gives a row of zeros. An expanded (stride 0) batch is taken as it is.

    Returns:
        (B, K, ...) contiguous, one for one: a tensor for a tensor, a tuple for a sequence.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride or (CPU) index that breaks a rule above.

    Differentiable in the tensors; the backward pass scatters without atomics, so a row must not name a token twice (`debug_checks` looks).

    Example:
        >>> import torch, tokensieve as ts
        >>> hidden, position_ids = torch.arange(8.0).view(1, 4, 2), torch.arange(4).view(1, 4)
        >>> ts.gather_tokens((hidden, position_ids), torch.tensor([[1, 3]]))
        (tensor([[[2., 3.],
                 [6., 7.]]]), tensor([[1, 3]]))
    """
    single = isinstance(tensors, Tensor)
    items: Any = [tensors] if single else tensors
    try:
        if _debug.enabled and _debug.readable(index):
            _debug.indices("gather_tokens", index, items[0].shape[1])
        out = _autograd.call(_op, items, items, index)
    except Exception as error:
        explain(error, _explain, "gather_tokens", items, index)
    return out[0] if single else tuple(out)


def gather_tokens_out(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor]) -> None:
    """`gather_tokens` into given tensors; the one op that writes to its arguments, for buffers that are used again.

    Args:
        tensors: sequence of (B, N, ...) tensors, as in `gather_tokens`.
        index: (B, K) int64 in [-1, N); -1 gives a row of zeros.
        out: contiguous (B, K, ...) tensors, one for one of the same dtype, that share no memory with tensors or index.

    Returns:
        None; out is overwritten.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride, (CPU) index or memory that breaks a rule above.

    Not differentiable: a tensor that requires a gradient is refused while gradients are recorded.

    Example:
        >>> import torch, tokensieve as ts
        >>> out = torch.empty(1, 1, 2)
        >>> ts.gather_tokens_out([torch.arange(8.0).view(1, 4, 2)], torch.tensor([[2]]), [out])
        >>> out
        tensor([[[4., 5.]]])
    """
    try:
        if _debug.enabled and _debug.readable(index):
            _debug.indices("gather_tokens_out", index, tensors[0].shape[1])
        if torch.is_grad_enabled():
            _refuse_gradients(tensors, out)
        _op_out(tensors, index, out)
        if not torch.compiler.is_compiling():
            for t in out:
                if not t.is_inference():
                    increment_version(t)  # or autograd would not see that a tensor it saved was overwritten
    except Exception as error:
        explain(error, _explain_out, tensors, index, out)


def _refuse_gradients(tensors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """The graph would end here in silence, as torch's own out= functions say too."""
    for name, given in (("tensors", tensors), ("out", out)):
        for i, t in enumerate(given):
            if t.requires_grad:
                rule = f"{name}[{i}] must require no gradient (this op has none); call it under torch.no_grad() or use gather_tokens"
                _checks.bad_value("gather_tokens_out", f"{rule}, got requires_grad=True")


def _explain(op: str, tensors: Any, index: Any) -> None:
    check_gather(op, tensors, index)
    if index.device.type == "cpu":
        _debug.positions(op, index, tensors[0].shape[1])


def check_gather(op: str, tensors: Any, index: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    _checks.tensor(op, "index", index, 2, "(B, K)", (torch.int64,))
    _checks.contiguous_last(op, "index", index)
    if isinstance(tensors, Sequence) and len(tensors) and isinstance(tensors[0], Tensor):
        if tensors[0].dim() < 2:
            _checks.bad_value(op, f"tensors[0] must be (B, N, ...), got shape {_checks.shape(tensors[0])}")
        B, N = tensors[0].shape[:2]
        if index.shape[0] != B:
            _checks.bad_value(op, f"index must be (B={B}, K), got shape {_checks.shape(index)}")
    else:
        B, N = index.shape[0], 0
    _checks.token_tensors(op, tensors, B, N, "index", index)


def _explain_out(tensors: Any, index: Any, out: Any) -> None:
    _check_out(tensors, index, out)
    _explain("gather_tokens_out", tensors, index)


def _check_out(tensors: Any, index: Any, out: Any) -> None:
    op = "gather_tokens_out"
    check_gather(op, tensors, index)
    if isinstance(out, Tensor) or not isinstance(out, Sequence):
        _checks.bad_type(op, f"out must be a sequence of tensors, got {type(out).__name__}")
    if len(out) != len(tensors):
        _checks.bad_value(op, f"out must hold {len(tensors)} tensors, got {len(out)}")
    for i, (o, t) in enumerate(zip(out, tensors, strict=True)):
        name = f"out[{i}]"
        _checks.tensor(op, name, o, dtypes=(t.dtype,))
        _checks.exact_shape(op, name, o, (t.shape[0], index.shape[1], *t.shape[2:]), "(B, K, ...)")
        _checks.same_device(op, name, o, "index", index)
        if not o.is_contiguous():
            _checks.bad_value(op, f"{name} must be contiguous, got strides {tuple(o.stride())}")


@torch.library.register_fake("tokensieve::gather_tokens")
def _fake(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    check_gather("gather_tokens", tensors, index)
    return [t.new_empty((t.shape[0], index.shape[1], *t.shape[2:])) for t in tensors]


@torch.library.register_fake("tokensieve::gather_tokens_out")
def _fake_out(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor]) -> None:
    _check_out(tensors, index, out)


@torch.library.register_fake("tokensieve::gather_tokens_backward")
def _fake_backward(grads: Sequence[Tensor], index: Tensor, N: int) -> list[Tensor]:
    return [g.new_empty((g.shape[0], N, *g.shape[2:])) for g in grads]


def scatter_gradients(grads: Sequence[Tensor | None], floating: Sequence[bool], index: Tensor, N: int) -> list[Tensor | None]:
    """Gradients of the gathered tensors (None where there is none) -> gradients of the (B, N, ...) tensors."""
    used = [i for i, g in enumerate(grads) if g is not None and floating[i]]
    result: list[Tensor | None] = [None] * len(grads)
    if used:
        dense = [grads[i].contiguous() for i in used]  # type: ignore[union-attr]
        for i, g in zip(used, _op_backward(dense, index, N), strict=True):
            result[i] = g
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, index = inputs
    ctx.save_for_backward(index)
    ctx.N = tensors[0].shape[1]
    ctx.floating = [t.is_floating_point() or t.is_complex() for t in tensors]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None]:
    (index,) = ctx.saved_tensors
    return scatter_gradients(grads, ctx.floating, index, ctx.N), None


torch.library.register_autograd("tokensieve::gather_tokens", _backward, setup_context=_setup_context)


def _setup_scatter(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_of_scatter(ctx: Any, grads: list[Tensor | None]) -> tuple[list[Tensor | None], None, None]:
    """The scatter is linear, so its gradient is the gather again (second derivatives, gradient penalties)."""
    (index,) = ctx.saved_tensors
    used = [i for i, g in enumerate(grads) if g is not None]
    result: list[Tensor | None] = [None] * len(grads)
    for i, g in zip(used, _op([grads[i] for i in used], index) if used else [], strict=True):
        result[i] = g
    return result, None, None


torch.library.register_autograd("tokensieve::gather_tokens_backward", _backward_of_scatter, setup_context=_setup_scatter)
