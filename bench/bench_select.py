"""select_topk: ordered top-k against topk + sort; allocate_budget: token budgets against the methods' own loop."""

from __future__ import annotations

from collections.abc import Iterator

import tokensieve as ts
import torch
from reference.budget import allocate_row
from torch import Tensor

from . import cases, checks, peers
from .harness import Case, Inputs, Settings, Target


def build(settings: Settings) -> Iterator[Case]:
    sizes = [(B, N, k, torch.float32) for B in (1, 8) for N, k in cases.SELECT_SIZES]
    sizes += [(1, 2880, 640, torch.bfloat16), (8, 2880, 640, torch.bfloat16)]  # thousands of ties
    if settings.device == "cuda":
        sizes += [(64, N, k, torch.float32) for N, k in ((576, 144), (2880, 640), (4096, 1024))]
    for B, N, k, dtype in sizes:
        yield _case(B, N, k, dtype, settings.device)
    yield _budget(4, 288, "proportional", torch.float32, settings.device)
    yield _budget(96, 12544, "capped", torch.float64, settings.device)


def _case(B: int, N: int, k: int, dtype: torch.dtype, device: str) -> Case:
    def check(inputs: Inputs, output: torch.Tensor, ours: bool) -> str | None:
        return checks.selection(inputs[0], output, k, exact=ours)

    return Case(
        op="select_topk",
        case=f"{N} keep {k}, B={B}",
        dtype=cases.name(dtype),
        inputs=lambda seed: (cases.attention_like(seed, B, N, dtype, device), k),
        ours=ts.select_topk,
        peers={"topk+sort": peers.topk_sort},
        compiled="topk+sort",
        check=check,
        bytes=B * (N * dtype.itemsize + k * 8),
        quick=(B, N) in ((1, 576), (1, 2880)),
        targets=(
            Target(6, "topk+sort"),
            *([Target(4, of="median_us", device="cuda")] if N <= 4096 else []),
        ),
    )


def _budget(parts: int, total: int, mode: str, dtype: torch.dtype, device: str) -> Case:
    """HiRED's crops in float32; QuoTA's frames of 27 x 27 tokens in float64."""
    cap = 576 if mode == "proportional" else 729

    def proportional(weights: Tensor) -> Tensor:
        return (weights / weights.sum(1, keepdim=True) * total).long().clamp(max=cap)

    def host_loop(weights: Tensor) -> Tensor:
        return torch.tensor([allocate_row(row, total, mode, [cap] * parts)[0] for row in weights.cpu().numpy()], device=weights.device)

    def check(inputs: Inputs, output: Tensor, ours: bool) -> str | None:
        return checks.equal(output, host_loop(inputs[0]))

    return Case(
        op="allocate_budget",
        case=f"{parts} parts, {total} tokens, {mode}",
        dtype=cases.name(dtype),
        inputs=lambda seed: (cases.randn(seed, 1, parts, device=device).square().mul(100).round().to(dtype),),
        ours=lambda weights: ts.allocate_budget(weights, total, mode=mode, cap=cap),
        peers={"eager": proportional} if mode == "proportional" else {"host loop": host_loop},
        check=check,
        bytes=parts * (2 * dtype.itemsize + 8),
        quick=True,
    )
