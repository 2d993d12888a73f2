"""scatter_tokens: rows written back to, or added to, the tokens they came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from . import _autograd, _checks, _debug
from ._checks import FLOATS, explain

_op = torch.ops.tokensieve.scatter_tokens.default
_op_backward = torch.ops.tokensieve.scatter_tokens_backward.default
_gather = torch.ops.tokensieve.gather_tokens.default

MODES = {"replace": False, "add": True}


@overload
def scatter_tokens(tensors: Tensor, index: Tensor, values: Tensor, *, mode: str = ..., weights: Tensor | None = ...) -> Tensor: ...
@overload
def scatter_tokens(
    tensors: Sequence[Tensor], index: Tensor, values: Sequence[Tensor], *, mode: str = ..., weights: Tensor | None = ...
) -> tuple[Tensor, ...]: ...


def scatter_tokens(
    tensors: Tensor | Sequence[Tensor],
    index: Tensor,
    values: Tensor | Sequence[Tensor],
    *,
    mode: str = "replace",
    weights: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Copies of tensors in which the tokens that an index names are replaced, or have values added: the inverse of `gather_tokens`.

    Mixture-of-depths layers (VideoLLM-MoD, arXiv 2408.16730) run on gathered tokens and add the outcome back: `mode="add"` with the
    router's weights computes x[index] + weight * value in one pass over x.

    Args:
        tensors: one (B, N, ...) tensor or a sequence of them, laid out as in `gather_tokens`.
        index: (B, K) int64 in [-1, N), no token twice in a row; the values at -1 are not used.
        values: (B, K, ...) tensors, one for one, of the dtypes of tensors.
        mode: "replace" (any dtype) or "add" (float32, float16, bfloat16; the sum is made in float32 and rounded once).
        weights: (B, K) float32 factors of the values; for "add" only.

    Returns:
        (B, N, ...) contiguous, one for one: a tensor for a tensor, a tuple for a sequence. The arguments are left as they are.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride, option or (CPU) index that breaks a rule above.

    Differentiable in tensors, values and weights; the gradient of a weight, the sum of value * gradient over the channels of all
    tensors, has a fixed order. Deterministic, no atomics: of a token that a row names twice it is not defined which value it gets
    (`debug_checks` looks).

    Example:
        >>> import torch, tokensieve as ts
        >>> x, index = torch.zeros(1, 4, 2), torch.tensor([[1, 3]])
        >>> ts.scatter_tokens(x, index, torch.ones(1, 2, 2), mode="add", weights=torch.tensor([[0.5, 2.0]]))
        tensor([[[0.0000, 0.0000],
                 [0.5000, 0.5000],
                 [0.0000, 0.0000],
                 [2.0000, 2.0000]]])
    """
    single = isinstance(tensors, Tensor)
    items: Any = [tensors] if single else tensors
    given: Any = [values] if single else values
    try:
        if _debug.enabled and _debug.readable(index):
            _debug.indices("scatter_tokens", index, items[0].shape[1])
        differentiable = (*items, *given) if weights is None else (*items, *given, weights)
        dense = weights if weights is None or weights.is_contiguous() else weights.contiguous()
        out = _autograd.call(_op, differentiable, items, index, given, MODES[mode], dense)
    except Exception as error:
        explain(error, _explain, items, index, given, mode, weights)
    return out[0] if single else tuple(out)


def _explain(tensors: Any, index: Any, values: Any, mode: Any, weights: Any) -> None:
    check_scatter(tensors, index, values, mode, weights)
    if index.device.type == "cpu":
        _debug.positions("scatter_tokens", index, tensors[0].shape[1])


def check_scatter(tensors: Any, index: Any, values: Any, mode: Any, weights: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "scatter_tokens"
    _checks.option(op, "mode", mode, {"replace": 0, "add": 1})
    _checks.tensor(op, "index", index, 2, "(B, K)", (torch.int64,))
    _checks.contiguous_last(op, "index", index)
    if isinstance(tensors, Sequence) and len(tensors) and isinstance(tensors[0], Tensor) and tensors[0].dim() >= 2:
        N = tensors[0].shape[1]
    else:
        N = 0
    _checks.token_tensors(op, tensors, index.shape[0], N, "index", index)
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        _checks.bad_type(op, f"values must be a sequence of tensors, got {type(values).__name__}")
    if len(values) != len(tensors):
        _checks.bad_value(op, f"values must hold {len(tensors)} tensors, got {len(values)}")
    for i, (t, v) in enumerate(zip(tensors, values, strict=True)):
        if mode == "add":
            _checks.tensor(op, f"tensors[{i}]", t, dtypes=FLOATS)
        _checks.tensor(op, f"values[{i}]", v, dtypes=(t.dtype,))
        _checks.exact_shape(op, f"values[{i}]", v, (t.shape[0], index.shape[1], *t.shape[2:]), "(B, K, ...)")
        _checks.same_device(op, f"values[{i}]", v, "index", index)
        if not _checks.segments_of_contiguous(v):
            _checks.bad_value(
                op,
                f"values[{i}] must have at most one strided axis over contiguous elements after (B, K), "
                f"got shape {_checks.shape(v)} with strides {tuple(v.stride())}; call .contiguous()",
            )
    if weights is not None:
        if mode != "add":
            _checks.bad_value(op, f"weights goes with mode 'add', got mode {mode!r}")
        _checks.tensor(op, "weights", weights, 2, "(B, K)", (torch.float32,))
        _checks.exact_shape(op, "weights", weights, tuple(index.shape), "(B, K)")
        _checks.same_device(op, "weights", weights, "index", index)


@torch.library.register_fake("tokensieve::scatter_tokens")
def _fake(tensors: Sequence[Tensor], index: Tensor, values: Sequence[Tensor], add: bool, weights: Tensor | None) -> list[Tensor]:
    check_scatter(tensors, index, values, "add" if add else "replace", weights)
    return [t.new_empty(t.shape) for t in tensors]


@torch.library.register_fake("tokensieve::scatter_tokens_backward")
def _fake_backward(
    grads: Sequence[Tensor], index: Tensor, values: Sequence[Tensor], weights: Tensor, values_wanted: bool, weights_wanted: bool
) -> tuple[list[Tensor], Tensor]:
    shape = weights.shape if weights_wanted else (weights.shape[0], 0)
    return [v.new_empty(v.shape) for v in values] if values_wanted else [], weights.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, index, values, add, weights = inputs
    ctx.add = add
    ctx.shapes = [v.shape for v in values]
    ctx.floating = [v.is_floating_point() or v.is_complex() for v in values]
    ctx.save_for_backward(index, weights, *(values if weights is not None else ()))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    index, weights, *values = ctx.saved_tensors
    wanted = [any(n) if isinstance(n, Sequence) else n for n in ctx.needs_input_grad]
    to_tensors, to_values, to_weights = wanted[0], wanted[2], wanted[4]
    used = [i for i, g in enumerate(grads) if g is not None and ctx.floating[i]]
    dense: list[Any] = [grads[i].contiguous() for i in used]  # type: ignore[union-attr]
    of_tensors, of_values, of_weights = [None] * len(grads), [None] * len(grads), None
    if used and to_tensors:
        rest = dense if ctx.add else _op(dense, index, [g.new_zeros(ctx.shapes[i]) for i, g in zip(used, dense, strict=True)], False, None)
        _place(of_tensors, used, rest)
    if used and weights is None and to_values:
        _place(of_values, used, _gather(dense, index))
    elif used and weights is not None and (to_values or to_weights):
        found, of_weights = _weighted(dense, index, [values[i] for i in used], weights, to_values, to_weights)
        _place(of_values, used, found)
    return of_tensors, None, of_values, None, of_weights


def _place(into: list[Any], at: list[int], found: Sequence[Tensor]) -> None:
    for i, g in zip(at, found, strict=False):
        into[i] = g


def _weighted(
    grads: list[Tensor], index: Tensor, values: list[Tensor], weights: Tensor, of_values: bool, of_weights: bool
) -> tuple[Sequence[Tensor], Tensor | None]:
    if not torch.is_grad_enabled():
        found, total = _op_backward(grads, index, values, weights, of_values, of_weights)
        return found, total if of_weights else None
    rows = _gather(grads, index)  # create_graph=True: in steps that autograd knows
    total = sum(
        (r.float() * v.float()).flatten(2).sum(2) if r.dim() > 2 else r.float() * v.float() for r, v in zip(rows, values, strict=True)
    )
    return [(r.float() * weights.view(*weights.shape, *[1] * (r.dim() - 2))).to(r.dtype) for r in rows], total if of_weights else None


torch.library.register_autograd("tokensieve::scatter_tokens", _backward, setup_context=_setup_context)
