"""Seeded inputs of the op tests."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
SCORE_KINDS = ("normal", "duplicates", "equal", "special", "ascending", "descending", "negative", "neighbours")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).to(device)


def randn(seed: int, *shape: int) -> Tensor:
    return normal(seeded(seed), *shape)


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """Uniform in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def log_uniform(generator: torch.Generator, low: int, high: int) -> int:
    """Small sizes as often as large ones."""
    exponent = torch.rand((), generator=generator) * torch.log(torch.tensor(high / low + 1.0))
    return min(high, max(low, int(low * torch.exp(exponent)) - (low == 1)))


def queries_and_keys(
    generator: torch.Generator,
    B: int,
    H: int,
    Hkv: int,
    L: int,
    N: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tokens_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, H, L, D) and (B, Hkv, N, D); tokens_first stores them as (B, tokens, heads, D), as a projection gives them."""
    if tokens_first:
        query = normal(generator, B, L, H, D, dtype=dtype, device=device).transpose(1, 2)
        return query, normal(generator, B, N, Hkv, D, dtype=dtype, device=device).transpose(1, 2)
    return normal(generator, B, H, L, D, dtype=dtype, device=device), normal(generator, B, Hkv, N, D, dtype=dtype, device=device)


def scores(generator: torch.Generator, kind: str, B: int, N: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """(B, N) scores of one of SCORE_KINDS: ties, special values, sorted rows, values one unit in the last place apart."""
    if kind == "normal":
        x = torch.randn(B, N, generator=generator)
    elif kind == "duplicates":
        x = torch.randint(-2, 3, (B, N), generator=generator).float()
    elif kind == "equal":
        x = torch.full((B, N), 0.25)
    elif kind == "special":
        info = torch.finfo(dtype)
        values = [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, info.max, info.min]
        values += [info.tiny, -info.tiny, info.smallest_normal / 2, -info.smallest_normal / 2]
        x = torch.tensor(values, dtype=torch.float64)[torch.randint(0, len(values), (B, N), generator=generator)]
    elif kind in ("ascending", "descending"):
        x = torch.arange(N, dtype=torch.float32).mul(2.0 / max(N, 1)).expand(B, N)
        x = x.flip(1) if kind == "descending" else x
    elif kind == "negative":
        x = -torch.rand(B, N, generator=generator).pow(8)
    else:  # neighbours: consecutive bit patterns around 1
        bits = torch.randint(-4, 5, (B, N), generator=generator)
        width = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}[dtype]
        one = int(torch.ones((), dtype=dtype).view(width))
        return (one + bits).to(width).view(dtype).to(device)
    return x.to(dtype).contiguous().to(device)
