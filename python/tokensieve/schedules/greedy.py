"""G-Search: layer by layer, the smallest share of image tokens that the quality allows (arXiv 2412.00556)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .curves import check_rates
from .evaluations import Evaluations, Rates, Score, SearchResult

GRID = tuple(i / 20 for i in range(21))  # steps of 5 %


def search(
    score: Score,
    num_layers: int,
    *,
    tolerance: float = 0.0,
    grid: Sequence[float] = GRID,
    layers: Sequence[int] | None = None,
    monotone: bool = True,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """The fewest tokens per layer whose score stays within `tolerance` of the unreduced model's.

    Args:
        score: called with num_layers rates, returns the quality on your calibration set; larger is better.
        num_layers: layers of the decoder. Layer 0 always sees all tokens, because nothing before it ranks them.
        tolerance: how far the score may fall, in units of the score, 0 or more.
        grid: shares to choose from, in [0, 1].
        layers: layers at which the share may fall, increasing, 1 or more; all where None.
        monotone: bisect the grid, because more tokens are never worse (the paper's assumption; 5 scores a layer for 21 shares). False
            tries from the smallest share up, and stays right where the scores are noisy.
        resume: file of the scores so far; written after every call of `score`, read at the start. Ctrl-C loses at most one call.
        progress: a line on standard error per layer.

    Returns:
        SearchResult(rates, score, evaluations).

    Raises:
        ValueError: a grid, layer, tolerance or file that breaks a rule above, or a score that is NaN.

    While layer l is searched, all later layers use its share, so every accepted step is a schedule that was scored as a whole.
    Deterministic for a deterministic score.

    Source: G-Search (arXiv 2412.00556), from its abstract and summaries: rounding and metric are the caller's.

    Example:
        >>> enough = (1.0, 0.5, 0.5, 0.25)
        >>> search(lambda rates: float(all(r >= e for r, e in zip(rates, enough))), 4, grid=(0.25, 0.5, 1.0), progress=False)
        SearchResult(rates=(1.0, 0.5, 0.5, 0.25), score=1.0, evaluations=5)
    """
    shares = _shares(grid)
    where = _layers(layers, num_layers)
    if not tolerance >= 0:
        raise ValueError(f"tokensieve.schedules.search: tolerance must be 0 or more, got {tolerance}")
    settings = {"search": "greedy", "num_layers": num_layers, "tolerance": tolerance, "grid": shares, "layers": where, "monotone": monotone}
    evaluate = Evaluations("search", score, settings, resume, progress)
    rates: Rates = (1.0,) * num_layers
    target = evaluate(rates) - tolerance
    for done, layer in enumerate(where):
        rates = _smallest(evaluate, rates, layer, [share for share in shares if share < rates[layer]], target, monotone)
        evaluate.tell(done + 1, len(where), f"layers, layer {layer} keeps {rates[layer]:.3g}")
    return SearchResult(rates, evaluate(rates), len(evaluate.scores))


def _smallest(evaluate: Evaluations, rates: Rates, layer: int, shares: list[float], target: float, monotone: bool) -> Rates:
    """The schedule with the smallest share from `layer` on that reaches the target; `rates` itself is known to."""

    def with_share(share: float) -> Rates:
        return rates[:layer] + (share,) * (len(rates) - layer)

    if not monotone:
        return next((with_share(share) for share in shares if evaluate(with_share(share)) >= target), rates)
    low, high = 0, len(shares)  # shares[high:] reach the target
    while low < high:
        middle = (low + high) // 2
        if evaluate(with_share(shares[middle])) >= target:
            high = middle
        else:
            low = middle + 1
    return with_share(shares[high]) if high < len(shares) else rates


def _shares(grid: Sequence[float]) -> list[float]:
    shares = sorted(set(grid))
    if not shares:
        raise ValueError("tokensieve.schedules.search: grid must hold at least one share, got none")
    check_rates(shares[::-1], owner="schedules.search")
    return [float(share) for share in shares]


def _layers(layers: Sequence[int] | None, num_layers: int) -> list[int]:
    if num_layers < 1:
        raise ValueError(f"tokensieve.schedules.search: num_layers must be 1 or more, got {num_layers}")
    where = list(range(1, num_layers)) if layers is None else list(layers)
    if any(not 1 <= layer < num_layers for layer in where) or where != sorted(set(where)):
        raise ValueError(f"tokensieve.schedules.search: layers must increase and be in [1, {num_layers - 1}], got {layers}")
    return where
