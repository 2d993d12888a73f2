"""Selections whose size depends on the scores, and what goes with them: top-p, threshold, quantiles, samples, complement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import ops as reference
from torch import Tensor

from . import cases, checks
from .harness import Case, Inputs, Settings, Target

SIZES = (577, 12544, 50176)


def build(settings: Settings) -> Iterator[Case]:
    for B, N in ((1, 577), (8, 577), (1, 12544), (1, 50176)):
        yield _mass(B, N, 0.9, settings.device)
    for N in SIZES:
        yield _threshold(N, settings.device)
        yield _quantiles(N, settings.device)
        yield _complement(N, settings.device)
    yield _samples(196, settings.device)


def top_p(scores: Tensor, mass: float) -> tuple[Tensor, Tensor]:
    """sort + cumsum, the positions ascending behind a mask, and how many there are: what methods write."""
    values, index = scores.sort(dim=1, descending=True)
    held = values.cumsum(1)
    beyond = held - values >= mass * held[:, -1:]
    return index.masked_fill(beyond, scores.shape[1]).sort(dim=1).values, (~beyond).sum(1)


def _mass(B: int, N: int, mass: float, device: str) -> Case:
    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        held = inputs[0].double().sort(dim=1, descending=True).values.cumsum(1)
        want = (held < mass * held[:, -1:]).sum(1) + 1
        index, counts = output[:2]
        slack = 0 if ours else 2  # a float32 cumsum of 50k values may be off by a token
        if int((counts - want).abs().max()) > slack:
            return f"counts {counts.tolist()}, want {want.tolist()}"
        kept = reference.select_topk(inputs[0].cpu(), counts.cpu(), max_k=N).to(index.device)
        return checks.equal(index, kept) if ours else None

    return Case(
        op="select_mass",
        case=f"{N} top-p {mass}, B={B}",
        dtype="f32",
        inputs=lambda seed: (cases.attention_like(seed, B, N, device=device),),
        ours=lambda scores: ts.select_mass(scores, mass, capacity=N),
        peers={"sort+cumsum": lambda scores: top_p(scores, mass)},
        compiled="sort+cumsum",
        check=check,
        bytes=B * N * 12,
        quick=(B, N) == (1, 577),
        targets=(Target(8, "sort+cumsum"),),
    )


def _threshold(N: int, device: str) -> Case:
    tau = 1.0 / N

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        want = (inputs[0] > tau).nonzero()[:, 1]
        return checks.equal(output.index[0, : len(want)] if ours else output[:, 1], want)

    return Case(
        op="select_threshold",
        case=f"{N} above 1/N",
        dtype="f32",
        inputs=lambda seed: (cases.attention_like(seed, 1, N, device=device),),
        ours=lambda scores: ts.select_threshold(scores, tau, capacity=N),
        peers={"nonzero": lambda scores: (scores > tau).nonzero()},
        check=check,
        bytes=N * 12,
        quick=N == 577,
    )


def _quantiles(N: int, device: str) -> Case:
    levels = torch.tensor([0.25, 0.75], device=device)

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        return checks.near(output, torch.quantile(inputs[0].double(), levels.double(), dim=1).T, 1e-4)

    return Case(
        op="score_quantiles",
        case=f"{N}, quartiles",
        dtype="f32",
        inputs=lambda seed: (cases.attention_like(seed, 1, N, device=device),),
        ours=lambda scores: ts.score_quantiles(scores, (0.25, 0.75)),
        peers={"torch.quantile": lambda scores: torch.quantile(scores, levels, dim=1).T},
        check=check,
        bytes=N * 4,
        quick=N == 577,
    )


def _complement(N: int, device: str) -> Case:
    def masked(index: Tensor) -> Tensor:
        left = torch.ones(index.shape[0], N, dtype=torch.bool, device=index.device).scatter_(1, index, False)
        return left.nonzero()[:, 1].view(index.shape[0], -1)

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        return checks.equal(output, reference.complement_index(inputs[0], N, N - N // 4))

    return Case(
        op="complement_index",
        case=f"{N} less {N // 4}",
        dtype="i64",
        inputs=lambda seed: (cases.random_index(seed, 1, N, N // 4, device=device),),
        ours=lambda index: ts.complement_index(index, N),
        peers={"mask+nonzero": masked},
        check=check,
        bytes=N * 8,
        quick=N == 577,
    )


def _samples(N: int, device: str) -> Case:
    """The first pruning block of ATS on DeiT: 196 tokens, 196 points."""

    def eager(scores: Tensor) -> list[Tensor]:
        ordered, where = scores.sort(dim=1)
        cdf = ordered.cumsum(1)
        cdf = (cdf - cdf[:, :1]) / (cdf[:, -1:] - cdf[:, :1])
        start = cdf.where(cdf > 0, torch.inf).amin(1, keepdim=True)
        points = start + (1 - start) * torch.arange(N, device=scores.device) / (N - 1)
        picks = (points[:, :, None] - cdf[:, None]).abs().argmin(2)
        return [where[b][picks[b].unique()] for b in range(scores.shape[0])]

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        want = eager(inputs[0].double())
        got = [row[:n] for row, n in zip(output.index, output.counts.tolist(), strict=True)] if ours else output
        different = sum(len(set(g.tolist()) ^ set(w.tolist())) for g, w in zip(got, want, strict=True))
        return f"{different} picks differ" if different > 4 * len(want) else None  # float32 against float64: a point between two tokens

    return Case(
        op="select_samples",
        case=f"{N} by {N} points, B=8",
        dtype="f32",
        inputs=lambda seed: (cases.attention_like(seed, 8, N, device=device),),
        ours=lambda scores: ts.select_samples(scores, N),
        peers={"eager ATS": eager},
        check=check,
        bytes=8 * N * 12,
        quick=True,
    )
