"""pool_scores: scores smoothed over neighbours, so that a selection keeps runs of tokens."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional

from . import _checks

_KINDS = {"avg": 0, "max": 1}


def pool_scores(scores: Tensor, width: int, kind: Literal["avg", "max"] = "avg") -> Tensor:
    """Average or maximum of every score and its neighbours; the length stays.

    Args:
        scores: (..., N), floating point.
        width: odd number of neighbours, the token itself among them; 1 changes nothing.
        kind: "avg" (beyond the ends lie zeros, which count, as in SnapKV's avg_pool1d) or "max" (nothing lies there).

    Returns:
        A tensor of the shape and dtype of scores.

    Raises:
        TypeError: scores is no floating tensor, or width no int.
        ValueError: width is even or below 1, or kind is unknown.

    Plain torch: differentiable. SnapKV ranks the keys before a window of the last queries, ZipVL takes the last and some random rows as
    probes: both are `attention_scores` of these rows (`query_positions` says where they stand), then this.

    Source: SnapKV (arXiv 2404.14469); probe rows: ZipVL (arXiv 2410.08584).

    Example:
        >>> import torch, tokensieve as ts
        >>> query, key = torch.randn(1, 8, 64, 32), torch.randn(1, 2, 64, 32)
        >>> window = query[:, :, -16:]  # SnapKV: the last 16 queries rank the keys before them
        >>> votes = ts.attention_scores(window, key, causal=True, key_range=(0, 48), query_reduction="sum", head_reduction=None)
        >>> ts.select_topk(ts.ops.pool_scores(votes, 7).mean(1), 12).shape
        torch.Size([1, 12])
        >>> at = torch.tensor([[3, 17, 40, 63]])  # ZipVL: a few probe rows
        >>> ts.attention_scores(query[:, :, at[0]], key, query_positions=at, query_reduction="visible_mean").shape
        torch.Size([1, 64])
        >>> ts.ops.pool_scores(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), 3)
        tensor([[1., 1., 1., 0.]])
    """
    _check("pool_scores", scores, width, kind)
    if width == 1 or scores.shape[-1] == 0:
        return scores.clone()
    rows = scores.reshape(-1, 1, scores.shape[-1])
    pool = functional.avg_pool1d if kind == "avg" else functional.max_pool1d
    return pool(rows, width, stride=1, padding=width // 2).view(scores.shape)


def _check(op: str, scores: Any, width: Any, kind: Any) -> None:
    _checks.tensor(op, "scores", scores)
    if not scores.is_floating_point():
        _checks.bad_type(op, f"scores must be floating point, got {str(scores.dtype).removeprefix('torch.')}")
    if scores.dim() == 0:
        _checks.bad_value(op, "scores must be (..., N), got shape ()")
    _checks.integer(op, "width", width)
    if width < 1 or width % 2 == 0:
        _checks.bad_value(op, f"width must be odd and at least 1, got {width}")
    _checks.option(op, "kind", kind, _KINDS)
