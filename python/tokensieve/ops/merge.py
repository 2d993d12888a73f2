"""merge_tokens, unmerge_tokens and the maps of merged tokens: what a matching (`MergePlan`) decided, applied to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, overload

import torch
from torch import Tensor

from . import _autograd, _checks, _debug
from ._checks import FLOATS, explain

_op = torch.ops.tokensieve.merge_tokens.default
_op_backward = torch.ops.tokensieve.merge_tokens_backward.default
_unmerge = torch.ops.tokensieve.unmerge_tokens.default
_unmerge_backward = torch.ops.tokensieve.unmerge_tokens_backward.default

MODES = {"sum": 0, "mean": 1, "weighted": 2, "amax": 3, "mlerp": 4}
INTEGERS = (torch.int32, torch.int64)


class Plan(Protocol):
    """What merging needs of a plan: `MergePlan` has it, and so has any object with these two tensors."""

    @property
    def index(self) -> Tensor: ...
    @property
    def inverse(self) -> Tensor: ...


class Merged(NamedTuple):
    """What `merge_tokens` returns.

    Attributes:
        tensors: (B, M, ...) contiguous, one for one: a tensor for a tensor, a tuple for a sequence.
        size: (B, M) float32, how many tokens an output row stands for: the sum of its tokens' sizes.
        log_size: (B, M) float32, log(size), the key bias of proportional attention; -inf where size <= 0.
    """

    tensors: Any
    size: Tensor
    log_size: Tensor


def merge_tokens(tensors: Tensor | Sequence[Tensor], plan: Plan, *, size: Tensor | None = None, mode: str = "mean") -> Merged:
    """The tokens of every output row of a plan as one token, in one pass over several tensors.

    A gather over the output rows: a row of one token is a copy of its bits, any other is accumulated in float32 in a fixed order, the
    row's own token first, then the others by ascending token id, and rounded once. Sums beyond a half precision dtype's range become
    inf when they are stored.

    Args:
        tensors: one (B, N, ...) tensor or a sequence of them, any widths, laid out as in `gather_tokens`; float32, float16, bfloat16,
            for "sum" and "amax" also int32 and int64.
        plan: with `index` (B, M) int64, the token that an output row stands on, and `inverse` (B, N) int64, the output row of a token,
            -1 for one that is dropped: it contributes nothing.
        size: (B, N) or (B, N, 1) float32, how many tokens a token stands for; None = 1 each.
        mode: "mean", "sum" and "amax" of the row's tokens; "weighted", sum(size * x) / sum(size), 0 where the sizes of several tokens
            add up to 0; "mlerp", mean * (largest norm / norm of the row's own token), the plain mean where that norm is 0.

    Returns:
        Merged(tensors, size, log_size).

    Raises:
        TypeError: a dtype or a Python type that is not taken, an integer tensor in a mode that divides.
        ValueError: a shape, device, stride or option that breaks a rule above, a plan of another number of tokens, (CPU) a plan whose
            index and inverse do not belong together.

    Differentiable in the tensors, in every mode ("amax": to the lowest token id among equal values); not in size. Deterministic, no
    atomics.

    Sources: "weighted" is ToMe (arXiv 2210.09461, section 3), "mean" DiffRate (2305.17997) and AIM (2412.03248), "mlerp" ToFu (2312.01026).

    Example:
        >>> import torch, tokensieve as ts
        >>> from types import SimpleNamespace
        >>> plan = SimpleNamespace(index=torch.tensor([[1, 2]]), inverse=torch.tensor([[0, 0, 1]]))  # token 0 goes into token 1
        >>> x = torch.tensor([[[0.0], [3.0], [5.0]]])
        >>> ts.merge_tokens(x, plan, size=torch.tensor([[2.0, 1.0, 1.0]]), mode="weighted")
        Merged(tensors=tensor([[[1.],
                 [5.]]]), size=tensor([[3., 1.]]), log_size=tensor([[1.0986, 0.0000]]))
    """
    single = isinstance(tensors, Tensor)
    items: Any = [tensors] if single else tensors
    try:
        index, inverse = plan.index, plan.inverse
        dense = _dense_size(size)
        if _debug.enabled and _debug.readable(inverse):
            _debug_plan(index, inverse, size)
        out, total, log_total = _autograd.call(_op, items, items, index, inverse, dense, MODES[mode])
    except Exception as error:
        explain(error, _explain, items, plan, size, mode)
    return Merged(out[0] if single else tuple(out), total, log_total)


def _dense_size(size: Any) -> Any:
    if size is None:
        return None
    flat = size.squeeze(2) if size.dim() == 3 else size
    return flat if flat.is_contiguous() else flat.contiguous()


def _plan_values(index: Tensor, inverse: Tensor) -> None:
    """Raises where index and inverse are out of range or do not belong together."""
    op, M = "merge_tokens", index.shape[1]
    _debug.positions(op, index, inverse.shape[1])
    _debug.rows(op, "plan.inverse", inverse, M, "M")
    if not inverse.shape[1]:
        return
    back = inverse.gather(1, index.clamp(min=0))
    wrong = (back != torch.arange(M, device=index.device)) & (index >= 0)
    if bool(wrong.any()):
        b, row = (int(i) for i in wrong.nonzero()[0])
        token, other = int(index[b, row]), int(back[b, row])
        _checks.bad_value(op, f"plan must have inverse[index[row]] == row, got token {token} of row {row} in {other}")


def _debug_plan(index: Tensor, inverse: Tensor, size: Tensor | None) -> None:
    _plan_values(index, inverse)
    if size is not None and bool((size <= 0).any()):
        _checks.bad_value("merge_tokens", f"size must be greater than 0 (debug check), got {float(size.min())}")


def _explain(tensors: Any, plan: Any, size: Any, mode: Any) -> None:
    _check_plan("merge_tokens", plan)
    check_merge(tensors, plan.index, plan.inverse, size, mode)
    if plan.index.device.type == "cpu":
        _plan_values(plan.index, plan.inverse)


def _check_plan(op: str, plan: Any) -> None:
    for name in ("index", "inverse"):
        if not hasattr(plan, name):
            _checks.bad_type(op, f"plan must be a MergePlan (with index and inverse), got {type(plan).__name__}")


def check_merge(tensors: Any, index: Any, inverse: Any, size: Any, mode: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "merge_tokens"
    _checks.option(op, "mode", mode, dict.fromkeys(("mean", "weighted", "sum", "amax", "mlerp"), 0))
    _checks.tensor(op, "plan.index", index, 2, "(B, M)", (torch.int64,))
    _checks.tensor(op, "plan.inverse", inverse, 2, "(B, N)", (torch.int64,))
    _checks.contiguous_last(op, "plan.index", index)
    _checks.contiguous_last(op, "plan.inverse", inverse)
    B, N = inverse.shape
    if index.shape[0] != B:
        _checks.bad_value(op, f"plan.index must be (B={B}, M), got shape {_checks.shape(index)}")
    _checks.same_device(op, "plan.index", index, "plan.inverse", inverse)
    first = tensors[0] if isinstance(tensors, Sequence) and len(tensors) else None
    if isinstance(first, Tensor) and first.dim() >= 2 and first.shape[1] != N:
        _checks.bad_value(op, f"plan must be of the N={first.shape[1]} tokens of tensors, got one of {N} tokens")
    _checks.token_tensors(op, tensors, B, N, "plan.inverse", inverse)
    dividing = mode not in ("sum", "amax")
    for i, t in enumerate(tensors):
        if dividing and t.dtype in INTEGERS:
            rows = "take their rows with gather_tokens(ids, plan.index)"
            _checks.bad_type(op, f"tensors[{i}] must be float32 or float16 or bfloat16 in mode {mode!r}, got {t.dtype}; {rows}")
        _checks.tensor(op, f"tensors[{i}]", t, dtypes=FLOATS if dividing else (*FLOATS, *INTEGERS))
    if size is not None:
        _checks.tensor(op, "size", size, dtypes=(torch.float32,))
        if tuple(size.shape) not in ((B, N), (B, N, 1)):
            _checks.bad_value(op, f"size must be (B, N) = {(B, N)} or {(B, N, 1)}, got shape {_checks.shape(size)}")
        _checks.same_device(op, "size", size, "plan.inverse", inverse)


@torch.library.register_fake("tokensieve::merge_tokens")
def _fake(tensors: Sequence[Tensor], index: Tensor, inverse: Tensor, size: Tensor | None, mode: int) -> tuple[list[Tensor], Tensor, Tensor]:
    check_merge(tensors, index, inverse, size, list(MODES)[mode])
    total = index.new_empty(index.shape, dtype=torch.float32)
    return [t.new_empty((t.shape[0], index.shape[1], *t.shape[2:])) for t in tensors], total, torch.empty_like(total)


@torch.library.register_fake("tokensieve::merge_tokens_backward")
def _fake_backward(
    grads: Sequence[Tensor],
    tensors: Sequence[Tensor],
    outs: Sequence[Tensor],
    index: Tensor,
    inverse: Tensor,
    size: Tensor | None,
    mode: int,
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in tensors]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, index, inverse, size, mode = inputs
    outs, total, log_total = output
    ctx.mode = mode
    ctx.count = len(tensors)
    ctx.floating = [t.is_floating_point() for t in tensors]
    ctx.mark_non_differentiable(total, log_total)
    kept = (*tensors, *outs) if mode == MODES["amax"] else tensors
    ctx.save_for_backward(index, inverse, size, *kept)


def _backward(ctx: Any, grads: list[Tensor | None], *_: Any) -> tuple[Any, ...]:
    index, inverse, size, *kept = ctx.saved_tensors
    tensors, outs = kept[: ctx.count], kept[ctx.count :]
    used = [i for i, g in enumerate(grads) if g is not None and ctx.floating[i]]
    found: list[Any] = [None] * ctx.count
    if used:
        dense: list[Any] = [grads[i].contiguous() for i in used]  # type: ignore[union-attr]
        values, results = [tensors[i] for i in used], [outs[i] for i in used] if outs else []
        if torch.is_grad_enabled():
            of_tensors = _again(dense, values, results, index, inverse, size, ctx.mode)
        else:
            of_tensors = _op_backward(dense, values, results, index, inverse, size, ctx.mode)
        for i, g in zip(used, of_tensors, strict=True):
            found[i] = g
    return found, None, None, None, None


def _again(
    grads: list[Tensor], tensors: list[Tensor], outs: list[Tensor], index: Tensor, inverse: Tensor, size: Tensor | None, mode: int
) -> list[Tensor]:
    """create_graph=True: all modes but "mlerp" are linear in grads; one call on ones gives the factors."""
    if mode == MODES["mlerp"]:
        _checks.bad_value("merge_tokens", "mode must not be 'mlerp' where gradients of gradients are asked for (create_graph=True)")
    factors = _op_backward(
        [torch.ones_like(g) for g in grads], [t.detach() for t in tensors], [o.detach() for o in outs], index, inverse, size, mode
    )
    return [f * g for f, g in zip(factors, _unmerge(grads, inverse), strict=True)]


torch.library.register_autograd("tokensieve::merge_tokens", _backward, setup_context=_setup_context)


@overload
def unmerge_tokens(x: Tensor, plan: Plan) -> Tensor: ...
@overload
def unmerge_tokens(x: Sequence[Tensor], plan: Plan) -> tuple[Tensor, ...]: ...


def unmerge_tokens(x: Tensor | Sequence[Tensor], plan: Plan) -> Tensor | tuple[Tensor, ...]:
    """The tokens of before a merge, each a copy of the output row that it went to: x[plan.inverse].

    Args:
        x: one (B, M, ...) tensor or a sequence of them, any widths and dtypes, laid out as in `gather_tokens`.
        plan: with `inverse` (B, N) int64 in [-1, M).

    Returns:
        (B, N, ...) contiguous, one for one: a tensor for a tensor, a tuple for a sequence; zeros where inverse is -1.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride or (CPU) row that breaks a rule above.

    Differentiable in x (float32, float16, bfloat16): the gradient is the sum over a row's tokens, in a fixed order.

    Source: ToMe (arXiv 2210.09461) for Stable Diffusion (2303.17604); by the map, so it is right with a distillation token too.

    Example:
        >>> import torch, tokensieve as ts
        >>> from types import SimpleNamespace
        >>> plan = SimpleNamespace(index=torch.tensor([[1, 2]]), inverse=torch.tensor([[0, 0, 1]]))
        >>> ts.unmerge_tokens(torch.tensor([[[1.0], [5.0]]]), plan)
        tensor([[[1.],
                 [1.],
                 [5.]]])
    """
    single = isinstance(x, Tensor)
    items: Any = [x] if single else x
    try:
        out = _autograd.call(_unmerge, items, items, plan.inverse)
    except Exception as error:
        explain(error, _explain_unmerge, items, plan)
    return out[0] if single else tuple(out)


def _explain_unmerge(tensors: Any, plan: Any) -> None:
    _check_plan("unmerge_tokens", plan)
    check_unmerge(tensors, plan.inverse)
    if plan.inverse.device.type == "cpu":
        _debug.rows("unmerge_tokens", "plan.inverse", plan.inverse, tensors[0].shape[1], "M")


def check_unmerge(tensors: Any, inverse: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "unmerge_tokens"
    _checks.tensor(op, "plan.inverse", inverse, 2, "(B, N)", (torch.int64,))
    _checks.contiguous_last(op, "plan.inverse", inverse)
    rows = 0
    if isinstance(tensors, Sequence) and len(tensors) and isinstance(tensors[0], Tensor) and tensors[0].dim() >= 2:
        rows = tensors[0].shape[1]
    _checks.token_tensors(op, tensors, inverse.shape[0], rows, "plan.inverse", inverse)


@torch.library.register_fake("tokensieve::unmerge_tokens")
def _fake_unmerge(tensors: Sequence[Tensor], inverse: Tensor) -> list[Tensor]:
    check_unmerge(tensors, inverse)
    return [t.new_empty((t.shape[0], inverse.shape[1], *t.shape[2:])) for t in tensors]


@torch.library.register_fake("tokensieve::unmerge_tokens_backward")
def _fake_unmerge_backward(grads: Sequence[Tensor], inverse: Tensor, rows: int) -> list[Tensor]:
    return [g.new_empty((g.shape[0], rows, *g.shape[2:])) for g in grads]


def _setup_unmerge(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, inverse = inputs
    ctx.rows = [t.shape[1] for t in tensors]
    ctx.floating = [t.is_floating_point() for t in tensors]
    ctx.save_for_backward(inverse)


def _backward_unmerge(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    (inverse,) = ctx.saved_tensors
    used = [i for i, g in enumerate(grads) if g is not None and ctx.floating[i]]
    found: list[Any] = [None] * len(grads)
    if used:
        dense = [grads[i].contiguous() for i in used]  # type: ignore[union-attr]
        for i, g in zip(used, _unmerge_backward(dense, inverse, ctx.rows[used[0]]), strict=True):
            found[i] = g
    return found, None


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[1])


def _backward_sum(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    return _unmerge([g.contiguous() for g in grads], ctx.saved_tensors[0]), None, None


torch.library.register_autograd("tokensieve::unmerge_tokens", _backward_unmerge, setup_context=_setup_unmerge)
torch.library.register_autograd("tokensieve::unmerge_tokens_backward", _backward_sum, setup_context=_setup_sum)


# ---- where the tokens went --------------------------------------------------------------------------------------------------


def trace_tokens(trace: Tensor, plan: Plan) -> Tensor:
    """Composes a source map with one more plan: where the tokens of the very first layer are now.

    Args:
        trace: (B, N0) int32 or int64, the row that each first token is in before the plan, -1 where it was dropped. Start with
            `torch.arange(N0).expand(B, N0)`.
        plan: with `inverse` (B, N) int64; trace must lie in [-1, N).

    Returns:
        (B, N0) of trace's dtype: inverse[trace], -1 stays -1.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape or device that breaks a rule above.

    Not differentiable. Two such maps replace ToMe's (N, N0) source matrix, which `assignment_matrix` gives on request.

    Example:
        >>> import torch, tokensieve as ts
        >>> from types import SimpleNamespace
        >>> plan = SimpleNamespace(inverse=torch.tensor([[0, 0, 1]]))
        >>> ts.trace_tokens(torch.tensor([[2, 0, 1, -1, 2]], dtype=torch.int32), plan)
        tensor([[ 1,  0,  0, -1,  1]], dtype=torch.int32)
    """
    op = "trace_tokens"
    if not hasattr(plan, "inverse"):
        _checks.bad_type(op, f"plan must be a MergePlan (with inverse), got {type(plan).__name__}")
    inverse = plan.inverse
    _checks.tensor(op, "trace", trace, 2, "(B, N0)", INTEGERS)
    _checks.tensor(op, "plan.inverse", inverse, 2, "(B, N)", (torch.int64,))
    if trace.shape[0] != inverse.shape[0]:
        _checks.bad_value(op, f"plan.inverse must be (B={trace.shape[0]}, N), got shape {_checks.shape(inverse)}")
    _checks.same_device(op, "plan.inverse", inverse, "trace", trace)
    if _debug.enabled and _debug.readable(trace):
        _debug.rows(op, "trace", trace, inverse.shape[1], "N")
    if inverse.shape[1] == 0:
        return torch.full_like(trace, -1)
    return torch.where(trace < 0, -1, inverse.gather(1, trace.long().clamp(min=0)).to(trace.dtype))


def assignment_matrix(trace: Tensor, rows: int) -> Tensor:
    """The 0/1 matrix of a source map: which first tokens an output row stands for (ToMe's source matrix).

    Args:
        trace: (B, N0) int32 or int64, the row of each first token, -1 for none.
        rows: number of output rows.

    Returns:
        (B, rows, N0) float32; a column adds up to 1, or 0 where trace is -1.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape that breaks a rule above, rows < 0.

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.assignment_matrix(torch.tensor([[1, 0, -1]]), 2)
        tensor([[[0., 1., 0.],
                 [1., 0., 0.]]])
    """
    op = "assignment_matrix"
    _checks.tensor(op, "trace", trace, 2, "(B, N0)", INTEGERS)
    _checks.integer(op, "rows", rows)
    if rows < 0:
        _checks.bad_value(op, f"rows must be at least 0, got {rows}")
    return (trace[:, None] == torch.arange(rows, device=trace.device, dtype=trace.dtype)[:, None]).to(torch.float32)
