"""score_quantiles, tukey_fence: where the scores of a row lie, for thresholds that follow them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import explain

_op = torch.ops.tokensieve.score_quantiles.default
MAX_QUANTILES = 16


def score_quantiles(scores: Tensor, q: Sequence[float], *, candidates: Tensor | None = None) -> Tensor:
    """Quantiles of the scores of every row, from exact order statistics, without a sort.

    Args:
        scores: (B, N), float32, float16 or bfloat16; rows may be strided, columns are contiguous.
        q: up to 16 numbers in [0, 1].
        candidates: (B, N) bool, False = not counted.

    Returns:
        (B, len(q)) float32: with the n counted scores sorted ascending and r = q * (n - 1) in float32, linear between the scores at
        floor(r) and floor(r) + 1, as `torch.quantile` in float32 (interpolated in double and rounded once, so within one unit in the last
        place of it). NaN where a counted score is NaN or none is counted, and between -inf and +inf.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, number, device or stride that breaks a rule above.

    -0.0 counts as +0.0. Deterministic, the same bits on every back end. No host sync.

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.score_quantiles(torch.tensor([[3.0, 1.0, 2.0, 9.0]]), (0.5, 0.75))
        tensor([[2.5000, 4.5000]])
    """
    try:
        _checks.no_bools(*q)
        values = _op(scores, q, candidates)
    except Exception as error:
        explain(error, check_quantiles, "score_quantiles", scores, q, candidates)
    if _debug.enabled and _debug.readable(scores):
        _debug.selection("score_quantiles", scores, None, 0)
    return values


def tukey_fence(scores: Tensor, *, factor: float = 1.5, side: str = "upper", candidates: Tensor | None = None) -> Tensor:
    """The threshold beyond which a score is an outlier of its row: Q3 + factor * (Q3 - Q1), or Q1 - factor * (Q3 - Q1) below.

    Args:
        scores: (B, N), float32, float16 or bfloat16; rows may be strided, columns are contiguous.
        factor: width of the fence in interquartile ranges.
        side: "upper" or "lower".
        candidates: (B, N) bool, False = not counted.

    Returns:
        (B,) float32, as `select_threshold` takes it. NaN where the quartiles are (see `score_quantiles`).

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, number, option, device or stride that breaks a rule above.

    Deterministic, no host sync. Source: the outlier count of PAINT (arXiv 2501.12206) and PruMerge (arXiv 2403.15388, section 3.2).

    Example:
        >>> import torch, tokensieve as ts
        >>> scores = torch.tensor([[0.1, 0.2, 0.3, 0.2, 5.0, 0.1, 0.3]])
        >>> ts.select_threshold(scores, ts.tukey_fence(scores), capacity=3).index
        tensor([[ 4, -1, -1]])
    """
    op = "tukey_fence"
    _checks.option(op, "side", side, {"upper": 0, "lower": 1})
    if isinstance(factor, bool) or not isinstance(factor, (int, float, torch.SymFloat)):
        _checks.bad_type(op, f"factor must be a float, got {type(factor).__name__}")
    try:
        first, third = _op(scores, (0.25, 0.75), candidates).unbind(1)
    except Exception as error:
        explain(error, check_quantiles, op, scores, (0.25, 0.75), candidates)
    if _debug.enabled and _debug.readable(scores):
        _debug.selection(op, scores, None, 0)
    spread = factor * (third - first)
    return third + spread if side == "upper" else first - spread


def check_quantiles(op: str, scores: Any, q: Any, candidates: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    _checks.tensor(op, "scores", scores, 2, "(B, N)", _checks.FLOATS)
    _checks.contiguous_last(op, "scores", scores)
    if isinstance(q, (str, Tensor)) or not isinstance(q, Sequence):
        _checks.bad_type(op, f"q must be a sequence of floats, got {type(q).__name__}")
    if len(q) > MAX_QUANTILES:
        _checks.bad_value(op, f"q must hold at most {MAX_QUANTILES} numbers, got {len(q)}")
    for value in q:
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
            _checks.bad_type(op, f"q must be a sequence of floats, got {type(value).__name__} in it")
        if not 0 <= value <= 1:
            _checks.bad_value(op, f"q must be in [0, 1], got {value}")
    if candidates is not None:
        _checks.token_mask(op, "candidates", candidates, "scores", scores)


@torch.library.register_fake("tokensieve::score_quantiles")
def _fake(scores: Tensor, q: Sequence[float], candidates: Tensor | None) -> Tensor:
    check_quantiles("score_quantiles", scores, q, candidates)
    return scores.new_empty((scores.shape[0], len(q)), dtype=torch.float32)


# No gradient: without the fallthrough the quantiles would require one, and a backward pass would warn and be wrong.
_library = torch.library.Library("tokensieve", "FRAGMENT")
_library.impl("score_quantiles", torch.library.fallthrough_kernel, "Autograd")
