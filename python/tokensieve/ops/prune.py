"""prune_tokens: score, select and gather in the fewest launches; the hot path of FastV, PyramidDrop and FasterVLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _autograd, _checks, _debug
from ._checks import NORMALIZATIONS, REDUCTIONS, ROW_REDUCTIONS, explain
from .gather import scatter_gradients
from .score import Reduction, RowReduction, check_scores, score_arguments

_op = torch.ops.tokensieve.prune_tokens.default


class PruneResult(NamedTuple):
    """What a prune step gives.

    Attributes:
        tensors: tuple of (B, K, ...) gathered tensors.
        index: (B, K) int64, absolute kept positions, ascending.
        scores: (B, R) float32, the scores of key_range.
    """

    tensors: tuple[Tensor, ...]
    index: Tensor  # type: ignore[assignment]  # shadows tuple.index, on purpose
    scores: Tensor


def prune_tokens(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    k: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    lse: Tensor | None = None,
    key_range: tuple[int, int] | None = None,
    normalize: str = "row",
    query_reduction: RowReduction = "mean",
    head_reduction: Reduction = "mean",
    row_weights: Tensor | None = None,
    query_positions: Tensor | None = None,
    keep_outside: bool = True,
) -> PruneResult:
    """Scores the keys of a range, keeps the k best and everything outside, and gathers the tensors.

    Args:
        query: (B, H, L, D), the few rows that rank, as in `attention_scores`.
        key: (B, Hkv, N, D).
        tensors: sequence of (B, N, ...) tensors to shorten, as in `gather_tokens`; at least one.
        k: tokens to keep within key_range, 0 <= k <= R.
        scale, causal, bias, lse, key_range, normalize, row_weights, query_positions: as in `attention_scores`.
        query_reduction: "mean", "sum", "max" or "visible_mean".
        head_reduction: "mean", "sum" or "max".
        keep_outside: also keep every token outside key_range (text, system prompt); False drops them (a CLS token).

    Returns:
        PruneResult(tensors, index, scores); K = k + (N - R where keep_outside, else 0).

    Raises:
        TypeError, ValueError: as the three ops that it equals.

    Equals `attention_scores`, `select_topk` and `gather_tokens` in a row, bit for bit; ties go to the lowest position. Differentiable in
    the tensors; scores carry no gradient. On a GPU two launches; one more where the logits do not fit the shared memory of a cluster,
    and one for every 8 tensors after the first 8.

    Source: FastV (arXiv 2403.06764, section 4); PyramidDrop (arXiv 2410.17247, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> key = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0]).view(1, 1, 5, 1)
        >>> hidden = torch.arange(5.0).view(1, 5, 1)
        >>> kept = ts.prune_tokens(torch.ones(1, 1, 1, 1), key, [hidden], 2, key_range=(1, 4))
        >>> kept.index
        tensor([[0, 1, 3, 4]])
    """
    options = (scale, causal, bias, lse, key_range, normalize, query_reduction, head_reduction, row_weights, query_positions)
    try:
        arguments = score_arguments(query, key, *options)
        if isinstance(k, bool):
            raise TypeError("k")  # C++ would read 0 or 1; explained below
        out, index, scores = _autograd.call(_op, tensors, query, key, tensors, k, *arguments, keep_outside)
    except Exception as error:
        explain(error, check_prune, query, key, tensors, k, options, keep_outside)
    if _debug.enabled and _debug.readable(scores):
        _debug.selection("prune_tokens", scores, None, 0)
    return PruneResult(tuple(out), index, scores)


def check_prune(query: Any, key: Any, tensors: Any, k: Any, options: tuple[Any, ...], keep_outside: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "prune_tokens"
    check_scores(op, query, key, *options)
    key_range, query_reduction, head_reduction = options[4], options[6], options[7]
    for name, value, known in (("query_reduction", query_reduction, ROW_REDUCTIONS), ("head_reduction", head_reduction, REDUCTIONS)):
        if value is None:
            _checks.bad_value(op, f"{name} must be one of {', '.join(repr(a) for a in known if a)}, got None")
    start, end = key_range or (0, key.shape[2])
    _checks.integer(op, "k", k)
    if not 0 <= k <= end - start:
        _checks.bad_value(op, f"k must be in [0, R={end - start}], got {k}")
    if not isinstance(keep_outside, bool):
        _checks.bad_type(op, f"keep_outside must be a bool, got {type(keep_outside).__name__}")
    _checks.token_tensors(op, tensors, key.shape[0], key.shape[2], "query", query)


@torch.library.register_fake("tokensieve::prune_tokens")
def _fake(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    k: int,
    scale: float | None,
    causal: bool,
    bias: Tensor | None,
    lse: Tensor | None,
    row_weights: Tensor | None,
    query_positions: Tensor | None,
    range_begin: int,
    range_end: int,
    normalize: int,
    query_reduction: int,
    head_reduction: int,
    keep_outside: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    rule, reductions = tuple(NORMALIZATIONS)[normalize], (tuple(ROW_REDUCTIONS)[query_reduction], tuple(REDUCTIONS)[head_reduction])
    options = (scale, causal, bias, lse, (range_begin, range_end), rule, *reductions)
    check_prune(query, key, tensors, k, (*options, row_weights, query_positions), keep_outside)
    B, N, R = key.shape[0], key.shape[2], range_end - range_begin
    K = k + (N - R if keep_outside else 0)
    out = [t.new_empty((B, K, *t.shape[2:])) for t in tensors]
    return out, query.new_empty((B, K), dtype=torch.int64), query.new_empty((B, R), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = inputs[2]
    _, index, scores = output
    ctx.mark_non_differentiable(index, scores)
    ctx.save_for_backward(index)
    ctx.N = tensors[0].shape[1]
    ctx.floating = [t.is_floating_point() or t.is_complex() for t in tensors]


def _backward(ctx: Any, grads: list[Tensor | None], _index: Any, _scores: Any) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return None, None, scatter_gradients(grads, ctx.floating, index, ctx.N), *([None] * 13)


torch.library.register_autograd("tokensieve::prune_tokens", _backward, setup_context=_setup_context)
