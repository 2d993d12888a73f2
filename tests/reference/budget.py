"""allocate_budget, part by part in numpy scalars of the dtype of the weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def allocate_row(
    weights: np.ndarray,
    total: int,
    mode: str = "proportional",
    cap: list[int] | None = None,
    ratio: float = 1.0,
    temperature: float = 1.0,
    epsilon: float = 0.0,
    remainder: str = "drop",
) -> tuple[list[int], np.ndarray]:
    """(budgets, shares) of one row; cap holds one number a part."""
    kind: Any = weights.dtype.type
    parts = range(len(weights))
    with np.errstate(all="ignore"):
        shares = _shares([kind(w) for w in weights], kind, mode, total, cap, ratio, temperature, epsilon)
        quotas = [s * kind((cap or [])[i] if mode == "adjusted" else total) for i, s in enumerate(shares)]
    caps = [total] * len(weights) if cap is None else cap
    budgets = [0 if math.isnan(q) or q <= 0 else min(caps[i], int(min(q, kind(2**62)))) for i, q in enumerate(quotas)]
    if remainder == "largest":
        order = sorted(parts, key=lambda i: (-(float(quotas[i] % kind(1)) if quotas[i] > 0 else 0.0), i))
        left = min(total, sum(caps)) - sum(budgets)
        while left > 0:  # round after round, one token at a time
            for i in order:
                if left > 0 and budgets[i] < caps[i]:
                    budgets[i] += 1
                    left -= 1
    return budgets, np.array(shares, dtype=kind)


def _shares(w: list[Any], kind: Any, mode: str, total: int, cap: Any, ratio: float, temperature: float, epsilon: float) -> list[Any]:
    if mode in ("softmax", "adjusted"):
        top = w[0]
        for x in w[1:]:
            top = x if x > top else top
        w = [kind(np.exp(np.float64((x - top) / kind(temperature)))) for x in w]
    whole = kind(0)
    for x in w:
        whole = whole + x
    if mode in ("softmax", "adjusted"):
        whole = whole + kind(epsilon)
    shares = [x / whole for x in w]
    if mode == "capped":
        _redistribute(shares, [kind(c) / kind(total) for c in cap], kind)
    if mode == "adjusted":
        mean = kind(0)
        for s in shares:
            mean = mean + s
        mean = mean / kind(len(w))
        shares = [kind(ratio) * (kind(1) + s - mean) for s in shares]
        shares = [kind(1) if s > 1 else s for s in shares]
    return shares


def _redistribute(shares: list[Any], caps: list[Any], kind: Any) -> None:
    """QuoTA's scale_weights."""
    excess = kind(0)
    for i, cap in enumerate(caps):
        if shares[i] > cap:
            excess = excess + (shares[i] - cap)
            shares[i] = cap
    if excess > 0:
        rest = kind(0)
        for s in shares:
            rest = rest + s
        for i, cap in enumerate(caps):
            if shares[i] < cap:
                shares[i] = shares[i] + shares[i] / rest * excess
                if shares[i] > cap:
                    excess = excess + (shares[i] - cap)
                    shares[i] = cap
