"""Cosine matches and greedy max-min, as slow as they are plain, and how float32 results are compared with them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .inputs import seeded

KINDS = ("normal", "signs", "one-hot", "duplicates", "special")


def rows(generator: torch.Generator, kind: str, B: int, N: int, C: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """(B, N, C). In "signs" (C a power of 4) and "one-hot" every cosine is a sum of a few powers of two: exact, with many ties."""
    if kind == "one-hot":
        x = torch.nn.functional.one_hot(torch.randint(0, C, (B, N), generator=generator), C).float()
        x = x * torch.tensor([1.0, -1.0, 0.5, 8.0, 0.0])[torch.randint(0, 5, (B, N, 1), generator=generator)]
    elif kind == "signs":
        x = torch.randint(0, 2, (B, N, C), generator=generator).float() * 2 - 1
        x = x * torch.tensor([1.0, 4.0, 0.25])[torch.randint(0, 3, (B, N, 1), generator=generator)]
    elif kind in ("normal", "duplicates"):
        x = torch.randn(B, N, C, generator=generator)
        if kind == "duplicates" and N:
            x = x[:, torch.randint(0, max(1, N // 3), (N,), generator=generator)]
    else:  # special: signs with zero and NaN rows
        x = rows(generator, "signs", B, N, C)
        kinds = torch.randint(0, 8, (B, N), generator=generator)
        x[kinds == 0] = 0.0
        x[kinds == 1] = math.nan
    return x.to(dtype).contiguous().to(device)


def floor_of(C: int) -> float:
    """What a float32 cosine of C channels may be off by: a few roundings of the norms, and a random walk over the channels."""
    return 2e-7 * (8 + C**0.5)


def random_mask(seed: int, B: int, N: int, share: float) -> Tensor:
    return torch.rand(B, N, generator=seeded(seed)) < share


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, N) float64; 0 where a norm is 0, NaN where a row holds one."""
    x, y = a.double(), b.double()
    norms = x.norm(dim=-1)[:, :, None] * y.norm(dim=-1)[:, None, :]
    dots = x @ y.transpose(1, 2)
    return torch.where(norms == 0, torch.zeros_like(dots), dots / norms)


def allowed_pairs(a: Tensor, b: Tensor, candidates: Tensor | None, exclude_self: bool) -> Tensor:
    """(B, M, N) bool."""
    B, M, N = a.shape[0], a.shape[1], b.shape[1]
    allowed = torch.ones(B, M, N, dtype=torch.bool) if candidates is None else candidates.cpu()[:, None, :].expand(B, M, N).clone()
    if exclude_self:
        allowed &= ~torch.eye(M, N, dtype=torch.bool)
    return allowed


def cosine_match(
    a: Tensor, b: Tensor, *, k: int, largest: bool = True, candidates: Tensor | None = None, exclude_self: bool = False
) -> tuple[Tensor, Tensor]:
    """(value float64, index) by a stable sort of every row: NaN behind all numbers, then the lowest index."""
    similarity, allowed = cosine(a.cpu(), b.cpu()), allowed_pairs(a, b, candidates, exclude_self)
    B, M, N = similarity.shape
    key = (-similarity if largest else similarity).nan_to_num(nan=100.0).masked_fill(~allowed, math.inf)
    order = key.sort(dim=-1, stable=True).indices[..., :k]
    missing = ~allowed.gather(-1, order)
    value, index = torch.zeros(B, M, k, dtype=torch.float64), torch.full((B, M, k), -1, dtype=torch.int64)
    value[..., :N] = similarity.gather(-1, order).masked_fill(missing, 0.0)
    index[..., :N] = order.masked_fill(missing, -1)
    return value, index


def cosine_scores(
    a: Tensor,
    b: Tensor,
    *,
    reduction: str | None = "mean",
    t: int | None = None,
    candidates: Tensor | None = None,
    exclude_self: bool = False,
) -> Tensor:
    """float64 from the whole matrix."""
    similarity, allowed = cosine(a.cpu(), b.cpu()), allowed_pairs(a, b, candidates, exclude_self)
    if reduction is None:
        return similarity.masked_fill(~allowed, 0.0)
    if reduction == "max":
        return cosine_match(a, b, k=1, candidates=candidates, exclude_self=exclude_self)[0][..., 0]
    if reduction == "bottom":
        value, index = cosine_match(a, b, k=int(t or 0), largest=False, candidates=candidates, exclude_self=exclude_self)
        return value.sum(-1) / (index >= 0).sum(-1).clamp(min=1)
    total = similarity.masked_fill(~allowed, 0.0).sum(-1)
    return total if reduction == "sum" else total / allowed.sum(-1).clamp(min=1)


def distances(x: Tensor, metric: str) -> Tensor:
    """(N, N) float64 of one image; NaN counts as 0."""
    if metric == "cosine":
        d = 1.0 - cosine(x[None], x[None])[0]
    else:
        d = torch.stack([(x.double() - row.double()).square().sum(-1) for row in x]) if len(x) else x.new_zeros(0, 0)
    return d.nan_to_num(0.0, math.inf).clamp(min=0.0)


def nearest_other(d: Tensor) -> Tensor:
    return d.masked_fill(torch.eye(len(d), dtype=torch.bool), math.inf).amin(0) if len(d) else d.sum(0)


def select_diverse(
    x: Tensor, k: int, *, candidates: Tensor | None = None, first: Tensor | None = None, metric: str = "cosine", order: str = "position"
) -> Tensor:
    """(B, k) int64 by the loop as published: the minimum over all picks anew for every pick."""
    index = torch.full((x.shape[0], k), -1, dtype=torch.int64)
    for b in range(x.shape[0]):
        tokens = [n for n in range(x.shape[1]) if candidates is None or candidates[b, n]]
        d = distances(x[b].cpu()[tokens], metric)
        start = int(first[b]) if first is not None else -1
        picks: list[int] = []
        while len(picks) < min(k, len(tokens)):
            if not picks:
                nearest = nearest_other(d)
                picks.append(tokens.index(start) if start in tokens else int((nearest == nearest.max()).nonzero()[0]))
                continue
            nearest = d[picks].amin(0)
            nearest[picks] = -1.0
            picks.append(int((nearest == nearest.max()).nonzero()[0]))
        picks = sorted(picks) if order == "position" else picks
        index[b, : len(picks)] = torch.tensor([tokens[i] for i in picks], dtype=torch.int64)
    return index.to(x.device)


def assert_match(value: Tensor, index: Tensor, a: Tensor, b: Tensor, floor: float, what: str, **options: object) -> None:
    """Every match is as good as the reference's, up to rounding; values belong to their indices, which are different candidates."""
    largest, k = bool(options.get("largest", True)), value.shape[-1]
    similarity = cosine(a.cpu(), b.cpu())
    allowed = allowed_pairs(a, b, options.get("candidates"), bool(options.get("exclude_self")))  # type: ignore[arg-type]
    want = similarity.masked_fill(~allowed, -math.inf if largest else math.inf)
    want = want.sort(dim=-1, descending=largest).values[..., :k]
    value, index = value.cpu().double(), index.cpu()
    count = allowed.sum(-1, keepdim=True).clamp(max=k)
    used = torch.arange(k) < count
    assert bool(((index >= 0) == used).all()), f"{what}: padding"
    assert bool((value[~used] == 0).all()), f"{what}: value of the padding"
    got = similarity.gather(-1, index.clamp(min=0)) if similarity.shape[-1] else value
    assert float((got - value)[used].abs().max() if bool(used.any()) else 0.0) <= floor, f"{what}: values"
    width = want.shape[-1]
    assert float((got[..., :width] - want)[used[..., :width]].abs().max() if bool(used.any()) else 0.0) <= floor, f"{what}: matches"
    assert bool((index.sort(-1).values.diff(dim=-1) != 0)[used[..., 1:].flip(-1)].all()), f"{what}: a match comes twice"
    if similarity.shape[-1]:
        assert bool(allowed.gather(-1, index.clamp(min=0))[used].all()), f"{what}: no candidate"


def assert_diverse(picks: Tensor, x: Tensor, metric: str, floor: float, what: str, candidates: Tensor | None = None) -> None:
    """Every pick (in pick order) is as far as the best token could be, given the picks before it, up to rounding."""
    for b in range(x.shape[0]):
        d = distances(x[b].cpu(), metric)
        out = torch.zeros(x.shape[1], dtype=torch.bool) if candidates is None else ~candidates[b].cpu()
        chosen = [p for p in picks[b].tolist() if p >= 0]
        assert len(set(chosen)) == len(chosen) == min(picks.shape[1], int((~out).sum())), f"{what}: row {b} repeats or lacks picks"
        near = d.clone()
        near.fill_diagonal_(math.inf)
        near[out] = math.inf
        near = near.amin(0)
        for place, pick in enumerate(chosen):
            assert not bool(out[pick]), f"{what}: row {b}, pick {place} is no candidate"
            best = float(near.masked_fill(out, -math.inf).max())
            assert best == float(near[pick]) or best - float(near[pick]) <= floor, f"{what}: row {b}, pick {place}: {near[pick]} < {best}"
            near = d[pick].clone() if place == 0 else torch.minimum(near, d[pick])
            out[pick] = True
