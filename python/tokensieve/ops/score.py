"""attention_scores: how much attention every key receives from some or all query rows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from . import _autograd, _checks, score_grad  # noqa: F401  (the last one registers the gradients)
from ._checks import ACTIVATIONS, NORMALIZATIONS, REDUCTIONS, ROW_REDUCTIONS, explain

Reduction = Literal["mean", "sum", "max"] | None
RowReduction = Literal["mean", "sum", "max", "visible_mean"] | None
_op = torch.ops.tokensieve.attention_scores.default
MAX_CUDA_DIM = 2048  # kMaxDim of csrc/score/score_args.h: eight query rows of a pass lie in shared memory


def attention_scores(
    query: Tensor,
    key: Tensor,
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
    activation: str = "softmax",
    head_weights: Tensor | None = None,
    accumulate: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention mass per key: softmax(Q K^T) reduced over rows and heads, without the L x N map.

    Args:
        query: (B, H, L, D), float32, float16 or bfloat16; any strides with a contiguous last dimension; D up to 2048 on CUDA. The CLS
            row, the last token, the text rows, or all tokens.
        key: (B, Hkv, N, D), dtype of query; query head h reads key head h // (H // Hkv).
        scale: factor of the logits; D ** -0.5 where None.
        causal: row l sees keys <= N - L + l (the rows are the last L tokens), or keys <= query_positions[b, l].
        bias: broadcastable to (B, H, L, N) with 4 dimensions; a float kind is added to the logits, bool means "visible" (padding masks).
        lse: (B, H, L) float32, given natural-log normaliser of every row; computed where None.
        key_range: (start, end), the keys that are scored and returned; all N where None.
        normalize: "row", softmax over all visible keys, or "range", over the visible keys of key_range.
        query_reduction: "mean", "sum", "max", "visible_mean" or None over the L rows; it comes first. "visible_mean" divides the sum of
            every key by the number of rows that may see it (causal, query_positions, bias), so that early keys gain nothing.
        head_reduction: "mean", "sum", "max" or None over the H heads, after the rows.
        row_weights: (B, L) float32 factor of every row for "mean" (which divides by their sum), "sum" and "visible_mean" (which divides by
            the sum of the rows that see the key).
        query_positions: (B, L) int64, last key that a row sees; -1 marks an unused row: its probabilities are zero, "mean" does not count
            it and "max" ignores it.
        activation: "softmax"; or "logit", the logits themselves, or "sigmoid" of them: then a key that a row does not see counts as 0, and
            "max" over rows passes it by.
        head_weights: (B, H) float32 factor of every head for "mean" (which divides by their sum) and "sum"; a head of weight 0 is left out.
        accumulate: float32 in the shape of the scores; they are added to it (a new tensor is returned).
        return_lse: also return the row normalisers, (B, H, L) float32, -inf where a row sees nothing; with normalize="range" they cover
            key_range alone.

    Returns:
        float32 (B, R), with R = end - start; (B, H, R) without head reduction, (B, L, R) without row reduction, (B, H, L, R) without
        either. With return_lse, the pair (scores, lse).

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, range, option, device or stride that breaks a rule above.

    Accumulates in float32 in a fixed order: the same call gives the same bits on any number of threads and on every CPU level. A row that
    sees nothing gives zeros; a softmax row with a NaN logit is NaN on every key that it sees. Memory is O(B H N), whatever L.

    Differentiable in query, key and accumulate where no reduction is "max" (no second derivatives; a given lse and the other arguments are
    constants). The backward pass takes O(B H L N) memory: it is meant for the few rows of EViT and DynamicViT.

    Source: FastV (arXiv 2403.06764, section 4), PyramidDrop (arXiv 2410.17247, section 3.2), FasterVLM (arXiv 2412.01818, section 3).

    Example:
        >>> import torch, tokensieve as ts
        >>> query, key = torch.zeros(1, 2, 1, 4), torch.randn(1, 2, 5, 4)
        >>> ts.attention_scores(query, key)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000, 0.2000]])
    """
    options = (scale, causal, bias, lse, key_range, normalize, query_reduction, head_reduction, row_weights, query_positions)
    try:
        heads = head_weights if head_weights is None else head_weights.contiguous()
        before = accumulate if accumulate is None else accumulate.contiguous()
        arguments = (*score_arguments(query, key, *options), ACTIVATIONS[activation], heads, before)
        differentiable = (query, key, bias, lse, row_weights, head_weights, accumulate)
        scores, row_lse = _autograd.call(_op, differentiable, query, key, *arguments)
    except Exception as error:
        explain(error, check_attention_scores, query, key, options, activation, head_weights, accumulate)
    return (scores, row_lse) if return_lse else scores


def score_arguments(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    causal: bool,
    bias: Tensor | None,
    lse: Tensor | None,
    key_range: tuple[int, int] | None,
    normalize: str,
    query_reduction: RowReduction,
    head_reduction: Reduction,
    row_weights: Tensor | None,
    query_positions: Tensor | None,
) -> tuple[Any, ...]:
    """The eleven C++ arguments after query and key (of attention_scores and prune_tokens)."""
    start, end = (0, key.shape[2]) if key_range is None else key_range
    if isinstance(start, bool) or isinstance(end, bool):
        raise TypeError("key_range")  # C++ would read 0 or 1; the callers explain
    return (
        scale,
        causal,
        bias,
        lse if lse is None else lse.contiguous(),
        row_weights if row_weights is None else row_weights.contiguous(),
        query_positions if query_positions is None else query_positions.contiguous(),
        start,
        end,
        NORMALIZATIONS[normalize],
        ROW_REDUCTIONS[query_reduction],
        REDUCTIONS[head_reduction],
    )


def check_scores(
    op: str,
    query: Any,
    key: Any,
    scale: Any,
    causal: Any,
    bias: Any,
    lse: Any,
    key_range: Any,
    normalize: Any,
    query_reduction: Any,
    head_reduction: Any,
    row_weights: Any,
    query_positions: Any,
) -> None:
    """Raises the rule that these arguments break, if any."""
    _checks.tensor(op, "query", query, 4, "(B, H, L, D)", _checks.FLOATS)
    _checks.tensor(op, "key", key, 4, "(B, Hkv, N, D)", (query.dtype,))
    B, H, L, D = query.shape
    Hkv, N = key.shape[1], key.shape[2]
    if key.shape[0] != B or key.shape[3] != D:
        _checks.bad_value(op, f"key must be (B={B}, Hkv, N, D={D}), got shape {_checks.shape(key)}")
    if H > 0 and (Hkv == 0 or H % Hkv != 0):
        _checks.bad_value(op, f"query heads must be a multiple of key heads, got H={H}, Hkv={Hkv}")
    _checks.same_device(op, "key", key, "query", query)
    _checks.contiguous_last(op, "query", query)
    _checks.contiguous_last(op, "key", key)
    if query.device.type == "cuda" and D > MAX_CUDA_DIM and query.numel() > 0:
        _checks.bad_value(op, f"query must have D <= {MAX_CUDA_DIM} on CUDA, got D={D}")
    if scale is None and D == 0:
        _checks.bad_value(op, "scale must be given when D = 0, got None")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        _checks.bad_type(op, f"scale must be a float or None, got {type(scale).__name__}")
    if not isinstance(causal, bool):
        _checks.bad_type(op, f"causal must be a bool, got {type(causal).__name__}")
    if key_range is not None:
        _checks.key_range(op, key_range, N)
    _checks.option(op, "normalize", normalize, NORMALIZATIONS)
    _checks.option(op, "query_reduction", query_reduction, ROW_REDUCTIONS)
    _checks.option(op, "head_reduction", head_reduction, REDUCTIONS)
    if bias is not None:
        _check_bias(op, bias, query, (B, H, L, N))
    rows = ((lse, "lse", torch.float32, (B, H, L), "(B, H, L)"), (row_weights, "row_weights", torch.float32, (B, L), "(B, L)"))
    for value, name, dtype, expected, layout in (*rows, (query_positions, "query_positions", torch.int64, (B, L), "(B, L)")):
        if value is not None:
            _checks.tensor(op, name, value, len(expected), layout, (dtype,))
            _checks.exact_shape(op, name, value, expected, layout)
            _checks.same_device(op, name, value, "query", query)
    if row_weights is not None and query_reduction not in ("mean", "sum", "visible_mean"):
        _checks.bad_value(op, f"row_weights needs query_reduction 'mean', 'sum' or 'visible_mean', got {query_reduction!r}")


def check_attention_scores(query: Any, key: Any, options: tuple[Any, ...], activation: Any, head_weights: Any, accumulate: Any) -> None:
    """check_scores, and the rules of the arguments that prune_tokens does not take."""
    op = "attention_scores"
    check_scores(op, query, key, *options)
    lse, key_range, query_reduction, head_reduction = options[3], options[4], options[6], options[7]
    _checks.option(op, "activation", activation, ACTIVATIONS)
    if activation != "softmax" and lse is not None:
        _checks.bad_value(op, f"lse needs activation 'softmax', got {activation!r}")
    if head_weights is not None:
        _check_dense(op, "head_weights", head_weights, query.shape[:2], "(B, H)", query)
        if head_reduction not in ("mean", "sum"):
            _checks.bad_value(op, f"head_weights needs head_reduction 'mean' or 'sum', got {head_reduction!r}")
    if accumulate is not None:
        start, end = key_range or (0, key.shape[2])
        wanted = score_shape(query, end - start, ROW_REDUCTIONS[query_reduction], REDUCTIONS[head_reduction])
        _check_dense(op, "accumulate", accumulate, wanted, "of the shape of the scores", query)


def _check_dense(op: str, name: str, value: Any, expected: tuple[int, ...], layout: str, query: Tensor) -> None:
    _checks.tensor(op, name, value, dtypes=(torch.float32,))
    _checks.exact_shape(op, name, value, expected, layout)
    _checks.same_device(op, name, value, "query", query)


def _check_bias(op: str, bias: Any, query: Tensor, full: tuple[int, ...]) -> None:
    _checks.tensor(op, "bias", bias, 4, "broadcastable to (B, H, L, N)", (*_checks.FLOATS, torch.bool))
    _checks.same_device(op, "bias", bias, "query", query)
    if any(got not in (1, wanted) for got, wanted in zip(bias.shape, full, strict=True)):
        _checks.bad_value(op, f"bias must be broadcastable to (B, H, L, N) = {full}, got shape {_checks.shape(bias)}")
    if bias.stride(-1) != 0:  # 0: expanded over the keys
        _checks.contiguous_last(op, "bias", bias)


def score_shape(query: Tensor, R: int, query_reduction: int, head_reduction: int) -> tuple[int, ...]:
    """Shape of the scores: every reduced axis is gone."""
    B, H, L, _ = query.shape
    return (B, *((H,) if head_reduction == 0 else ()), *((L,) if query_reduction == 0 else ()), R)


@torch.library.register_fake("tokensieve::attention_scores")
def _fake(
    query: Tensor,
    key: Tensor,
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
    activation: int,
    head_weights: Tensor | None,
    accumulate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    reductions = (tuple(ROW_REDUCTIONS)[query_reduction], tuple(REDUCTIONS)[head_reduction])
    options = (scale, causal, bias, lse, (range_begin, range_end), tuple(NORMALIZATIONS)[normalize], *reductions, row_weights)
    check_attention_scores(query, key, (*options, query_positions), tuple(ACTIVATIONS)[activation], head_weights, accumulate)
    scores = query.new_empty(score_shape(query, range_end - range_begin, query_reduction, head_reduction), dtype=torch.float32)
    return scores, query.new_empty(query.shape[:3], dtype=torch.float32)
