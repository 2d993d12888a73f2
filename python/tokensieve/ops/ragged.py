"""select_mass, select_threshold: selections whose size depends on the scores, padded to a capacity that the caller names."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import ORDERS, explain

_mass = torch.ops.tokensieve.select_mass.default
_threshold = torch.ops.tokensieve.select_threshold.default


class Selection(NamedTuple):
    """Positions (B, capacity) int64, -1 padded; true counts (B,) int64; overflow (B,) bool: the count is larger than the capacity."""

    index: Tensor  # type: ignore[assignment]  # tuple has a method of that name
    counts: Tensor
    overflow: Tensor


def select_mass(
    scores: Tensor,
    mass: float | Tensor,
    *,
    capacity: int,
    inclusive: str = "reach",
    extra: int = 0,
    min_k: int = 0,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    always_keep: Tensor | None = None,
    order: str = "position",
) -> Selection:
    """The best tokens that together hold a share of a row's mass (top-p), without a sort.

    Args:
        scores: (B, N), float32, float16 or bfloat16; rows may be strided, columns are contiguous.
        mass: share of the row's total in (0, 1]; or (B,) float32, one a row.
        capacity: width of the output, a Python int in [0, N], so no host sync is needed.
        inclusive: "reach", the shortest prefix of the descending order that holds at least the share; or "below", the longest that holds
            at most it.
        extra: tokens kept beyond that prefix.
        min_k, max_k: limits of the count; it is never more than the row's candidates.
        candidates: (B, N) bool, False = does not exist: neither selected nor part of the total.
        always_keep: (B, N) bool, True = comes before every other token, candidate or not; its mass counts.
        order: "position", ascending positions, or "score", descending score.

    Returns:
        Selection(index, counts, overflow). Where a count exceeds the capacity, overflow says so and the best `capacity` tokens are given.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, number, option, device or stride that breaks a rule above.

    A token's mass is its score where that is positive, else (NaN too) 0; +inf takes all. A row without mass keeps nothing by "reach" and
    everything by "below". Ties go to the lowest position. Deterministic, the same on every back end: masses are integers, the score in
    units of 2 ** -40 of the power of two at or below the row's largest, so a sum is off by less than N such units. No host sync. Values of
    a mass tensor outside (0, 1] are read as 0 or 1.

    Source: ZipVL (arXiv 2410.08584, section 4.1); SliME (arXiv 2406.08487) with inclusive="below", extra=1.

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.select_mass(torch.tensor([[0.1, 0.5, 0.05, 0.35]]), 0.8, capacity=3)
        Selection(index=tensor([[ 1,  3, -1]]), counts=tensor([2]), overflow=tensor([False]))
    """
    rows = isinstance(mass, Tensor)
    try:
        _checks.no_bools(mass, capacity, extra, min_k, max_k)
        levels = (1.0, mass.contiguous()) if isinstance(mass, Tensor) else (mass, None)
        below = {"reach": False, "below": True}[inclusive]
        out = _mass(scores, *levels, below, capacity, min_k, max_k, candidates, always_keep, ORDERS[order], extra)
    except Exception as error:
        common = (capacity, min_k, max_k, candidates, always_keep, order)
        explain(error, _check_mass, scores, mass, inclusive, extra, common)
    if _debug.enabled and _debug.readable(scores):
        _debug.selection("select_mass", scores, None, 0)
        if rows:
            _debug.shares("select_mass", mass)  # type: ignore[arg-type]
    return Selection(*out)


def select_threshold(
    scores: Tensor,
    tau: float | Tensor,
    *,
    capacity: int,
    strict: bool = True,
    min_k: int = 0,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    always_keep: Tensor | None = None,
    order: str = "position",
) -> Selection:
    """The tokens of every row whose score is above a threshold.

    Args:
        scores: (B, N), float32, float16 or bfloat16; rows may be strided, columns are contiguous.
        tau: threshold; or (B,) float32, one a row. Compared in float32.
        capacity: width of the output, a Python int in [0, N], so no host sync is needed.
        strict: scores > tau; False: scores >= tau.
        min_k, max_k: limits of the count: the best tokens below the threshold fill up, or only the best above it stay.
        candidates, always_keep, order: as in `select_mass`.

    Returns:
        Selection(index, counts, overflow). Where a count exceeds the capacity, overflow says so and the best `capacity` tokens are given.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, number, option, device or stride that breaks a rule above.

    NaN scores are never above; a NaN threshold keeps only what is always kept. Ties go to the lowest position. Deterministic, no host sync.

    Source: ATP-LLaVA (arXiv 2412.00447, section 3.3); IA-RED^2 (arXiv 2106.12620, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.select_threshold(torch.tensor([[0.1, 0.5, 0.05, 0.35]]), 0.2, capacity=3).index
        tensor([[ 1,  3, -1]])
    """
    try:
        _checks.no_bools(tau, capacity, min_k, max_k)
        levels = (0.0, tau.contiguous()) if isinstance(tau, Tensor) else (tau, None)
        out = _threshold(scores, *levels, strict, capacity, min_k, max_k, candidates, always_keep, ORDERS[order])
    except Exception as error:
        common = (capacity, min_k, max_k, candidates, always_keep, order)
        explain(error, _check_threshold, scores, tau, strict, common)
    if _debug.enabled and _debug.readable(scores):
        _debug.selection("select_threshold", scores, None, 0)
    return Selection(*out)


def _check_mass(scores: Any, mass: Any, inclusive: Any, extra: Any, common: tuple[Any, ...]) -> None:
    op = "select_mass"
    _check_common(op, scores, *common)
    _check_level(op, "mass", mass, scores)
    if not isinstance(mass, Tensor) and not 0 < mass <= 1:
        _checks.bad_value(op, f"mass must be in (0, 1], got {mass}")
    _checks.option(op, "inclusive", inclusive, {"reach": 0, "below": 1})
    _checks.integer(op, "extra", extra)
    if extra < 0:
        _checks.bad_value(op, f"extra must be 0 or more, got {extra}")


def _check_threshold(scores: Any, tau: Any, strict: Any, common: tuple[Any, ...]) -> None:
    op = "select_threshold"
    _check_common(op, scores, *common)
    _check_level(op, "tau", tau, scores)
    _checks.flag(op, "strict", strict)


def _check_level(op: str, name: str, value: Any, scores: Tensor) -> None:
    if isinstance(value, Tensor):
        _checks.tensor(op, name, value, 1, "(B,)", (torch.float32,))
        _checks.exact_shape(op, name, value, (scores.shape[0],), "(B,)")
        _checks.same_device(op, name, value, "scores", scores)
    elif isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        _checks.bad_type(op, f"{name} must be a number or a tensor, got {type(value).__name__}")


def _check_common(op: str, scores: Any, capacity: Any, min_k: Any, max_k: Any, candidates: Any, always_keep: Any, order: Any) -> None:
    _checks.tensor(op, "scores", scores, 2, "(B, N)", _checks.FLOATS)
    _checks.contiguous_last(op, "scores", scores)
    N = scores.shape[1]
    _checks.integer(op, "capacity", capacity)
    if not 0 <= capacity <= N:
        _checks.bad_value(op, f"capacity must be in [0, N={N}], got {capacity}")
    _checks.integer(op, "min_k", min_k)
    if max_k is not None:
        _checks.integer(op, "max_k", max_k)
    if not 0 <= min_k <= (N if max_k is None else max_k) <= N:
        _checks.bad_value(op, f"min_k and max_k must satisfy 0 <= min_k <= max_k <= N={N}, got {min_k} and {N if max_k is None else max_k}")
    for mask, name in ((candidates, "candidates"), (always_keep, "always_keep")):
        if mask is not None:
            _checks.token_mask(op, name, mask, "scores", scores)
    _checks.option(op, "order", order, ORDERS)


def _empty(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    B = scores.shape[0]
    counts = scores.new_empty((B,), dtype=torch.int64)
    return scores.new_empty((B, capacity), dtype=torch.int64), counts, scores.new_empty((B,), dtype=torch.bool)


@torch.library.register_fake("tokensieve::select_mass")
def _fake_mass(
    scores: Tensor,
    mass: float,
    mass_rows: Tensor | None,
    below: bool,
    capacity: int,
    min_k: int,
    max_k: int | None,
    candidates: Tensor | None,
    always_keep: Tensor | None,
    order: int,
    extra: int,
) -> tuple[Tensor, Tensor, Tensor]:
    common = (capacity, min_k, max_k, candidates, always_keep, tuple(ORDERS)[order])
    _check_mass(scores, mass if mass_rows is None else mass_rows, "below" if below else "reach", extra, common)
    return _empty(scores, capacity)


@torch.library.register_fake("tokensieve::select_threshold")
def _fake_threshold(
    scores: Tensor,
    tau: float,
    tau_rows: Tensor | None,
    strict: bool,
    capacity: int,
    min_k: int,
    max_k: int | None,
    candidates: Tensor | None,
    always_keep: Tensor | None,
    order: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_threshold(
        scores, tau if tau_rows is None else tau_rows, strict, (capacity, min_k, max_k, candidates, always_keep, tuple(ORDERS)[order])
    )
    return _empty(scores, capacity)
