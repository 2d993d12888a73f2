"""prune_tokens: score + select + gather, against a few torch calls and against code that builds attention maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import ops as reference
from torch import Tensor

from . import cases, checks, peers
from .cases import Shape
from .harness import Case, Inputs, Settings, Target

MAP_LIMIT = 4 * 2**30  # a larger float32 map is not built: the authors' code needs three of them


def build(settings: Settings) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16) if settings.device == "cuda" else (torch.float32,)
    for dtype in dtypes:
        for shape, k in ((cases.LLAVA15, 288), (cases.LLAVA15, 144), (cases.LLAVA_NEXT, 640)):
            yield case(shape, k, dtype, settings)
        yield case(cases.QWEN_16K, cases.QWEN_16K.keep, dtype, settings)
        yield case(cases.VIDEO_12K, cases.VIDEO_12K.keep, dtype, settings)


def check_prune(inputs: Inputs, tensors: list[Tensor], index: Tensor, shape: Shape, k: int, slack: float) -> str | None:
    """index is what float64 scores of the last row choose (up to rounding at the threshold), and the tensors are exactly those rows."""
    last = inputs[0][:, :, -1:]
    want = reference.attention_scores(last, inputs[1], key_range=shape.image)[0]
    return (
        checks.kept(index, shape.image, shape.N, k)
        or checks.best(want, index, shape.image, k, slack)
        or checks.copies(inputs[2][: len(tensors)], index, tensors)
    )


def case(shape: Shape, k: int, dtype: torch.dtype, settings: Settings) -> Case:
    device = settings.device
    builds_map = 4 * shape.H * shape.N**2 <= MAP_LIMIT

    def inputs(seed: int) -> Inputs:
        query, key = cases.queries_keys(seed, shape, 1, shape.N if builds_map else 1, dtype, device)
        hidden = cases.randn(seed + 2, 1, shape.N, shape.C, dtype=dtype, device=device)
        return query, key, [hidden, torch.arange(shape.N, device=device).view(1, shape.N)]

    def ours(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Any, ...]:
        kept = ts.prune_tokens(query[:, :, -1:], key, tensors, k, key_range=shape.image)
        return (*kept.tensors, kept.index)

    def smart(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return peers.smart_prune(query[:, :, -1:], key, tensors, k, shape.image)

    def eager_code(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return peers.map_prune(query, key, tensors, k, shape.image, -1, causal=True)

    def check(inputs: Inputs, output: tuple[Any, ...], is_ours: bool) -> str | None:
        return check_prune(inputs, list(output[:-1]), output[-1], shape, k, checks.score_tolerance(dtype, is_ours))

    K = k + shape.N - shape.R
    contenders = {"smart eager": smart} | ({"eager code": eager_code} if builds_map else {})
    return Case(
        op="prune_tokens",
        case=f"{shape.label}, {shape.R} keep {k}, hidden {shape.C}",
        dtype=cases.name(dtype),
        inputs=inputs,
        ours=ours,
        peers=contenders,
        compiled="smart eager",
        check=check,
        bytes=shape.Hkv * shape.N * shape.D * dtype.itemsize + 2 * K * (shape.C * dtype.itemsize + 8),
        flops=2 * shape.H * shape.N * shape.D,
        quick=k == 288,
        targets=_targets(shape, dtype),
        skipped={} if builds_map else {"eager code": f"its map would take {4 * shape.H * shape.N**2 / 2**30:.0f} GiB"},
    )


def _targets(shape: Shape, dtype: torch.dtype) -> tuple[Target, ...]:
    if shape is cases.LLAVA15:
        return (Target(2, "smart eager"),)
    if shape is not cases.LLAVA_NEXT:
        return ()
    on_gpu = (Target(14.5, of="median_us", device="cuda"),) if dtype == torch.bfloat16 else ()  # 8 us scores + 6.5 us select and gather
    return (Target(1.5, "smart eager"), Target(100, "eager code"), *on_gpu)
