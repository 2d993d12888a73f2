"""Pooling, output by output, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from math import ceil, floor, prod

import torch
from torch import Tensor

Bins = list[range]


ROUNDING = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str = "", slack: float = 1.0) -> None:
    scale = max(1.0, float(want.detach().abs().max()) if want.numel() else 0.0)
    tolerance = slack * ROUNDING[dtype]
    torch.testing.assert_close(got.double().cpu(), want.cpu(), rtol=tolerance, atol=tolerance * scale, msg=lambda m: f"{what}: {m}")


def windows(n: int, window: int, stride: int) -> Bins:
    return [range(begin, begin + window) for begin in range(0, n - window + 1, stride)]


def adaptive(n: int, size: int, part: int) -> Bins:
    """Bins of an axis, the same in every part of it."""
    share = size * part // n
    inside = [(floor(Fraction(u * part, share)), ceil(Fraction((u + 1) * part, share))) for u in range(share)]
    return [range(start + a, start + b) for start in range(0, n, part) for a, b in inside]


def boxes(x: Tensor, grid: Sequence[int], bins: Sequence[Bins]) -> list[Tensor]:
    """The tokens of every output, (B, K, C) each, outputs and tokens in raster order."""
    found = []
    for box in product(*bins):
        tokens = []
        for place in product(*box):
            n = 0
            for side, at in zip(grid, place, strict=True):
                n = n * side + at
            tokens.append(n)
        found.append(x[:, tokens])
    return found


def first_largest(window: Tensor) -> Tensor:
    """(B, K, C) -> (B, C), a NaN is the largest; the gradient goes to the first that equals it."""
    value = window.detach()
    best = value.amax(1, keepdim=True)
    at = ((value == best) | (value.isnan() & best.isnan())).int().argmax(1, keepdim=True)
    return window.gather(1, at)[:, 0]


def taps(n: int, size: int) -> Tensor:
    """(size, n) weights of a bilinear axis, corners not aligned."""
    weights = torch.zeros(size, n, dtype=torch.float64)
    for o in range(size):
        at = max(Fraction(0), (o + Fraction(1, 2)) * n / size - Fraction(1, 2))
        low = min(floor(at), n - 1)
        upper = at - low if low < n - 1 else Fraction(0)
        weights[o, low] += float(1 - upper)
        if upper:
            weights[o, low + 1] += float(upper)
    return weights


def pool_grid(
    x: Tensor,
    grid: Sequence[int],
    size: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    kind: str = "mean",
    within: Sequence[int] | None = None,
) -> Tensor:
    x = x.double()
    if kind == "bilinear":
        assert size is not None
        out = x.view(x.shape[0], *grid, x.shape[2])
        for axis, (n, o) in enumerate(zip(grid, size, strict=True)):
            out = torch.tensordot(taps(n, o).to(x.device), out.movedim(axis + 1, 0), 1).movedim(0, axis + 1)
        return out.reshape(x.shape[0], prod(size), x.shape[2])
    if window is not None:
        bins = [windows(*axis) for axis in zip(grid, window, stride or window, strict=True)]
    else:
        assert size is not None
        bins = [adaptive(*axis) for axis in zip(grid, size, within or grid, strict=True)]
    found = boxes(x, grid, bins)
    return torch.stack([w.mean(1) if kind == "mean" else first_largest(w) for w in found], 1)


def pool_windows(
    x: Tensor, scores: Tensor, grid: Sequence[int], window: Sequence[int], stride: Sequence[int] | None, temperature: float
) -> Tensor:
    bins = [windows(*axis) for axis in zip(grid, window, stride or window, strict=True)]
    weights = [torch.softmax(s / temperature, 1) for s in boxes(scores.double()[..., None], grid, bins)]
    return torch.stack([(w * v).sum(1) for w, v in zip(weights, boxes(x.double(), grid, bins), strict=True)], 1)


def space_to_depth(x: Tensor, grid: Sequence[int], block: Sequence[int]) -> Tensor:
    return torch.stack([w.flatten(1) for w in boxes(x, grid, [windows(n, b, b) for n, b in zip(grid, block, strict=True)])], 1)


def pool_runs(x: Tensor, starts: Sequence[Sequence[int]], length: int, stride: int) -> Tensor:
    samples = []
    for row, images in zip(x.double(), starts, strict=True):
        parts, at = [], 0
        for start in images:
            parts.append(row[at:start])
            parts += [row[start + i : start + i + stride].mean(0, keepdim=True) for i in range(0, length - stride + 1, stride)]
            at = start + length
        samples.append(torch.cat([*parts, row[at:]]))
    return torch.stack(samples)
