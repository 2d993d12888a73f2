"""pool_runs: means of neighbours inside packed sequences. row_column_means: both means of a video in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _checks, _debug
from ._checks import FLOATS, explain

_runs = torch.ops.tokensieve.pool_runs.default
_runs_backward = torch.ops.tokensieve.pool_runs_backward.default
_means = torch.ops.tokensieve.row_column_means.default
_means_backward = torch.ops.tokensieve.row_column_means_backward.default


def pool_runs(x: Tensor, starts: Tensor, length: int, stride: int) -> Tensor:
    """Averages every `stride` neighbours of the images in packed sequences, and copies the text.

    Args:
        x: (B, S, C) float32, float16 or bfloat16, channels contiguous, strides of B and S are free.
        starts: (B, I) int64, the first token of each image, ascending; images do not overlap. On CUDA this is checked by
            `debug_checks` alone.
        length: tokens of an image.
        stride: tokens of an average; what is left behind the last whole one of an image is dropped.

    Returns:
        (B, S - I * (length - length // stride), C) contiguous, of x's dtype, in the order of the sequence.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride or (CPU) start that breaks a rule above.

    Accumulated in float32 in ascending order, rounded once. Differentiable in x. Deterministic, no atomics.

    Source: LLaVolta (arXiv 2406.20092, section 3).

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.pool_runs(torch.arange(7.0).view(1, 7, 1), torch.tensor([[1]]), 5, 2)[0, :, 0]
        tensor([0.0000, 1.5000, 3.5000, 6.0000])
    """
    try:
        _checks.no_bools(length, stride)
        out: Tensor = _autograd.call(_runs, (x,), x, starts, length, stride)
    except Exception as error:
        explain(error, check_pool_runs, x, starts, length, stride)
    if _debug.enabled and _debug.readable(starts):
        _debug.runs("pool_runs", starts, length, x.shape[1])
    return out


def row_column_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the tokens of each frame and the mean over the frames of each token, reading x once.

    Args:
        x: (B, T, N, C) float32, float16 or bfloat16, channels contiguous, other strides are free; T and N at least 1.

    Returns:
        (B, T, C), what happens when, and (B, N, C), what is where; contiguous, of x's dtype.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape or stride that breaks a rule above.

    Accumulated in float32 in a fixed order, rounded once. Differentiable in x. Deterministic, no atomics.

    Source: RED-VILLM (arXiv 2404.11865), as in Video-ChatGPT (2306.05424).

    Example:
        >>> import torch, tokensieve as ts
        >>> rows, columns = ts.row_column_means(torch.tensor([[[[1.0], [3.0]], [[5.0], [9.0]]]]))
        >>> rows[0, :, 0], columns[0, :, 0]
        (tensor([2., 7.]), tensor([3., 6.]))
    """
    try:
        rows, columns = _autograd.call(_means, (x,), x)
    except Exception as error:
        explain(error, check_row_column_means, x)
    return rows, columns


def check_pool_runs(x: Any, starts: Any, length: Any, stride: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "pool_runs"
    _checks.tensor(op, "x", x, 3, "(B, S, C)", FLOATS)
    _checks.contiguous_last(op, "x", x)
    _checks.tensor(op, "starts", starts, 2, "(B, I)", (torch.int64,))
    _checks.contiguous_last(op, "starts", starts)
    _checks.same_device(op, "starts", starts, "x", x)
    if starts.shape[0] != x.shape[0]:
        _checks.bad_value(op, f"starts must be (B={x.shape[0]}, I), got shape {_checks.shape(starts)}")
    for name, value in (("length", length), ("stride", stride)):
        _checks.integer(op, name, value)
        if value < 1:
            _checks.bad_value(op, f"{name} must be at least 1, got {value}")
    S, images = x.shape[1], starts.shape[1]
    if images * length > S:
        _checks.bad_value(op, f"starts must leave room for {images} runs of {length} among S={S} tokens")
    if starts.device.type == "cpu" and not torch.compiler.is_compiling() and type(starts) is Tensor:
        _check_starts(op, starts, S, length)


def _check_starts(op: str, starts: Tensor, S: int, length: int) -> None:
    for row in starts.tolist():
        ends = [0, *(start + length for start in row)]
        for start, free in zip(row, ends, strict=False):
            if not free <= start <= S - length:
                _checks.bad_value(op, f"starts must be ascending runs of {length} that do not overlap among S={S} tokens, got {row}")


def check_row_column_means(x: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "row_column_means"
    _checks.tensor(op, "x", x, 4, "(B, T, N, C)", FLOATS)
    _checks.contiguous_last(op, "x", x)
    if x.shape[1] < 1 or x.shape[2] < 1:
        _checks.bad_value(op, f"x must have T >= 1 frames of N >= 1 tokens, got shape {_checks.shape(x)}")


@torch.library.register_fake("tokensieve::pool_runs")
def _fake_runs(x: Tensor, starts: Tensor, length: int, stride: int) -> Tensor:
    check_pool_runs(x, starts, length, stride)
    return x.new_empty((x.shape[0], x.shape[1] - starts.shape[1] * (length - length // stride), x.shape[2]))


@torch.library.register_fake("tokensieve::pool_runs_backward")
def _fake_runs_backward(grad: Tensor, starts: Tensor, S: int, length: int, stride: int) -> Tensor:
    return grad.new_empty((grad.shape[0], S, grad.shape[2]))


@torch.library.register_fake("tokensieve::row_column_means")
def _fake_means(x: Tensor) -> tuple[Tensor, Tensor]:
    check_row_column_means(x)
    B, T, N, C = x.shape
    return x.new_empty((B, T, C)), x.new_empty((B, N, C))


@torch.library.register_fake("tokensieve::row_column_means_backward")
def _fake_means_backward(rows_grad: Tensor, columns_grad: Tensor) -> Tensor:
    B, T, C = rows_grad.shape
    return rows_grad.new_empty((B, T, columns_grad.shape[1], C))


def _setup_runs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, starts, ctx.length, ctx.stride = inputs
    ctx.S = x.shape[1]
    ctx.save_for_backward(starts)


def _backward_runs(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _runs_backward(grad.contiguous(), ctx.saved_tensors[0], ctx.S, ctx.length, ctx.stride), None, None, None


def _setup_runs_again(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, starts, _, ctx.length, ctx.stride = inputs
    ctx.save_for_backward(starts)


def _backward_runs_again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # both are linear
    return _runs(grad.contiguous(), ctx.saved_tensors[0], ctx.length, ctx.stride), None, None, None, None


def _setup_means(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _backward_means(ctx: Any, rows: Tensor, columns: Tensor) -> Tensor:
    of_x: Tensor = _means_backward(rows.contiguous(), columns.contiguous())
    return of_x


def _backward_means_again(ctx: Any, grad: Tensor) -> Any:
    return _means(grad.contiguous())


torch.library.register_autograd("tokensieve::pool_runs", _backward_runs, setup_context=_setup_runs)
torch.library.register_autograd("tokensieve::pool_runs_backward", _backward_runs_again, setup_context=_setup_runs_again)
torch.library.register_autograd("tokensieve::row_column_means", _backward_means, setup_context=_setup_means)
torch.library.register_autograd("tokensieve::row_column_means_backward", _backward_means_again, setup_context=_setup_means)
