"""select_mass and select_threshold in plain Python: one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .counts import mass_row, threshold_row


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
        exists = candidates[b].tolist() if candidates is not None else [True] * N
        limits = {"extra": extra, "min_k": min_k, "max_k": N if max_k is None else max_k}
        out.append(mass_row(row, mass[b], below=below, candidates=exists, always=always, **limits))
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
        exists = candidates[b].tolist() if candidates is not None else [True] * N
        limits = {"min_k": min_k, "max_k": N if max_k is None else max_k}
        out.append(threshold_row(row, level, strict=strict, candidates=exists, always=always, **limits))
    return out
