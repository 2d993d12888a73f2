"""What "correct" means for a row: selections and copies exactly, scores within the rounding of their dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from reference import ops as reference
from torch import Tensor

OURS_TOLERANCE = 1e-5  # of the largest score: float32 accumulation, whatever the input
PEER_TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # torch rounds bf16 logits and weights


def near(got: Tensor, want: Tensor, tolerance: float) -> str | None:
    """Largest error, relative to the largest wanted value."""
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if not got.numel():
        return None
    error = float((got.double() - want.double()).abs().max()) / float(want.abs().max())
    return None if error <= tolerance else f"relative error {error:.2g} > {tolerance:.2g}"  # NaN fails too


def score_tolerance(dtype: torch.dtype, ours: bool) -> float:
    return OURS_TOLERANCE if ours else PEER_TOLERANCE[dtype]


def equal(got: Tensor, want: Tensor) -> str | None:
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    different = int((got != want).sum())
    return f"{different} of {want.numel()} values differ" if different else None


def selection(scores: Tensor, index: Tensor, k: int, exact: bool) -> str | None:
    """exact: the reference's indices. Otherwise ascending positions whose scores are the k largest (ties in torch go anywhere)."""
    if exact:
        return equal(index, reference.select_topk(scores.cpu(), k).to(index.device))
    if index.shape != (scores.shape[0], k) or not bool((index.diff(dim=1) > 0).all()):
        return "positions are not k, ascending and unique"
    return equal(scores.gather(1, index).sort(descending=True).values, scores.topk(k).values)


def copies(tensors: Sequence[Tensor], index: Tensor, got: Sequence[Tensor]) -> str | None:
    """The gathered tensors hold the rows that index names, bit for bit."""
    for i, (want, have) in enumerate(zip(reference.gather_tokens(tensors, index), got, strict=True)):
        if problem := equal(have, want):
            return f"tensor {i}: {problem}"
    return None


def kept(index: Tensor, span: tuple[int, int], N: int, k: int, outside: bool = True) -> str | None:
    """Ascending unique positions: k of the range, and everything outside it where wanted."""
    B = index.shape[0]
    if index.shape != (B, k + (N - (span[1] - span[0]) if outside else 0)) or not bool((index.diff(dim=1) > 0).all()):
        return f"index {tuple(index.shape)} is not ascending and unique positions of the wanted number"
    inside = ((index >= span[0]) & (index < span[1])).sum(1)
    return None if bool((inside == k).all()) else f"{inside.tolist()} tokens of the range are kept, want {k}"


def best(scores: Tensor, index: Tensor, span: tuple[int, int], k: int, slack: float) -> str | None:
    """The kept tokens of the range are the k best of the (float64) scores, up to `slack` of the largest score at the threshold."""
    inside = (index >= span[0]) & (index < span[1])
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for b in range(scores.shape[0]):
        chosen[b, index[b][inside[b]] - span[0]] = True
    worst_kept = scores.masked_fill(~chosen, torch.inf).amin(1)
    best_dropped = scores.masked_fill(chosen, -torch.inf).amax(1)
    gap = float(((best_dropped - worst_kept) / scores.amax(1)).max())
    return None if gap <= slack else f"a dropped token beats a kept one by {gap:.2g} of the largest score"
