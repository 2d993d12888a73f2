"""Segment reductions of tokens: by label, by run, and over the tokens that a selection left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _autograd, _checks, _debug
from ._checks import FLOATS, explain
from .merge import INTEGERS

_op = torch.ops.tokensieve.merge_by_label.default
_op_fuse = torch.ops.tokensieve.fuse_dropped.default
_op_backward = torch.ops.tokensieve.merge_by_label_backward.default
_unmerge = torch.ops.tokensieve.unmerge_tokens.default

MODES = {"sum": 0, "mean": 1, "amax": 3}


def merge_by_label(
    x: Tensor, labels: Tensor, rows: int, *, weights: Tensor | None = None, mode: str = "mean", epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Weighted mean, sum or maximum of the tokens that carry a label, for every label.

    Args:
        x: (B, N, ...) float32, float16 or bfloat16, laid out as in `gather_tokens`; int32 and int64 for "amax" and unweighted "sum".
        labels: (B, N) int64 in [-1, rows); -1 = this token belongs to no row.
        rows: number of output rows; a Python int.
        weights: (B, N) float32 factors of the tokens; None = 1. Not for "amax".
        mode: "mean": sum(w x) / (sum(w) + epsilon); "sum": sum(w x); "amax".
        epsilon: added to the divisor of the mean (DPC-KNN merging: 1e-6).

    Returns:
        out (B, rows, ...) of x's dtype, contiguous, and total (B, rows) float32 = sum(w). Rows of labels that nobody carries are 0 in
        both, and so are means whose divisor is 0.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride, option or (CPU) label that breaks a rule above.

    Accumulated in float32 by ascending token id, rounded once; sums beyond a half precision dtype's range become inf. Differentiable in
    x and weights ("amax": to the lowest token id among equal values). Deterministic, no atomics.

    Sources: Chat-UniVi (arXiv 2311.08046), SparseVLM's recycling (2410.04417), runs of FrameFusion (2501.01986) with `run_labels`.

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> ts.merge_by_label(x, torch.tensor([[0, 2, 0, -1]]), 3)
        (tensor([[[2.5000],
                 [0.0000],
                 [2.0000]]]), tensor([[2., 0., 1.]]))
    """
    try:
        if _debug.enabled and _debug.readable(labels):
            _debug.rows("merge_by_label", "labels", labels, rows, "rows")
        dense = weights if weights is None or weights.is_contiguous() else weights.contiguous()
        out, total = _autograd.call(_op, (x,) if weights is None else (x, weights), x, labels, rows, dense, MODES[mode], epsilon)
    except Exception as error:
        explain(error, _explain, x, labels, rows, weights, mode, epsilon)
    return out, total


def fuse_dropped(x: Tensor, weights: Tensor, index: Tensor, *, normalize: bool = False) -> Tensor:
    """The weighted sum of the tokens that a selection left out, as one token: EViT's fused token, without a complement or a gather.

    Args:
        x: (B, N, ...) float32, float16 or bfloat16, laid out as in `gather_tokens`.
        weights: (B, N) float32, for EViT the scores that the selection was made of.
        index: (B, K) int64 in [-1, N), the kept tokens (protected ones too); -1 is skipped.
        normalize: divide by the sum of the weights; False is EViT, whose fused token shrinks where the rest is unattended.

    Returns:
        (B, 1, ...) of x's dtype; 0 where no token is left out, or the weights add up to 0 under normalize.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride or (CPU) index that breaks a rule above.

    Accumulated in float32 by ascending token id, rounded once. Differentiable in x and weights. Deterministic, no atomics.

    Source: EViT (arXiv 2202.07800, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
        >>> ts.fuse_dropped(x, torch.tensor([[0.1, 0.5, 0.2, 0.2]]), torch.tensor([[0, 1]]))
        tensor([[[2.4000]]])
    """
    try:
        if _debug.enabled and _debug.readable(index):
            _debug.positions("fuse_dropped", index, x.shape[1])
        dense = weights if weights.is_contiguous() else weights.contiguous()
        out, _ = _autograd.call(_op_fuse, (x, weights), x, dense, index, normalize)
    except Exception as error:
        explain(error, _explain_fuse, x, weights, index, normalize)
    result: Tensor = out
    return result


def run_labels(starts: Tensor) -> Tensor:
    """Labels of runs of tokens, for `merge_by_label`: how many runs have begun up to a token, less one.

    Args:
        starts: (B, N) bool, True where a run begins.

    Returns:
        (B, N) int64; -1 for the tokens in front of the first run.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape that breaks a rule above.

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.run_labels(torch.tensor([[False, True, False, True]]))
        tensor([[-1,  0,  0,  1]])
    """
    _checks.tensor("run_labels", "starts", starts, 2, "(B, N)", (torch.bool,))
    return starts.cumsum(1) - 1


def _explain(x: Any, labels: Any, rows: Any, weights: Any, mode: Any, epsilon: Any) -> None:
    check_by_label(x, labels, rows, weights, mode, epsilon)
    if labels.device.type == "cpu":
        _debug.rows("merge_by_label", "labels", labels, rows, "rows")


def check_by_label(x: Any, labels: Any, rows: Any, weights: Any, mode: Any, epsilon: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "merge_by_label"
    _checks.option(op, "mode", mode, {"mean": 0, "sum": 0, "amax": 0})
    _checks.integer(op, "rows", rows)
    if rows < 0:
        _checks.bad_value(op, f"rows must be at least 0, got {rows}")
    if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool):
        _checks.bad_type(op, f"epsilon must be a float, got {type(epsilon).__name__}")
    whole = mode == "amax" or (mode == "sum" and weights is None)
    _check_x(op, x, (*FLOATS, *INTEGERS) if whole else FLOATS)
    _checks.tensor(op, "labels", labels, 2, "(B, N)", (torch.int64,))
    _checks.exact_shape(op, "labels", labels, tuple(x.shape[:2]), "(B, N)")
    _checks.contiguous_last(op, "labels", labels)
    _checks.same_device(op, "labels", labels, "x", x)
    if weights is not None:
        if mode == "amax":
            _checks.bad_value(op, "weights must be None in mode 'amax', got a tensor")
        _check_weights(op, weights, x)


def _check_x(op: str, x: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    _checks.tensor(op, "x", x, dtypes=dtypes)
    if x.dim() < 2:
        _checks.bad_value(op, f"x must be (B, N, ...), got shape {_checks.shape(x)}")
    _checks.token_layout(op, "x", x)


def _check_weights(op: str, weights: Any, x: Tensor) -> None:
    _checks.tensor(op, "weights", weights, 2, "(B, N)", (torch.float32,))
    _checks.exact_shape(op, "weights", weights, tuple(x.shape[:2]), "(B, N)")
    _checks.same_device(op, "weights", weights, "x", x)


def _explain_fuse(x: Any, weights: Any, index: Any, normalize: Any) -> None:
    check_fuse(x, weights, index, normalize)
    if index.device.type == "cpu":
        _debug.positions("fuse_dropped", index, x.shape[1])


def check_fuse(x: Any, weights: Any, index: Any, normalize: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "fuse_dropped"
    _checks.flag(op, "normalize", normalize)
    _check_x(op, x, FLOATS)
    _check_weights(op, weights, x)
    _checks.tensor(op, "index", index, 2, "(B, K)", (torch.int64,))
    _checks.contiguous_last(op, "index", index)
    if index.shape[0] != x.shape[0]:
        _checks.bad_value(op, f"index must be (B={x.shape[0]}, K), got shape {_checks.shape(index)}")
    _checks.same_device(op, "index", index, "x", x)


@torch.library.register_fake("tokensieve::merge_by_label")
def _fake(x: Tensor, labels: Tensor, rows: int, weights: Tensor | None, mode: int, epsilon: float) -> tuple[Tensor, Tensor]:
    check_by_label(x, labels, rows, weights, next(name for name, value in MODES.items() if value == mode), epsilon)
    return x.new_empty((x.shape[0], rows, *x.shape[2:])), x.new_empty((x.shape[0], rows), dtype=torch.float32)


@torch.library.register_fake("tokensieve::fuse_dropped")
def _fake_fuse(x: Tensor, weights: Tensor, index: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    check_fuse(x, weights, index, normalize)
    return x.new_empty((x.shape[0], 1, *x.shape[2:])), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@torch.library.register_fake("tokensieve::merge_by_label_backward")
def _fake_backward(
    grad: Tensor,
    total_grad: Tensor | None,
    x: Tensor,
    out: Tensor,
    labels: Tensor,
    complement: bool,
    weights: Tensor | None,
    mode: int,
    epsilon: float,
    x_wanted: bool,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor]:
    B, N = x.shape[:2]
    of_x = x.new_empty((B, N if x_wanted else 0, *x.shape[2:]))
    return of_x, x.new_empty((B, N if weights_wanted else 0), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, labels, _, weights, mode, epsilon = inputs
    ctx.options = (False, mode, epsilon)
    ctx.save_for_backward(x, output[0], labels, weights)
    if not x.is_floating_point():
        ctx.mark_non_differentiable(*output)


def _setup_fuse(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, index, normalize = inputs
    ctx.options = (True, MODES["mean" if normalize else "sum"], 0.0)
    ctx.save_for_backward(x, output[0], index, weights)


def _gradients(ctx: Any, grad: Tensor | None, total_grad: Tensor | None, of_x: bool, of_weights: bool) -> tuple[Any, Any]:
    x, out, labels, weights = ctx.saved_tensors
    complement, mode, epsilon = ctx.options
    if weights is None:
        of_weights = False  # then total does not depend on anything
    dense = torch.zeros_like(out) if grad is None else grad.contiguous()
    total = None if total_grad is None else total_grad.contiguous()
    if torch.is_grad_enabled():
        return _again(dense, total, x, out, labels, complement, weights, mode, epsilon, of_x, of_weights)
    found = _op_backward(dense, total, x, out, labels, complement, weights, mode, epsilon, of_x, of_weights)
    return found[0] if of_x else None, found[1] if of_weights else None


def _again(
    grad: Tensor,
    total_grad: Tensor | None,
    x: Tensor,
    out: Tensor,
    labels: Tensor,
    complement: bool,
    weights: Tensor | None,
    mode: int,
    epsilon: float,
    of_x: bool,
    of_weights: bool,
) -> tuple[Any, Any]:
    """create_graph=True: the same in steps that autograd knows."""
    if complement:
        kept = torch.where(labels < 0, 0, -1)
        labels = labels.new_zeros(x.shape[:2]).scatter_reduce_(1, labels.clamp(min=0), kept, "amin")
    if mode == MODES["amax"]:
        factor = _op_backward(torch.ones_like(grad), None, x.detach(), out.detach(), labels, False, None, mode, epsilon, True, False)[0]
        return factor * _unmerge([grad], labels)[0], None
    rows = out.shape[1]
    tokens = _unmerge([grad], labels)[0].float()
    flat = (*x.shape[:2], *[1] * (x.dim() - 2))
    ones = torch.ones(x.shape[:2], device=x.device) if weights is None else weights
    share = ones
    divisor: Any = 1.0
    if mode == MODES["mean"]:
        _, total = _op(x.detach(), labels, rows, ones, MODES["sum"], 0.0)
        divisor = _unmerge([total + epsilon], labels)[0]
        divisor = torch.where(divisor == 0, torch.inf, divisor)
        share = ones / divisor
    to_x = (tokens * share.view(flat)).to(x.dtype) if of_x else None
    if not of_weights:
        return to_x, None
    value = x.float()
    if mode == MODES["mean"]:
        value = value - _unmerge([_op(x, labels, rows, ones, mode, epsilon)[0]], labels)[0].float()
    dot = (tokens * value).flatten(2).sum(2) if x.dim() > 2 else tokens * value
    to_weights = dot / divisor
    return to_x, to_weights if total_grad is None else to_weights + _unmerge([total_grad], labels)[0]


def _backward(ctx: Any, grad: Tensor | None, total_grad: Tensor | None) -> tuple[Any, ...]:
    of_x, of_weights = _gradients(ctx, grad, total_grad, ctx.needs_input_grad[0], ctx.needs_input_grad[3])
    return of_x, None, None, of_weights, None, None


def _backward_fuse(ctx: Any, grad: Tensor | None, total_grad: Tensor | None) -> tuple[Any, ...]:
    of_x, of_weights = _gradients(ctx, grad, total_grad, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
    return of_x, of_weights, None, None


_register: Callable[..., None] = torch.library.register_autograd
_register("tokensieve::merge_by_label", _backward, setup_context=_setup_context)
_register("tokensieve::fuse_dropped", _backward_fuse, setup_context=_setup_fuse)
