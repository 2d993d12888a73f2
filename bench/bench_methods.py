"""The prune step of every registered method against its eager form, at the method's own default budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import ops as reference
from tokensieve.methods import METHODS, fastervlm, fastv, pyramiddrop
from torch import Tensor

from . import cases, checks, peers
from .bench_prune import check_prune
from .harness import Case, Inputs, Settings


def build(settings: Settings) -> Iterator[Case]:
    for name in METHODS:
        if name in STEPS:
            yield STEPS[name](settings)


def missing() -> list[str]:
    """Registered methods that have no row here yet."""
    return [name for name in METHODS if name not in STEPS]


def _decoder(name: str, k: int, ours: Callable[..., Any], smart: Callable[..., Any], eager: Callable[..., Any], device: str) -> Case:
    shape = cases.LLAVA15

    def inputs(seed: int) -> Inputs:
        query, key = cases.queries_keys(seed, shape, 1, shape.N, device=device)
        return query, key, [cases.randn(seed + 2, 1, shape.N, shape.C, device=device), torch.arange(shape.N, device=device).view(1, -1)]

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        tolerance = checks.score_tolerance(torch.float32, is_ours)
        return check_prune(inputs, [output[0]], output[1], shape, k, tolerance)

    K = k + shape.N - shape.R
    return Case(
        op=name,
        case=f"prune step, {shape.label}, {shape.R} keep {k}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"smart eager": smart, "eager code": eager},
        check=check,
        bytes=4 * shape.Hkv * shape.N * shape.D + 8 * K * shape.C + 16 * K,
        flops=2 * shape.H * shape.N * shape.D,
        quick=True,
    )


def _fastv(settings: Settings) -> Case:
    shape, k = cases.LLAVA15, ts.methods.FastV().keep_count(0, cases.LLAVA15.R)

    def ours(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        step = fastv.rank_and_drop(query[:, :, -1:], key, tensors[:1], k, shape.image)
        return step.tensors[0], step.index  # FastV's position ids are the index

    def smart(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return peers.smart_prune(query[:, :, -1:], key, tensors[:1], k, shape.image)

    def eager(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return peers.map_prune(query, key, tensors[:1], k, shape.image, -1, causal=True)

    return _decoder("FastV", k, ours, smart, eager, settings.device)


def _pyramiddrop(settings: Settings) -> Case:
    """The first stage. The official code ranks with one row, no map, then works sample by sample: that is "eager code" here."""
    shape, k = cases.LLAVA15, ts.methods.PyramidDrop().keep_count(0, cases.LLAVA15.R)

    def ours(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        step = pyramiddrop.rank_and_drop(
            query[:, :, -1:],
            key,
            tensors[0],
            image_start=[shape.image[0]],
            image_count=[shape.R],
            keep=[k],
            lengths=[shape.N],
        )
        return step.features, step.index

    def smart(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return peers.smart_prune(query[:, :, -1:], key, tensors[:1], k, shape.image)

    def eager(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        return peers.row_prune(query[:, :, -1:], key, tensors[0], k, shape.image)

    return _decoder("PyramidDrop", k, ours, smart, eager, settings.device)


def _fastervlm(settings: Settings) -> Case:
    shape, k, device = cases.CLIP, ts.methods.FasterVLM().tokens, settings.device

    def inputs(seed: int) -> Inputs:
        query, key = cases.queries_keys(seed, shape, 5, shape.N, device=device)
        return query, key, cases.randn(seed + 2, 5, shape.R, shape.C, device=device)

    def ours(query: Tensor, key: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return fastervlm.keep_patches(query[:, :, :1], key, features, k)[:2]

    def smart(query: Tensor, key: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        index = peers.topk_sort(peers.few_row_scores(query[:, :, :1], key, shape.image), k)
        return peers.rows(features, index), index

    def eager(query: Tensor, key: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        return peers.map_mask_prune(query, key, features, k)

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        want = reference.attention_scores(inputs[0][:, :, :1], inputs[1], key_range=shape.image)[0]
        slack = checks.score_tolerance(torch.float32, is_ours)
        return checks.best(want, output[1], (0, shape.R), k, slack) or checks.copies([inputs[2]], output[1], [output[0]])

    return Case(
        op="FasterVLM",
        case=f"prune step, {shape.label}, 5 crops, {shape.R} keep {k}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"smart eager": smart, "eager code": eager},
        check=check,
        bytes=5 * 4 * (shape.Hkv * shape.N * shape.D + 2 * k * shape.C),
        flops=5 * 2 * shape.H * shape.N * shape.D,
        quick=True,
    )


STEPS = {"PyramidDrop": _pyramiddrop, "FastV": _fastv, "FasterVLM": _fastervlm}
