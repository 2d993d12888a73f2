"""attention_scores of all query rows: the attention that every token receives. And attention_pagerank, which walks over the same map."""

from __future__ import annotations

from collections.abc import Iterator

import tokensieve as ts
import torch
from reference import ops as reference
from torch import Tensor

from . import cases, checks, peers
from .cases import Shape
from .harness import Case, Inputs, Settings, Target

SPEEDUP = {"CLIP-L": 8, "SigLIP": 5, "LLaVA-1.5": 7, "LLaVA-NeXT": 8}  # over eager code in float32, on two AVX2 cores
REFERENCE_ROWS = 64  # the float64 map is built for so many rows at a time
AIM = Shape("AIM", 1600, 28, 4, 128, 3584, (15, 1583), 392)  # LLaVA-OneVision-7B: 32 frames of 49 merged tokens, 32 of text


def build(settings: Settings) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for shape, causal in ((cases.CLIP, False), (cases.SIGLIP, False), (cases.LLAVA15, True), (cases.LLAVA_NEXT, True)):
            yield _columns(shape, causal, 1, dtype, settings.device)
    yield _columns(cases.CLIP, False, 8, torch.float32, settings.device)
    yield _pagerank(AIM, settings.device)


def column_scores(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """(B, N) in float64, a few rows of the map at a time."""
    B, _, L, _ = query.shape
    total = torch.zeros(B, key.shape[2], dtype=torch.float64, device=query.device)
    for begin in range(0, L, REFERENCE_ROWS):
        rows = torch.arange(begin, min(L, begin + REFERENCE_ROWS), device=query.device).expand(B, -1)
        part = query[:, :, begin : begin + REFERENCE_ROWS]
        positions = rows if causal else None
        total += reference.attention_scores(part, key, query_positions=positions, query_reduction="sum")[0]
    return total / L


def _columns(shape: Shape, causal: bool, B: int, dtype: torch.dtype, device: str) -> Case:
    wanted: dict[int, Tensor] = {}

    def check(inputs: Inputs, output: Tensor, is_ours: bool) -> str | None:
        if 0 not in wanted:
            wanted[0] = column_scores(*inputs, causal)
        return checks.near(output, wanted[0], checks.score_tolerance(dtype, is_ours))

    visible = shape.N * (shape.N + 1) // 2 if causal else shape.N**2
    held = dtype == torch.float32 and B == 1
    return Case(
        op="attention_scores",
        case=f"{shape.label}, all rows" + (f", B={B}" if B > 1 else ""),
        dtype=cases.name(dtype),
        inputs=lambda seed: cases.queries_keys(seed, shape, B, shape.N, dtype, device),
        ours=lambda query, key: ts.attention_scores(query, key, causal=causal),
        peers={
            "eager code": lambda query, key: peers.map_columns(query, key, causal),
            "chunked eager": lambda query, key: peers.chunked_columns(query, key, causal),
        },
        compiled="eager code",
        check=check,
        bytes=B * (shape.H + shape.Hkv) * shape.N * shape.D * dtype.itemsize + B * shape.N * 4,
        flops=2 * B * shape.H * visible * shape.D,
        quick=shape is cases.CLIP and B == 1 and dtype == torch.float32,
        targets=(*([Target(SPEEDUP[shape.name], "eager code")] if held else []),),
    )


def _pagerank(shape: Shape, device: str) -> Case:
    """AIM: causal, temperature 0.1, five walks."""
    wanted: dict[int, Tensor] = {}
    options = {"causal": True, "temperature": 0.1}

    def check(inputs: Inputs, output: Tensor, is_ours: bool) -> str | None:
        if 0 not in wanted:
            query, key = inputs
            group = shape.H // shape.Hkv
            heads = [
                reference.attention_pagerank(query[:, h : h + 1], key[:, h // group : h // group + 1], **options) for h in range(shape.H)
            ]
            wanted[0] = torch.cat(heads, 1)
        return checks.near(output, wanted[0], 5 * checks.score_tolerance(torch.float32, is_ours))  # errors of five passes add up

    return Case(
        op="attention_pagerank",
        case=f"{shape.label}, 5 iterations",
        dtype="f32",
        inputs=lambda seed: cases.queries_keys(seed, shape, 1, shape.N, torch.float32, device),
        ours=lambda query, key: ts.attention_pagerank(query, key, **options),
        peers={"eager code": lambda query, key: peers.map_pagerank(query, key, 0.1, 5)},
        compiled="eager code",
        check=check,
        bytes=(shape.H + shape.Hkv) * shape.N * shape.D * 4 + shape.H * shape.N * 4,
        flops=5 * shape.H * shape.N * (shape.N + 1) * shape.D,
    )
