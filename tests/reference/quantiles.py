"""score_quantiles of one row by sorting it; numpy only, so the kernel tests use it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


def quantile_row(row: Sequence[float], q: float, counted: Sequence[bool]) -> np.float32:
    """Linear between the two nearest counted scores, exactly, then rounded to float32; the rank is a float32 product."""
    values = sorted(v for v, c in zip(row, counted, strict=True) if c)
    if not values or any(math.isnan(v) for v in values):
        return np.float32(np.nan)
    rank = np.float32(q) * np.float32(len(values) - 1)
    below = int(rank)
    weight = float(rank - np.float32(below))
    low, high = values[below], values[min(below + 1, len(values) - 1)]
    if weight == 0 or low == high:
        return np.float32(low)
    if math.isinf(low) or math.isinf(high):
        return np.float32(np.nan if math.isinf(low) and math.isinf(high) else low if math.isinf(low) else high)
    difference = Fraction(high - low)  # rounded to double, as the kernel does; the rest is one fused operation
    return np.float32(float(Fraction(weight) * difference + Fraction(low)))
