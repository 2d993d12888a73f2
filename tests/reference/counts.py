"""Rows of select_mass and select_threshold in plain Python, integers of any size; no torch, so the kernel tests use it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def order_of(scores: Sequence[float], candidates: list[bool], always: list[bool]) -> list[int]:
    """Tokens that exist: always kept ones first, then by falling score, NaN last, ties by position."""

    def key(n: int) -> tuple[bool, bool, float, int]:
        return not always[n], math.isnan(scores[n]), 0.0 if math.isnan(scores[n]) else -scores[n], n

    return sorted((n for n in range(len(scores)) if always[n] or candidates[n]), key=key)


def masses(scores: Sequence[float], exists: list[int]) -> list[int]:
    """The integer masses that the ops document: units of 2 ** -40 of the power of two at or below the largest score."""
    positive = [scores[n] for n in exists if scores[n] > 0]
    largest = max(positive, default=0.0)
    out = [0] * len(scores)
    if largest == math.inf:
        for n in exists:
            out[n] = 1 if scores[n] == math.inf else 0
        return out
    if largest == 0.0:
        return out
    bits = 16
    while bits > 38 - math.ceil(math.log2(max(len(scores), 1))):
        bits -= 1
    exponent = max(math.frexp(largest)[1] - 1, -126)  # subnormals have the exponent of the smallest normal
    unit = Fraction(2) ** (exponent - 23 - bits)
    for n in exists:
        out[n] = math.floor(Fraction(scores[n]) / unit) if scores[n] > 0 else 0
    return out


def limited(count: int, always: int, extra: int, min_k: int, max_k: int) -> int:
    return max(min(max(count, always) + extra, max_k), min_k)


def mass_row(
    row: Sequence[float], share: float, *, below: bool, extra: int, min_k: int, max_k: int, candidates: list[bool], always: list[bool]
) -> list[int]:
    """The tokens of a row, best first, before any capacity."""
    exists = order_of(row, candidates, always)
    weight = masses(row, exists)
    wanted = Fraction(share) * sum(weight[n] for n in exists)
    count, held = 0, 0
    while count < len(exists) and (held + weight[exists[count]] <= wanted if below else held < wanted):
        held += weight[exists[count]]
        count += 1
    return exists[: limited(count, sum(always), extra, min_k, max_k)]


def threshold_row(
    row: Sequence[float], tau: float, *, strict: bool, min_k: int, max_k: int, candidates: list[bool], always: list[bool]
) -> list[int]:
    """The tokens of a row, best first, before any capacity; tau is a float32 value."""
    exists = order_of(row, candidates, always)
    count = sum(1 for n in exists if always[n] or (row[n] > tau if strict else row[n] >= tau))
    return exists[: limited(count, sum(always), 0, min_k, max_k)]
