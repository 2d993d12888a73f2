"""select_mass and select_threshold in plain Python: integers of any size, one token at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def order_of(scores: list[float], candidates: list[bool], always: list[bool]) -> list[int]:
    """Tokens that exist: always kept ones first, then by falling score, NaN last, ties by position."""

    def key(n: int) -> tuple[bool, bool, float, int]:
        return not always[n], math.isnan(scores[n]), 0.0 if math.isnan(scores[n]) else -scores[n], n

    return sorted((n for n in range(len(scores)) if always[n] or candidates[n]), key=key)


def masses(scores: list[float], exists: list[int]) -> list[int]:
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


def select_mass(
    scores: Tensor,
    mass: list[float],
    *,
    below: bool = False,
    extra: int = 0,
    min_k: int = 0,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    always_keep: Tensor | None = None,
) -> list[list[int]]:
    """The tokens of every row, best first, before any capacity."""
    out = []
    for b, row in enumerate(scores.float().tolist()):
        N = len(row)
        always = always_keep[b].tolist() if always_keep is not None else [False] * N
        exists = order_of(row, candidates[b].tolist() if candidates is not None else [True] * N, always)
        weight = masses(row, exists)
        share = Fraction(mass[b]) * sum(weight[n] for n in exists)
        count, held = 0, 0
        while count < len(exists) and (held + weight[exists[count]] <= share if below else held < share):
            held += weight[exists[count]]
            count += 1
        out.append(exists[: limited(count, sum(always), extra, min_k, N if max_k is None else max_k)])
    return out


def select_threshold(
    scores: Tensor,
    tau: list[float],
    *,
    strict: bool = True,
    min_k: int = 0,
    max_k: int | None = None,
    candidates: Tensor | None = None,
    always_keep: Tensor | None = None,
) -> list[list[int]]:
    """The tokens of every row, best first, before any capacity."""
    out = []
    for b, row in enumerate(scores.float().tolist()):
        N, level = len(row), torch.tensor(tau[b]).item()
        always = always_keep[b].tolist() if always_keep is not None else [False] * N
        exists = order_of(row, candidates[b].tolist() if candidates is not None else [True] * N, always)
        count = sum(1 for n in exists if always[n] or (row[n] > level if strict else row[n] >= level))
        out.append(exists[: limited(count, sum(always), 0, min_k, N if max_k is None else max_k)])
    return out


def limited(count: int, always: int, extra: int, min_k: int, max_k: int) -> int:
    return max(min(max(count, always) + extra, max_k), min_k)
