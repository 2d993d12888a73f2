"""select_topk: ordered top-k against topk + sort."""

from __future__ import annotations

from collections.abc import Iterator

import tokensieve as ts
import torch

from . import cases, checks, peers
from .harness import Case, Inputs, Settings, Target


def build(settings: Settings) -> Iterator[Case]:
    sizes = [(B, N, k, torch.float32) for B in (1, 8) for N, k in cases.SELECT_SIZES]
    sizes += [(1, 2880, 640, torch.bfloat16), (8, 2880, 640, torch.bfloat16)]  # thousands of ties
    if settings.device == "cuda":
        sizes += [(64, N, k, torch.float32) for N, k in ((576, 144), (2880, 640), (4096, 1024))]
    for B, N, k, dtype in sizes:
        yield _case(B, N, k, dtype, settings.device)


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
