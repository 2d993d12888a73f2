"""Merging, one output row and one token at a time, in differentiable torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The two tensors of a MergePlan that merging needs."""

    index: Tensor
    inverse: Tensor


def tokens_of_row(inverse: Tensor, row: int, own: int = -1) -> list[int]:
    """The tokens of an output row of one batch item: its own first, then the others in ascending order."""
    tokens = [n for n, r in enumerate(inverse.tolist()) if r == row]
    return [own, *(n for n in tokens if n != own)] if own >= 0 else tokens


def reduce_tokens(tokens: Tensor, weights: Tensor, mode: str, epsilon: float = 0.0, copies: bool = False) -> Tensor:
    """(L, ...) tokens and their (L,) weights -> (...), in the dtype of tokens, L > 0."""
    first = tokens[0]
    if mode == "amax":
        best = tokens.amax(0)
        equal = (tokens == best) | (tokens.isnan() & best.isnan())
        first_equal = equal & (equal.cumsum(0) == 1)
        return torch.where(first_equal, tokens, torch.zeros_like(tokens)).sum(0).to(tokens.dtype)
    factor = weights.view(-1, *[1] * first.dim())
    if mode in ("sum", "mean", "weighted"):
        total = (factor * tokens).sum(0).to(tokens.dtype)  # int32 sums wrap around
        if mode == "sum":
            return total
        if len(tokens) == 1 and copies:
            return first
        divisor = weights.sum() + epsilon
        return torch.zeros_like(total) if float(divisor.detach()) == 0 else total / divisor
    norms = tokens.flatten(1).norm(dim=1) if first.dim() else tokens.abs()
    own = norms[0]
    return tokens.mean(0) * (norms.max() / own if float(own.detach()) > 0 else 1.0)


def merge_tokens(tensors: Sequence[Tensor], plan: Plan, size: Tensor | None, mode: str) -> tuple[list[Tensor], Tensor]:
    """Every output row in float64 (integers as they are); and the sizes."""
    B, M = plan.index.shape
    N = plan.inverse.shape[1]
    sizes = torch.ones(B, N, dtype=torch.float64) if size is None else size.detach().cpu().double().view(B, N)
    outs = []
    own = plan.index if mode != "amax" else torch.full_like(plan.index, -1)  # the largest: the lowest token id wins
    rows = [[tokens_of_row(plan.inverse[b], r, int(own[b, r])) for r in range(M)] for b in range(B)]
    for t in tensors:
        x = t.double() if t.is_floating_point() else t
        weights = (sizes if mode == "weighted" else torch.ones_like(sizes)).to(x.dtype)
        out = [
            [
                reduce_tokens(x[b, rows[b][r]], weights[b, rows[b][r]].to(x.device), mode, copies=True)
                if rows[b][r]
                else torch.zeros_like(x[b, 0])
                for r in range(M)
            ]
            for b in range(B)
        ]
        outs.append(torch.stack([torch.stack(o) for o in out]) if B and M else x.new_zeros(B, M, *t.shape[2:]))
    total = torch.tensor([[float(sizes[b, rows[b][r]].sum()) for r in range(M)] for b in range(B)], dtype=torch.float64).view(B, M)
    return outs, total


def merge_by_label(x: Tensor, labels: Tensor, rows: int, weights: Tensor | None, mode: str, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Every label in float64."""
    B, N = labels.shape
    values = x.double() if x.is_floating_point() else x
    w = (torch.ones(B, N, device=x.device) if weights is None else weights).double()
    out, total = [], []
    for b in range(B):
        for r in range(rows):
            tokens = tokens_of_row(labels[b], r)
            total.append(w[b, tokens].sum())
            factors = w[b, tokens].to(values.dtype)
            out.append(reduce_tokens(values[b, tokens], factors, mode, epsilon) if tokens else torch.zeros_like(values[b, 0]))
    if not out:
        return values.new_zeros(B, rows, *x.shape[2:]), w.new_zeros(B, rows)
    return torch.stack(out).view(B, rows, *x.shape[2:]), torch.stack(total).view(B, rows)


def fuse_dropped(x: Tensor, weights: Tensor, index: Tensor, normalize: bool = False) -> Tensor:
    """EViT's fused token in float64."""
    labels = torch.zeros(x.shape[:2], dtype=torch.int64)
    for b, kept in enumerate(index.tolist()):
        labels[b, [n for n in kept if n >= 0]] = -1
    return merge_by_label(x, labels, 1, weights, "mean" if normalize else "sum")[0]


def random_plan(generator: torch.Generator, B: int, N: int, M: int, drop: float = 0.0, device: str = "cpu") -> Plan:
    """A plan whose rows stand on M random tokens, the others going to random rows, or nowhere."""
    index, inverse = torch.empty(B, M, dtype=torch.int64), torch.full((B, N), -1)
    for b in range(B):
        index[b] = torch.randperm(N, generator=generator)[:M]
        if M:
            to = torch.randint(0, M, (N,), generator=generator)
            inverse[b] = torch.where(torch.rand(N, generator=generator) < drop, -1, to)
        inverse[b, index[b]] = torch.arange(M)
    return Plan(index.to(device), inverse.to(device))
