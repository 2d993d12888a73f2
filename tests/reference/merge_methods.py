"""Merging methods inside blocks as loops over one image in float64, from the papers; no tokensieve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Groups = list[list[int]]  # tokens of each output row, the one that it stands on first


def cosine(a: Tensor, b: Tensor) -> float:
    length = float(a.norm() * b.norm())
    return float(a @ b) / length if length > 0 else 0.0


def matched(metric: Tensor, sources: list[int], targets: list[int], r: int, penalty: dict[int, float] | None = None) -> tuple[dict, list]:
    """({source: target} of the r best, all sources best first): ties to the one listed first."""
    best = {}
    for s in sources:
        scores = [cosine(metric[s], metric[t]) for t in targets]
        top = max(range(len(targets)), key=lambda j: (scores[j], -j))
        best[s] = (scores[top] - (penalty or {}).get(s, 0.0), targets[top])
    ranked = sorted(sources, key=lambda s: (-best[s][0], sources.index(s)))
    return {s: best[s][1] for s in ranked[:r]}, ranked


def grouped(rows: list[int], into: dict[int, int]) -> Groups:
    return [[row, *sorted(s for s, t in into.items() if t == row)] for row in rows]


def means(tokens: Tensor, groups: Groups, size: Tensor) -> Tensor:
    return torch.stack([sum(tokens[n] * size[n] for n in group) / sum(size[n] for n in group) for group in groups])


def tome(metric: Tensor, r: int, prefix: int, penalty: Tensor | None = None) -> Groups:
    """(N, D) metric -> groups of [prefix | even ones that stay | odd ones]."""
    N = len(metric)
    sources, targets = [[n for n in range(prefix, N) if n % 2 == parity] for parity in (0, 1)]
    into, ranked = matched(metric, sources, targets, r, None if penalty is None else {s: float(penalty[s]) for s in sources})
    stay = [s for s in ranked if s not in into]
    return grouped([*range(prefix), *(sorted(stay) if prefix else stay), *targets], into)


def pitome(metric: Tensor, r: int, prefix: int, margin: float, protect: bool) -> Groups:
    N = len(metric)
    patches = range(prefix, N)
    energy = {}
    for i in patches:
        gaps = [cosine(metric[i], metric[j]) - margin for j in patches]
        energy[i] = sum(gap if gap > 0 else math.expm1(gap) for gap in gaps) / len(gaps)
    order = sorted(patches, key=lambda n: (-energy[n], n))
    taking = order[: 2 * r] if protect else order
    into, ranked = matched(metric, taking[::2], taking[1::2], r)
    stay = order[2 * r :] if protect else [s for s in ranked if s not in into]
    return grouped([*range(prefix), *stay, *taking[1::2]], into)


def diffrate(tokens: Tensor, scores: Tensor, kept: int, merged: int, prefix: int, size: Tensor) -> tuple[Groups, Tensor]:
    """Groups, and the size of each."""
    order = sorted(range(prefix, len(tokens)), key=lambda n: (-float(scores[n]), n))
    stay, go = order[: merged - prefix], order[merged - prefix : kept - prefix]
    into, _ = matched(tokens, go, stay, len(go))
    groups = grouped([*range(prefix), *stay], into)
    total = [float(size[g[0]]) + sum(float(size[n]) * cosine(tokens[n], tokens[g[0]]) for n in g[1:]) for g in groups]
    return groups, torch.tensor(total, dtype=torch.float64)


def evit(tokens: Tensor, scores: Tensor, k: int, prefix: int, fuse: bool) -> tuple[list[int], Tensor]:
    """Kept tokens, prefix first, and the output."""
    order = sorted(range(prefix, len(tokens)), key=lambda n: (-float(scores[n]), n))
    kept = [*range(prefix), *order[:k]]
    fused = sum((scores[n] * tokens[n] for n in sorted(order[k:])), torch.zeros_like(tokens[0]))
    return kept, torch.cat([tokens[kept], fused[None]]) if fuse else tokens[kept]


def norm_kept(tokens: Tensor, groups: Groups) -> Tensor:
    """ToFu's MLERP."""
    rows = []
    for group in groups:
        mean = tokens[group].mean(0)
        own = float(tokens[group[0]].norm())
        rows.append(mean * max(float(tokens[n].norm()) for n in group) / own if own > 0 else mean)
    return torch.stack(rows)


def prumerge(
    query: Tensor, key: Tensor, features: Tensor, neighbors: int, plus: bool, among: list[int] | None = None
) -> tuple[list[int], Tensor]:
    """(C,) CLS query, (N + 1, C) keys with CLS first, (N, F) patches -> centres in their order, tokens with the extra one last."""
    among = list(range(len(features))) if among is None else among
    scores = (key @ query * len(query) ** -0.5).softmax(0)[1:]
    keys, N = key[1:], len(features)
    own = scores[among]
    first, third = (torch.quantile(own.float(), q).double() for q in (0.25, 0.75))
    outliers = sorted((n for n in among if scores[n] > third + 1.5 * (third - first)), key=lambda n: (-float(scores[n]), n))
    centers = list(outliers)
    if plus:
        step = max(N // max(len(outliers), 1) // 3, 1)
        centers += [n for n in range(0, N - 1, step) if n in among and n not in outliers]
    rows = []
    for c in centers:
        near = sorted((n for n in range(N) if n != c), key=lambda n: (-cosine(keys[c], keys[n]), n))[:neighbors]
        rows.append(features[c] + sum(scores[n] * features[n] * (n in among) for n in near))
    rows.append(sum((scores[n] * features[n] for n in among if n not in centers), torch.zeros_like(features[0])))
    return centers, torch.stack(rows)


def visionzip(scores: Tensor, metric: Tensor, dominant: int, contextual: int, among: list[int]) -> tuple[list[int], list[int], Groups]:
    """Dominant patches, contextual ones, and for each of these the patches that join it."""
    best = sorted(sorted(among, key=lambda n: (-float(scores[n]), n))[:dominant])
    rest = [n for n in among if n not in best]
    targets = rest[:: max(len(rest) // max(contextual, 1), 1)][:contextual]
    into, _ = matched(metric, [n for n in rest if n not in targets], targets, len(rest)) if targets else ({}, [])
    return best, targets, [sorted(n for n, t in into.items() if t == target) for target in targets]


def aim(tokens: Tensor, rounds: tuple[int, ...]) -> Tensor:
    for most in rounds:
        r = min(most, len(tokens) // 2)
        if r:
            tokens = torch.stack([tokens[group].mean(0) for group in tome(tokens, r, 0)])
    return tokens
