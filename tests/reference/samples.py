"""select_samples of one row: a sort, exact sums, and the distance of every point to every value; numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .counts import masses


def sample_row(row: Sequence[float], points: int | np.ndarray, counted: Sequence[bool]) -> list[int]:
    """The picks in ascending score order, before any capacity."""
    exists = [n for n in range(len(row)) if counted[n]]
    exists.sort(key=lambda n: (not math.isnan(row[n]), 0.0 if math.isnan(row[n]) else row[n], n))
    weight = masses(list(row), exists)
    above = [0]
    for n in exists[1:]:
        above.append(above[-1] + weight[n])
    if above[-1] == 0:
        return []
    # The sums are exact; a quotient is one division of float64, rounded to float32.
    cdf = np.array([np.float32(float(a) / float(above[-1])) for a in above], dtype=np.float32)
    if isinstance(points, int):
        start = float(min(f for f in cdf if f > 0))
        shares = [0.0 if points == 1 else t / (points - 1) for t in range(points)]
        points = np.array([float(Fraction(1.0 - start) * Fraction(s) + Fraction(start)) for s in shares], dtype=np.float32)
    with np.errstate(invalid="ignore"):
        picks = {int(np.argmin(np.abs(y - cdf))) for y in points.astype(np.float32) if not np.isnan(y)}
    return [exists[j] for j in sorted(picks)]
