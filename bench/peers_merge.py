"""Eager merging, from the formulas of the specs: what the methods' code does, and the best that a few torch calls do."""

from __future__ import annotations

import torch
from torch import Tensor

from .peers import unit

Parts = tuple[Tensor, Tensor, Tensor]  # even tokens that stay, even tokens that leave, the odd tokens that they go to; (B, n, 1)


def tome_match(metric: Tensor, r: int, cls: bool = True) -> Parts:
    """Even against odd tokens by a matrix of cosines; the r most similar even tokens leave."""
    m = metric / metric.norm(dim=-1, keepdim=True)
    pairs = m[:, ::2] @ m[:, 1::2].transpose(1, 2)
    if cls:
        pairs[:, 0] = -torch.inf
    best, to = pairs.max(2)
    rank = best.argsort(dim=1, descending=True)[..., None]
    stay, leave = rank[:, r:].sort(1).values, rank[:, :r]
    return stay, leave, to[..., None].gather(1, leave)


def tome_merge(x: Tensor, parts: Parts, mode: str) -> Tensor:
    stay, leave, to = parts
    C = x.shape[2]
    even, odd = x[:, ::2], x[:, 1::2]
    moved = even.gather(1, leave.expand(-1, -1, C))
    return torch.cat([even.gather(1, stay.expand(-1, -1, C)), odd.scatter_reduce(1, to.expand(-1, -1, C), moved, reduce=mode)], 1)


def tome_weighted(x: Tensor, size: Tensor, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
    total = tome_merge(size, parts, "sum")
    return tome_merge(x * size, parts, "sum") / total, total, total.log()


def rows_weighted(x: Tensor, size: Tensor, inverse: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the map of tokens to rows: one index_add of x and one of the sizes."""
    B, _, C = x.shape
    flat = (inverse + torch.arange(B, device=x.device)[:, None] * rows).flatten()
    total = size.new_zeros(B * rows, 1).index_add_(0, flat, size.flatten(0, 1))
    out = x.new_zeros(B * rows, C).index_add_(0, flat, (x * size).flatten(0, 1)) / total
    return out.view(B, rows, C), total.view(B, rows, 1), total.log().view(B, rows, 1)


def evit_fuse(x: Tensor, scores: Tensor, index: Tensor) -> Tensor:
    """The complement by a mask and a stable sort, a gather, a weighted sum."""
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True)
    rest = kept.int().argsort(dim=1, stable=True)[:, : x.shape[1] - index.shape[1]]
    return (x.gather(1, rest[..., None].expand(-1, -1, x.shape[2])) * scores.gather(1, rest)[..., None]).sum(1, keepdim=True)


def evit_masked(x: Tensor, scores: Tensor, index: Tensor) -> Tensor:
    """The scores of kept tokens set to 0, then one matrix product."""
    return scores.scatter(1, index, 0.0)[:, None] @ x


def label_means(x: Tensor, labels: Tensor, rows: int) -> Tensor:
    """One-hot matrix product, as DPC-KNN merging and VisionZip do."""
    hot = torch.nn.functional.one_hot(labels, rows).to(x.dtype)
    return (hot.transpose(1, 2) @ x) / hot.sum(1)[..., None].clamp(min=1)


def label_adds(x: Tensor, labels: Tensor, rows: int) -> Tensor:
    out = x.new_zeros(x.shape[0], rows, x.shape[2])
    out.scatter_add_(1, labels[..., None].expand_as(x), x)
    return out / x.new_zeros(x.shape[0], rows).scatter_add_(1, labels, torch.ones_like(x[..., 0])).clamp(min=1)[..., None]


def prumerge_lists(x: Tensor, metric: Tensor, centers: Tensor, weights: Tensor, neighbors: int) -> Tensor:
    """Every centre's nearest others from the matrix of cosines, gathered (B, K, neighbors, C) and summed."""
    m = unit(metric)
    pairs = m.gather(1, centers[..., None].expand(-1, -1, m.shape[2])) @ m.transpose(1, 2)
    near = pairs.scatter(2, centers[..., None], -torch.inf).topk(neighbors).indices
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, centers] + (x[rows[..., None], near] * weights.gather(1, near.flatten(1)).view(near.shape)[..., None]).sum(2)
