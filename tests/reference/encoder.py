"""The encoder methods, one image, one head and one token at a time, from the papers and the specs."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

Pair = tuple[int, int]


def cls_attention(query: Tensor, key: Tensor, heads: str = "mean", softmax: bool = True) -> Tensor:
    """(H, D) CLS query, (H, N + 1, D) keys -> (N,) float64."""
    rows = []
    for q, k in zip(query.double(), key.double()):
        logits = torch.stack([(q * row).sum() for row in k]) / math.sqrt(len(q))
        rows.append((logits.softmax(0) if softmax else logits)[1:])
    total = torch.stack(rows).sum(0)
    return total if heads == "sum" else total / len(rows)


def best(scores: Tensor, k: int) -> list[int]:
    """The k best positions by falling score, ties to the lowest."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda n: (-values[n], n))[:k]


def hired_counts(first: Tensor, P: int, rate: float, alpha: float) -> tuple[int, list[int]]:
    """Thumbnail tokens, and crop budgets in numpy's float32 from the (N,) early scores of the thumbnail."""
    N = len(first)
    total = int(P * N * rate)
    full = min(int(total * alpha), N)
    rest = min(total - full, (P - 1) * N)
    marked = set(best(first, int(N * (1 - alpha))))
    band = N // (P - 1)
    counts = [sum(n in marked for n in range(p * band, (p + 1) * band)) for p in range(P - 1)]
    share = [np.float32(c) / np.float32(sum(counts)) * np.float32(rest) if sum(counts) else 0 for c in counts]
    return full, [min(int(s), N) for s in share]


def stitched(grid: Pair, side: Pair) -> list[list[Pair]]:
    """The mosaic as rows of (crop, patch)."""
    (wide, high), (rows, columns) = grid, side
    return [
        [(y // rows * wide + x // columns, y % rows * columns + x % columns) for x in range(wide * columns)] for y in range(high * rows)
    ]


def unpadded(picture: list[list[Pair]], image_size: Pair) -> list[list[Pair]]:
    """Cuts the padding that an image of (width, height) has in a mosaic."""
    high, wide = len(picture), len(picture[0])
    width, height = image_size
    if width / height > wide / high:
        pad = (high - int(height * (wide / width))) // 2
        return picture[pad : high - pad]
    pad = (wide - int(width * (high / height))) // 2
    return [row[pad : wide - pad] for row in picture]


def even_positions(total: int, count: int) -> list[int]:
    """Evenly spread, in float32 as torch.linspace with fused multiply-add: from the start in the first half, from the end in the second."""
    if count == 1:
        return [0]
    step = Fraction(float(np.float32(total - 1) / np.float32(count - 1)))
    exact = [i * step if i < count // 2 else total - 1 - (count - 1 - i) * step for i in range(count)]
    return [int(np.rint(np.float32(float(x)))) for x in exact]
