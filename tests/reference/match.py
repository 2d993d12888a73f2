"""Bipartite matching, as slow as it is plain: float64 cosines, one loop over sources and one over rows of the plan."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .similarity import cosine

Plan = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def default_lists(N: int, prefix: int) -> tuple[list[int], list[int]]:
    """Even and odd positions behind the prefix."""
    return [n for n in range(prefix, N) if n % 2 == 0], [n for n in range(prefix, N) if n % 2 == 1]


def row_of(value: Tensor | None, b: int) -> list[int]:
    if value is None:
        return []
    return [int(n) for n in (value if value.dim() == 1 else value[b])]


def bipartite_match(
    metric: Tensor,
    r: int,
    *,
    sources: Tensor | None = None,
    targets: Tensor | None = None,
    keep: int | Tensor = 0,
    bias: Tensor | None = None,
    candidates: Tensor | None = None,
    order: str = "position",
) -> Plan:
    """(source, destination, similarity float64, index, inverse)."""
    metric = metric.cpu().double()
    metric = metric.mean(1) if metric.dim() == 4 else metric
    similarity = cosine(metric, metric).tolist()
    plans = []
    for b in range(metric.shape[0]):
        N = metric.shape[1]
        if sources is None:
            assert isinstance(keep, int)
            kept, (from_, to) = list(range(keep)), default_lists(N, keep)
        else:
            kept = list(range(keep)) if isinstance(keep, int) else row_of(keep, b)
            from_, to = row_of(sources, b), row_of(targets, b)
        allowed = {n for n in range(N) if candidates is None or bool(candidates[b, n])}
        pairs: list[tuple[tuple[int, float], int, int, float]] = []  # (class, -rank), place of the source, target, similarity
        for i, source in enumerate(from_):
            best, where = -math.inf, -1
            nan = -1
            for target in to:
                if target not in allowed or source not in allowed:
                    continue
                value = similarity[b][source][target]
                if math.isnan(value):
                    nan = target if nan < 0 else nan
                elif value > best:
                    best, where = value, target
            if where < 0 and nan >= 0:
                best, where = math.nan, nan
            rank = best + (0.0 if bias is None else float(bias[b, i]))
            grade = 2 if where < 0 else 1 if math.isnan(rank) else 0
            pairs.append(((grade, 0.0 if grade else -rank), i, where, best))
        pairs.sort(key=lambda pair: pair[0])  # stable: equal ones stay in list order
        gone, stay = pairs[:r], pairs[r:]
        stay = sorted(stay, key=lambda pair: pair[1]) if order == "position" else stay
        index = [*kept, *(from_[i] for _, i, _, _ in stay), *to]
        inverse = [-1] * N
        for row, n in enumerate(index):
            if n >= 0:
                inverse[n] = row
        for _, i, where, _ in gone:
            if where >= 0:
                inverse[from_[i]] = inverse[where]
        source = [from_[i] if where >= 0 else -1 for _, i, where, _ in gone]
        plans.append((source, [pair[2] for pair in gone], [pair[3] if pair[2] >= 0 else 0.0 for pair in gone], index, inverse))
    columns = [list(column) for column in zip(*plans, strict=True)]
    kinds = (torch.int64, torch.int64, torch.float64, torch.int64, torch.int64)
    source, destination, value, index, inverse = (torch.tensor(c, dtype=k) for c, k in zip(columns, kinds, strict=True))
    return source, destination, value, index, inverse
