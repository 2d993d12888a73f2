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


def patch_attention(query: Tensor, key: Tensor) -> Tensor:
    """(H, N + 1, D) each -> (N, N) float64 mean over heads of the softmax over all keys, without CLS."""
    maps = [torch.softmax(q @ k.T / math.sqrt(q.shape[1]), 1) for q, k in zip(query.double(), key.double())]
    return torch.stack(maps).mean(0)[1:, 1:]


def globalcom2(scores: Tensor, ratio: float, tau: float, image_size: Pair, grid: Pair, side: Pair) -> tuple[list[float], list[Tensor]]:
    """Share of each crop, and of each crop {patch: combined score} as (N,) with NaN in the padding; scores (1 + G, N), thumbnail first."""
    (wide, high), (rows, columns) = grid, side
    sums = [0.0] * (wide * high)
    for n, value in enumerate(scores[0].double().tolist()):
        row, column = min(n // columns // (rows // high), high - 1), min(n % columns // (columns // wide), wide - 1)
        sums[row * wide + column] += value
    e = [math.exp((s - max(sums)) / tau) for s in sums]
    share = [x / (sum(e) + 1e-8) for x in e]
    shares = [min(1.0, ratio * (1 + s - sum(share) / len(share))) for s in share]
    picture = unpadded(stitched(grid, side), image_size)
    small = scores[0].double().view(rows, columns)
    own: list[dict[int, float]] = [{} for _ in sums]
    shared: list[dict[int, float]] = [{} for _ in sums]
    for y, line in enumerate(picture):
        for x, (crop, patch) in enumerate(line):
            own[crop][patch] = float(scores[1 + crop, patch])
            shared[crop][patch] = bilinear(small, (y + 0.5) * rows / len(picture) - 0.5, (x + 0.5) * columns / len(line) - 0.5)
    combined = []
    for a, b in zip(own, shared):
        norms = [math.sqrt(sum(v * v for v in d.values())) for d in (a, b)]
        combined.append(torch.tensor([a[n] / norms[0] + b[n] / norms[1] if n in a else math.nan for n in range(rows * columns)]))
    return shares, combined


def bilinear(x: Tensor, row: float, column: float) -> float:
    """Value of (rows, columns) between its points; outside, the edge goes on."""
    row, column = min(max(row, 0.0), x.shape[0] - 1.0), min(max(column, 0.0), x.shape[1] - 1.0)
    r, c = int(row), int(column)
    r1, c1, fr, fc = min(r + 1, x.shape[0] - 1), min(c + 1, x.shape[1] - 1), row - int(row), column - int(column)
    upper = float(x[r, c]) * (1 - fc) + float(x[r, c1]) * fc
    return upper * (1 - fr) + (float(x[r1, c]) * (1 - fc) + float(x[r1, c1]) * fc) * fr


def ademvl(hidden: Tensor, visual: Tensor, e1: Tensor, e2: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """(L, C), (N, C), (N, C), (N, C) -> (L, N) scores and (L, C) sums, float64, one row and one visual token at a time."""
    h, v = hidden.double(), visual.double()
    q, k, values = h / (1 + (-h).exp()), (v + e1) / (1 + (-(v + e1)).exp()), v + e2
    scores = torch.stack([torch.stack([(a * b).sum() for b in k]) for a in q])
    out = torch.zeros_like(h)
    for row, line in enumerate(scores.tolist()):
        limit = sorted(line)[int(drop * len(line))]
        for n, score in enumerate(line):
            out[row] += score * values[n] if score >= limit else 0
    return scores, out


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two vectors in float64, 0 where one has norm 0."""
    norms = float(a.double().norm()) * float(b.double().norm())
    return float((a.double() * b.double()).sum()) / norms if norms else 0.0


def divprune(tokens: Tensor, k: int) -> list[int]:
    """(N, C) -> picks in order, by the definition: always the token farthest from its nearest pick."""
    N = len(tokens)
    far = [[1 - cosine(tokens[i], tokens[j]) for j in range(N)] for i in range(N)]
    picks: list[int] = []
    for _ in range(k):
        left = [n for n in range(N) if n not in picks]
        picks.append(max(left, key=lambda n: (min(far[n][m] for m in (picks or [x for x in left if x != n])), -n)))
    return picks


def vispruner(scores: Tensor, features: Tensor, tokens: int, important: float) -> list[int]:
    """(N,) scores, (N, C) features -> kept patches, ascending; one round, one pair at a time."""
    order = best(scores, len(scores))
    first = int(tokens * important)
    rest, wanted = order[first:], tokens - first
    while wanted and len(rest) > wanted:
        a, b = rest[0::2], rest[1::2]
        closest = [max(cosine(features[i], features[j]) for j in b) for i in a]
        ranked = [a[i] for i in sorted(range(len(a)), key=lambda i: (-closest[i], i))]
        rest = ranked[min(8, len(rest) - wanted) :] + b
    return sorted(order[:first] + (rest if wanted else []))


def slime(tokens: Tensor, text: Tensor, text_mask: list[bool] | None, top_p: float, temperature: float) -> list[int]:
    """(N, C), (L, C) -> kept tokens, ascending."""
    words = [w for w, real in zip(text, text_mask or [True] * len(text)) if real]
    scores = [sum(cosine(v, w) for w in words) / (1 if text_mask is not None else len(words)) for v in tokens]
    e = [math.exp(s / temperature) for s in scores]
    share = torch.tensor([x / sum(e) for x in e], dtype=torch.float64)
    order, held, count = best(share, len(share)), 0.0, 0
    for n in order:
        held += float(share[n])
        if held > top_p:
            break
        count += 1
    return sorted(order[: count + 1])


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest."""
    values, at = sorted(values), q * (len(values) - 1)
    low = int(at)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (at - low)


def lrs(scores: Tensor, real: list[bool], columns: int | None, ratio: float, threshold: float) -> tuple[list[int], list[int]]:
    """(N,) scores -> what the ratio rule keeps, what the threshold rule keeps."""
    there = [n for n in range(len(scores)) if real[n]]
    top = sorted(there, key=lambda n: (-float(scores[n]), n))[: int(len(there) * ratio)]
    ends = [] if columns is None else range(columns - 1, len(scores), columns)
    low, high = (quantile([float(scores[n]) for n in there], q) for q in (0.05, 0.95))
    return sorted({*top, *ends}), [n for n in there if min(max((float(scores[n]) - low) / (high - low), 0), 1) > threshold]


def paint_streams(first: Tensor, late: Tensor, ratio: float) -> tuple[list[int], list[int]]:
    """(N,) head sums -> local tokens, summary tokens."""
    low, high = (quantile(late.tolist(), q) for q in (0.25, 0.75))
    outliers = sum(value > high + 1.5 * (high - low) for value in late.tolist())
    summary = sorted(best(late, outliers))
    return [n for n in sorted(best(first, int(len(first) * ratio))) if n not in summary], summary
