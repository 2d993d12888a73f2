"""merge_tokens and a ToMe layer's whole bookkeeping, AIM's frames, EViT's fused token, cluster means, PruMerge's lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tokensieve as ts
import torch
from torch import Tensor

from . import cases, checks, peers_merge
from .harness import Case, Inputs, Settings, Target

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LAYERS = ((1, 577, 1024, 64, 8), (1, 729, 1152, 72, 23), (8, 197, 384, 64, 13))  # (B, N, C, D, r): CLIP-L, SigLIP, ViT-S/16


def build(settings: Settings) -> Iterator[Case]:
    for layer in LAYERS:
        yield _merge(*layer, torch.float32, settings.device)
        yield _layer(*layer, settings.device)
    yield _merge(*LAYERS[0], torch.bfloat16, settings.device)
    yield _frames(32, 196, cases.VIDEO_12K.C, settings.device)
    yield _unmerge(1, 4096, 320, 2048, settings.device)
    yield _fuse(8, 197, 384, 98, settings.device)
    yield _fuse(1, cases.CLIP.N, cases.CLIP.C, 288, settings.device)
    yield _labels(1, 576, 4096, 64, settings.device)
    yield _lists(1, 576, 1024, 32, settings.device)


def _same(want: Callable[[Inputs], Any], dtype: torch.dtype = torch.float32) -> Callable[[Inputs, Any, bool], str | None]:
    """The output (a tensor, or a tuple of which the tensors count) is near `want` of the inputs in float64."""

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        expected = want(tuple(i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs))
        if isinstance(expected, Tensor):
            return checks.near(output, expected, TOLERANCE[dtype])
        for o, e in zip(output, expected, strict=True):
            if wrong := checks.near(o, e, TOLERANCE[dtype]):
                return wrong
        return None

    return check


def _merge(B: int, N: int, C: int, D: int, r: int, dtype: torch.dtype, device: str) -> Case:
    """A plan is given; sizes, their logs and the tokens come out."""

    def inputs(seed: int) -> Inputs:
        plan = ts.bipartite_match(cases.randn(seed, B, N, D, device=device), r, keep=1)
        size = cases.randn(seed + 1, B, N, 1, device=device).abs() + 1
        return cases.randn(seed + 2, B, N, C, dtype=dtype, device=device), size, plan

    def parts(plan: ts.MergePlan) -> tuple[Tensor, Tensor, Tensor]:
        stay, leave = plan.index[:, : (N + 1) // 2 - r], plan.source
        return (stay // 2)[..., None], (leave // 2)[..., None], (plan.destination // 2)[..., None]

    def ours(x: Tensor, size: Tensor, plan: ts.MergePlan) -> tuple[Tensor, Tensor, Tensor]:
        merged = ts.merge_tokens(x, plan, size=size, mode="weighted")
        return merged.tensors, merged.size[..., None], merged.log_size[..., None]

    def eager(x: Tensor, size: Tensor, plan: ts.MergePlan) -> tuple[Tensor, Tensor, Tensor]:
        return peers_merge.tome_weighted(x, size.to(x.dtype), parts(plan))

    def adds(x: Tensor, size: Tensor, plan: ts.MergePlan) -> tuple[Tensor, Tensor, Tensor]:
        return peers_merge.rows_weighted(x, size.to(x.dtype), plan.inverse, N - r)

    return Case(
        op="merge_tokens",
        case=f"{B}x{N}x{C}, r={r}, weighted",
        dtype=cases.name(dtype),
        inputs=inputs,
        ours=ours,
        peers={"smart eager": adds, "eager code": eager},
        compiled="smart eager" if dtype == torch.float32 else None,
        check=_same(lambda i: adds(*i), dtype),
        bytes=B * ((2 * N - r) * C * dtype.itemsize + 8 * N + 12 * N),
        flops=2 * B * r * C,
        quick=N < 600,
        targets=(Target(3, "eager code"),),
    )


def _layer(B: int, N: int, C: int, D: int, r: int, device: str) -> Case:
    """Match, merge by size, new sizes and their logs: all that ToMe adds to a block."""

    def inputs(seed: int) -> Inputs:
        size = cases.randn(seed + 1, B, N, 1, device=device).abs() + 1
        return cases.randn(seed + 2, B, N, C, device=device), cases.randn(seed, B, N, D, device=device), size

    def ours(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        merged = ts.merge_tokens(x, ts.bipartite_match(metric, r, keep=1), size=size, mode="weighted")
        return merged.tensors, merged.size[..., None], merged.log_size[..., None]

    def eager(x: Tensor, metric: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return peers_merge.tome_weighted(x, size, peers_merge.tome_match(metric, r))

    return Case(
        op="merge_tokens",
        case=f"ToMe layer {B}x{N}x{C}, keys of {D}, r={r}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": eager},
        compiled="eager code",
        check=_same(lambda i: eager(*i)),
        bytes=B * ((2 * N - r) * C + N * D + 5 * N) * 4,
        flops=2 * B * (N // 2) * (N - N // 2) * D,
        quick=N < 600,
        calls=True,
        targets=(Target(3, "eager code"),),
    )


def _frames(T: int, N: int, C: int, device: str) -> Case:
    """AIM: half of each frame's tokens merge into the other half, the tokens themselves are compared."""

    def ours(x: Tensor) -> Tensor:
        merged: Tensor = ts.merge_tokens(x, ts.bipartite_match(x, N // 2)).tensors
        return merged

    def eager(x: Tensor) -> Tensor:
        return peers_merge.tome_merge(x, peers_merge.tome_match(x, N // 2, cls=False), "mean")

    return Case(
        op="merge_tokens",
        case=f"AIM {T} frames of {N}x{C}, match and merge",
        dtype="f32",
        inputs=lambda seed: (cases.randn(seed, T, N, C, device=device),),
        ours=ours,
        peers={"eager code": eager},
        check=_same(lambda i: eager(*i)),
        bytes=T * (N + N // 2) * C * 4,
        flops=2 * T * (N // 2) ** 2 * C,
        targets=(Target(2.5, "eager code"),),
    )


def _unmerge(B: int, N: int, C: int, r: int, device: str) -> Case:
    """ToMeSD: an attention's output back to all tokens."""

    def inputs(seed: int) -> Inputs:
        plan = ts.bipartite_match(cases.randn(seed, B, N, 64, device=device), r)
        return cases.randn(seed + 1, B, N - r, C, device=device), plan

    def rows(x: Tensor, plan: ts.MergePlan) -> Tensor:
        return x.gather(1, plan.inverse[..., None].expand(-1, -1, C))

    return Case(
        op="unmerge_tokens",
        case=f"{N - r} to {N}x{C}",
        dtype="f32",
        inputs=inputs,
        ours=ts.unmerge_tokens,
        peers={"torch.gather": rows},
        check=lambda i, output, ours: checks.equal(output, rows(*i)),
        bytes=B * (2 * N - r) * C * 4,
    )


def _fuse(B: int, N: int, C: int, k: int, device: str) -> Case:
    """EViT: the tokens that are not kept, weighted by their scores."""

    def inputs(seed: int) -> Inputs:
        scores = cases.attention_like(seed, B, N, device=device)
        return cases.randn(seed, B, N, C, device=device), scores, scores.topk(k).indices

    return Case(
        op="fuse_dropped",
        case=f"{B}x{N}x{C}, keep {k}",
        dtype="f32",
        inputs=inputs,
        ours=ts.fuse_dropped,
        peers={"smart eager": peers_merge.evit_masked, "eager code": peers_merge.evit_fuse},
        check=_same(lambda i: peers_merge.evit_masked(*i)),
        bytes=B * (N - k) * C * 4,
        flops=2 * B * (N - k) * C,
        quick=True,
    )


def _labels(B: int, N: int, C: int, rows: int, device: str) -> Case:
    """Cluster means."""

    def inputs(seed: int) -> Inputs:
        labels = cases.randn(seed, B, N, rows, device=device).argmax(2)
        return cases.randn(seed, B, N, C, device=device), labels, rows

    return Case(
        op="merge_by_label",
        case=f"{N} to {rows} means, C={C}",
        dtype="f32",
        inputs=inputs,
        ours=lambda x, labels, rows: ts.merge_by_label(x, labels, rows)[0],
        peers={"smart eager": peers_merge.label_means, "eager code": peers_merge.label_adds},
        check=_same(lambda i: peers_merge.label_means(*i)),
        bytes=B * (N + rows) * C * 4,
        flops=B * N * C,
        quick=True,
    )


def _lists(B: int, N: int, C: int, K: int, device: str) -> Case:
    """PruMerge: every centre takes the attention-weighted sum of its 32 nearest others."""

    def inputs(seed: int) -> Inputs:
        weights = cases.attention_like(seed, B, N, device=device)
        x, metric = cases.randn(seed, B, N, C, device=device), cases.randn(seed + 1, B, N, C, device=device)
        return x, metric, weights.topk(K).indices, weights, 32

    def ours(x: Tensor, metric: Tensor, centers: Tensor, weights: Tensor, neighbors: int) -> Tensor:
        return ts.merge_into_nearest(x, metric, centers, weights=weights, neighbors=neighbors, mode="sum").tensors

    return Case(
        op="merge_into_nearest",
        case=f"PruMerge {N}x{C}, {K} centres of 32",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": peers_merge.prumerge_lists},
        check=_same(lambda i: peers_merge.prumerge_lists(*i)),
        bytes=B * (2 * N + K) * C * 4,
        flops=2 * B * K * (N + 32) * C,
        quick=True,
    )
