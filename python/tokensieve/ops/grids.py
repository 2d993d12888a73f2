"""Tokens on a grid: windows, adaptive bins, bilinear resizing, text-weighted windows, squares of tokens stacked into channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from . import _autograd, _checks
from ._checks import FLOATS, explain

_op = torch.ops.tokensieve.pool_grid.default
_op_backward = torch.ops.tokensieve.pool_grid_backward.default

KINDS = {"mean": 0, "max": 1, "bilinear": 2}
_MEAN, _MAX, _BILINEAR, _SOFTMAX, _STACK = range(5)
Sizes = int | Sequence[int]


def pool_grid(
    x: Tensor,
    grid: Sequence[int],
    *,
    size: Sequence[int] | None = None,
    window: Sizes | None = None,
    stride: Sizes | None = None,
    kind: Literal["mean", "max", "bilinear"] = "mean",
    within: Sequence[int] | None = None,
) -> Tensor:
    """Pools or resizes tokens that lie on a grid, channels last: no transpose to NCHW and back.

    Args:
        x: (B, N, C) float32, float16 or bfloat16, channels contiguous; tokens in raster order of the grid, strides of B and N are free.
        grid: (n,), (h, w) or (t, h, w) with N tokens in all.
        size: outputs of each axis. "bilinear": two taps an axis, corners not aligned, no anti-aliasing (F.interpolate). "mean" and "max":
            adaptive bins, output u of an axis covers the tokens floor(u n / size) .. ceil((u + 1) n / size) - 1 (they may overlap).
        window: tokens of a window on each axis (an int: on all of them), instead of size; what does not fill a window is dropped.
        stride: tokens between two windows; None = window.
        kind: "mean", "max" (a NaN is the largest) or "bilinear".
        within: with size, parts of the grid that are pooled apart: (7, 7) makes bins inside windows of 7 x 7 (STViT).

    Returns:
        (B, M, C) contiguous, of x's dtype, in raster order of the outputs.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, stride, option or size that breaks a rule above.

    Accumulated in float32 in raster order, rounded once. Differentiable in x; "max" gives each output's gradient to the first token, in
    raster order, that has the largest value. Deterministic, no atomics.

    Sources: LLaVA-OneVision (arXiv 2408.03326, bilinear), STViT (2303.08685, section 3.2, max within windows), TextHawk2 (2410.05261).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.arange(16.0).view(1, 16, 1)
        >>> ts.pool_grid(x, (4, 4), window=2)[0, :, 0]
        tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
        >>> ts.pool_grid(x, (4, 4), size=(1, 2), kind="max")[0, :, 0]
        tensor([13., 15.])
        >>> ts.pool_grid(torch.zeros(8, 729, 64), (27, 27), size=(14, 14), kind="bilinear").shape
        torch.Size([8, 196, 64])
    """
    try:
        kernel, adaptive = _axes(grid, size, window, stride, within)
        out: Tensor = _autograd.call(_op, (x,), x, *kernel, None, 1.0, adaptive, KINDS[kind])
    except Exception as error:
        explain(error, check_pool_grid, x, grid, size, window, stride, kind, within)
    return out


def pool_windows(
    x: Tensor, scores: Tensor, grid: Sequence[int], window: Sizes, *, stride: Sizes | None = None, temperature: float = 1.0
) -> Tensor:
    """Windows pooled with weights that are a softmax of the tokens' scores in each window; no unfolded copy of the windows.

    Args:
        x: (B, N, C) float32, float16 or bfloat16, laid out as in `pool_grid`.
        scores: (B, N) float32, for PPLLaVA the softmax over all tokens of their likeness to the text.
        grid: (n,), (h, w) or (t, h, w) with N tokens in all.
        window, stride: as in `pool_grid`.
        temperature: scores are divided by it; above 0 (PPLLaVA: 0.01).

    Returns:
        (B, M, C) contiguous, of x's dtype: sum over a window of softmax(scores / temperature) * x. A window whose scores hold a NaN or
        +inf, or are all -inf, is NaN.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, stride, option or size that breaks a rule above.

    Accumulated in float32 in raster order, rounded once. Differentiable in x and scores. Deterministic, no atomics.

    Source: PPLLaVA (arXiv 2411.02327, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]])
        >>> ts.pool_windows(x, torch.tensor([[0.0, 0.0, 0.0, 9.0]]), (1, 1, 4), (1, 1, 2), temperature=0.1)
        tensor([[[2.],
                 [7.]]])
    """
    try:
        kernel, _ = _axes(grid, None, window, stride, None)
        _checks.no_bools(temperature)
        dense = scores if scores.is_contiguous() else scores.contiguous()
        out: Tensor = _autograd.call(_op, (x, scores), x, *kernel, dense, temperature, False, _SOFTMAX)
    except Exception as error:
        explain(error, check_pool_windows, x, scores, grid, window, stride, temperature)
    return out


def space_to_depth(x: Tensor, grid: Sequence[int], block: Sizes = 2) -> Tensor:
    """Folds blocks of tokens into one wider token (pixel shuffle), one copy.

    Args:
        x: (B, N, C) float32, float16 or bfloat16, laid out as in `pool_grid`.
        grid: (n,), (h, w) or (t, h, w) with N tokens in all, multiples of block.
        block: tokens of a block on each axis; an int: on all of them. (1, 4) is TextHawk's rearrangement along rows.

    Returns:
        (B, M, tokens of a block * C) contiguous; channels by place in the block, in raster order.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, stride or size that breaks a rule above.

    Differentiable. Values are copied bit for bit.

    Sources: LEOPARD (arXiv 2410.01744), PVC (2412.09613), TextHawk2 (2410.05261).

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.space_to_depth(torch.arange(8.0).view(1, 8, 1), (2, 4))
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    try:
        kernel, _ = _axes(grid, None, block, None, None)
        if kernel[0] % kernel[6] or kernel[1] % kernel[7] or kernel[2] % kernel[8]:  # any() over a generator costs 0.5 us more
            raise ValueError("grid")  # explained below
        out: Tensor = _autograd.call(_op, (x,), x, *kernel, None, 1.0, False, _STACK)
    except Exception as error:
        explain(error, check_space_to_depth, x, grid, block)
    return out


def _axes(grid: Any, size: Any, window: Any, stride: Any, within: Any) -> tuple[tuple[int, ...], bool]:
    """Tokens, outputs, spans and steps of the kernel's three axes, and whether the bins are adaptive. Wrong sizes fail here or in C++."""
    axes = len(grid)
    if window is None:
        if stride is not None:
            raise ValueError("stride without window")
        part = grid if within is None else within
        shares = [o * p // n for n, o, p in zip(grid, size, part, strict=True)]
        _checks.no_bools(*grid, *size, *part)
        return _three(axes, grid, size, part, shares), True
    if size is not None or within is not None:
        raise ValueError("size and window")
    spans = (window,) * axes if isinstance(window, (int, torch.SymInt)) else window
    steps = spans if stride is None else (stride,) * axes if isinstance(stride, (int, torch.SymInt)) else stride
    _checks.no_bools(*grid, *spans, *steps)
    outputs = [(n - span) // step + 1 for n, span, step in zip(grid, spans, steps, strict=True)]
    return _three(axes, grid, outputs, spans, steps), False


def _three(axes: int, *lists: Any) -> tuple[int, ...]:
    ones = (1,) * (3 - axes)
    kernel: tuple[int, ...] = ()
    for numbers in lists:
        kernel += (*ones, *numbers)
    if len(kernel) != 12:
        raise ValueError("1 to 3 axes")
    return kernel


# ---- rules -------------------------------------------------------------------------------------------------------------------


def _numbers(op: str, name: str, value: Any, axes: int | None) -> tuple[int, ...]:
    """A sequence of as many ints, 1 or more; an int stands for all of them where `axes` is given."""
    if axes is not None and isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        value = (value,) * axes
    if isinstance(value, (bool, str, Tensor)) or not isinstance(value, Sequence):
        _checks.bad_type(op, f"{name} must be a sequence of ints, got {type(value).__name__}")
    for part in value:
        _checks.integer(op, name, part)
    if axes is not None and len(value) != axes:
        _checks.bad_value(op, f"{name} must have {axes} numbers, one for each axis of grid, got {tuple(value)}")
    if any(part < 1 for part in value):
        _checks.bad_value(op, f"{name} must be at least 1, got {tuple(value)}")
    return tuple(value)


def _check_x(op: str, x: Any, grid: Any) -> tuple[int, ...]:
    _checks.tensor(op, "x", x, 3, "(B, N, C)", FLOATS)
    _checks.contiguous_last(op, "x", x)
    sides = _numbers(op, "grid", grid, None)
    if not 1 <= len(sides) <= 3:
        _checks.bad_value(op, f"grid must be (n,), (h, w) or (t, h, w), got {sides}")
    tokens = 1
    for side in sides:
        tokens *= side
    if tokens != x.shape[1]:
        _checks.bad_value(op, f"grid must have the N={x.shape[1]} tokens of x, got {sides}")
    return sides


def _check_windows(op: str, sides: tuple[int, ...], window: Any, stride: Any, name: str = "window") -> None:
    spans = _numbers(op, name, window, len(sides))
    if stride is not None:
        _numbers(op, "stride", stride, len(sides))
    if any(span > side for span, side in zip(spans, sides, strict=True)):
        _checks.bad_value(op, f"{name} must be at most grid={sides}, got {spans}")


def check_pool_grid(x: Any, grid: Any, size: Any, window: Any, stride: Any, kind: Any, within: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "pool_grid"
    _checks.option(op, "kind", kind, KINDS)
    sides = _check_x(op, x, grid)
    if (size is None) == (window is None):
        _checks.bad_value(op, f"size or window must be given, and not both, got size={size}, window={window}")
    if size is None:
        if kind == "bilinear":
            _checks.bad_value(op, "size must be given for kind 'bilinear', got None")
        if within is not None:
            _checks.bad_value(op, f"within must be None without size, got {within}")
        return _check_windows(op, sides, window, stride)
    if stride is not None:
        _checks.bad_value(op, f"stride must be None without window, got {stride}")
    outputs = _numbers(op, "size", size, len(sides))
    if within is None:
        return None
    if kind == "bilinear":
        _checks.bad_value(op, f"within must be None for kind 'bilinear', got {within}")
    parts = _numbers(op, "within", within, len(sides))
    if any(side % part for side, part in zip(sides, parts, strict=True)):
        _checks.bad_value(op, f"within must divide grid={sides}, got {parts}")
    if any(o % (side // part) for o, side, part in zip(outputs, sides, parts, strict=True)):
        _checks.bad_value(op, f"size must give every part of {parts} tokens as many outputs, got {outputs}")
    return None


def check_pool_windows(x: Any, scores: Any, grid: Any, window: Any, stride: Any, temperature: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "pool_windows"
    sides = _check_x(op, x, grid)
    _checks.tensor(op, "scores", scores, 2, "(B, N)", (torch.float32,))
    _checks.exact_shape(op, "scores", scores, tuple(x.shape[:2]), "(B, N)")
    _checks.same_device(op, "scores", scores, "x", x)
    _check_windows(op, sides, window, stride)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float, torch.SymFloat)):
        _checks.bad_type(op, f"temperature must be a float, got {type(temperature).__name__}")
    if not temperature > 0:
        _checks.bad_value(op, f"temperature must be above 0, got {temperature}")


def check_space_to_depth(x: Any, grid: Any, block: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "space_to_depth"
    sides = _check_x(op, x, grid)
    blocks = _numbers(op, "block", block, len(sides))
    if any(side % b for side, b in zip(sides, blocks, strict=True)):
        _checks.bad_value(op, f"grid must be multiples of block={block}, got {sides}")


# ---- fakes and gradients -----------------------------------------------------------------------------------------------------


@torch.library.register_fake("tokensieve::pool_grid")
def _fake(x: Tensor, *arguments: Any) -> Tensor:
    (n0, n1, n2, o0, o1, o2, w0, w1, w2), kind, scores = arguments[:9], arguments[15], arguments[12]
    if kind == _SOFTMAX:
        check_pool_windows(x, scores, (n0, n1, n2), (w0, w1, w2), arguments[9:12], arguments[13])
    elif kind == _STACK:
        check_space_to_depth(x, (n0, n1, n2), (w0, w1, w2))
    elif arguments[14] or kind == _BILINEAR:
        check_pool_grid(x, (n0, n1, n2), (o0, o1, o2), None, None, list(KINDS)[kind], None)
    else:
        check_pool_grid(x, (n0, n1, n2), None, (w0, w1, w2), arguments[9:12], list(KINDS)[kind], None)
    return x.new_empty((x.shape[0], o0 * o1 * o2, x.shape[2] * (w0 * w1 * w2 if kind == _STACK else 1)))


@torch.library.register_fake("tokensieve::pool_grid_backward")
def _fake_backward(grad: Tensor, x: Tensor | None, out: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    (n0, n1, n2, _, _, _, w0, w1, w2), (x_wanted, scores_wanted) = arguments[:9], arguments[16:]
    B, tokens = grad.shape[0], n0 * n1 * n2
    stacked = w0 * w1 * w2 if arguments[15] == _STACK else 1
    of_x = grad.new_empty((B, tokens if x_wanted else 0, grad.shape[2] // stacked))
    return of_x, grad.new_empty((B, tokens if scores_wanted else 0), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *sizes = inputs
    scores = sizes.pop(12)
    ctx.sizes = sizes
    kept = (x, output) if sizes[-1] in (_MAX, _SOFTMAX) else (None, None)
    ctx.save_for_backward(*kept, scores)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, out, scores = ctx.saved_tensors
    sizes = ctx.sizes
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[13]
    if torch.is_grad_enabled() and sizes[-1] in (_MAX, _SOFTMAX):
        op = "pool_windows" if sizes[-1] == _SOFTMAX else "pool_grid"
        _checks.bad_value(op, "gradients of gradients (create_graph=True) must be those of 'mean', 'bilinear' or space_to_depth")
    of_x, of_scores = _op_backward(grad.contiguous(), x, out, *sizes[:12], scores, *sizes[12:], *wanted)
    return of_x if wanted[0] else None, *[None] * 12, of_scores if wanted[1] else None, None, None, None


def _setup_again(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.arguments = inputs[3:19]


def _backward_again(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    """Mean, bilinear and stacking are linear: the gradient of their gradient is the op itself."""
    return _op(grad.contiguous(), *ctx.arguments), *[None] * 20


torch.library.register_autograd("tokensieve::pool_grid", _backward, setup_context=_setup_context)
torch.library.register_autograd("tokensieve::pool_grid_backward", _backward_again, setup_context=_setup_again)
