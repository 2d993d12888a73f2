"""select_samples: tokens sampled evenly along the cumulative distribution of their scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import explain
from .ragged import Selection

_op = torch.ops.tokensieve.select_samples.default


def select_samples(scores: Tensor, points: int | Tensor, *, capacity: int | None = None, candidates: Tensor | None = None) -> Selection:
    """The tokens that evenly spread points of a row's cumulative score distribution fall on (inverse transform sampling).

    Args:
        scores: (B, N), float32, float16 or bfloat16; rows may be strided, columns are contiguous. They need not sum to 1.
        points: how many points R, spread by ATS's rule; or the points themselves, (B, R) float32.
        capacity: width of the output (a Python int), default R, which always suffices.
        candidates: (B, N) bool, False = does not exist.

    Returns:
        Selection(index, counts, overflow): the picked tokens, each once, in ascending score order. Where a count exceeds the capacity,
        overflow says so and the best `capacity` picks are given.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, number, device or stride that breaks a rule above.

    With the n candidates in ascending order (equal scores by position) and C_j their running mass, F_j = (C_j - C_0) / (C_(n-1) - C_0)
    in float32; a point y picks the first j with the least |y - F_j|. ATS's points are y_t = s + (1 - s) * t / (R - 1) with s the least
    F_j > 0. Masses are those of `select_mass`: a score that is not positive (or NaN) has none, +inf has all. The weakest token is picked
    only by points of your own. A row without mass above its weakest token (one candidate, say) picks nothing; nor does a NaN point.
    Deterministic, the same on every back end (integer sums). No host sync.

    Source: ATS (arXiv 2111.15667, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.select_samples(torch.tensor([[0.1, 0.4, 0.1, 0.3, 0.1]]), 3).index
        tensor([[2, 3, 1]])
    """
    try:
        _checks.no_bools(points, capacity)
        given = (points.shape[1], points.contiguous()) if isinstance(points, Tensor) else (points, None)
        index, counts, overflow = _op(scores, *given, given[0] if capacity is None else capacity, candidates)
    except Exception as error:
        explain(error, check_samples, scores, points, capacity, candidates)
    if _debug.enabled and _debug.readable(scores):
        _debug.selection("select_samples", scores, None, 0)
    return Selection(index, counts, overflow)


def check_samples(scores: Any, points: Any, capacity: Any, candidates: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "select_samples"
    _checks.tensor(op, "scores", scores, 2, "(B, N)", _checks.FLOATS)
    _checks.contiguous_last(op, "scores", scores)
    if isinstance(points, Tensor):
        _checks.tensor(op, "points", points, 2, "(B, R)", (torch.float32,))
        if points.shape[0] != scores.shape[0]:
            _checks.bad_value(op, f"points must be (B={scores.shape[0]}, R), got shape {_checks.shape(points)}")
        _checks.same_device(op, "points", points, "scores", scores)
    else:
        _checks.integer(op, "points", points)
        if points < 0:
            _checks.bad_value(op, f"points must be at least 0, got {points}")
    if capacity is not None:
        _checks.integer(op, "capacity", capacity)
        if capacity < 0:
            _checks.bad_value(op, f"capacity must be at least 0, got {capacity}")
    if candidates is not None:
        _checks.token_mask(op, "candidates", candidates, "scores", scores)


@torch.library.register_fake("tokensieve::select_samples")
def _fake(scores: Tensor, count: int, points: Tensor | None, capacity: int, candidates: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    check_samples(scores, count if points is None else points, capacity, candidates)
    B = scores.shape[0]
    counts = scores.new_empty((B,), dtype=torch.int64)
    return scores.new_empty((B, capacity), dtype=torch.int64), counts, scores.new_empty((B,), dtype=torch.bool)
