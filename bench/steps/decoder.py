"""Methods that drop tokens between decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokensieve as ts
import torch
from tokensieve.methods import fastv, pyramiddrop, step
from torch import Tensor

from .. import cases, checks, peers
from ..bench_prune import check_prune
from ..harness import Case, Inputs, Settings


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


def _scheduled(name: str) -> Callable[[Settings], Case]:
    """The first stage of a schedule: a FastV step with the schedule's count. No official code was at hand: FastV's map is "eager code"."""

    def build(settings: Settings) -> Case:
        shape = cases.LLAVA15
        k = ts.methods.METHODS[name]().keep_count(0, shape.R)  # type: ignore[attr-defined]

        def ours(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
            done = step.prune_span(query[:, :, -1:], key, tensors[:1], k, shape.image)
            return done.tensors[0], done.index

        def smart(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
            return peers.smart_prune(query[:, :, -1:], key, tensors[:1], k, shape.image)

        def eager(query: Tensor, key: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
            return peers.map_prune(query, key, tensors[:1], k, shape.image, -1, causal=True)

        return _decoder(name, k, ours, smart, eager, settings.device)

    return build


STEPS = {"PyramidDrop": _pyramiddrop, "FastV": _fastv, "GSearch": _scheduled("GSearch"), "PSigmoid": _scheduled("PSigmoid")}
