"""select_diverse, cluster_tokens, cosine_match and cosine_scores: DivPrune, DPC-KNN, ToMe's halves, text against image, Turbo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import density, similarity
from torch import Tensor

from . import cases, checks, peers
from .harness import Case, Inputs, Settings, Target

SLACK = 1e-5  # a pick may be nearer than the best one by this much: float32 distances over 4096 channels


def build(settings: Settings) -> Iterator[Case]:
    for N, k, C in cases.DIVERSE_SIZES:
        yield _diverse(N, k, C, torch.float32, settings.device)
    yield _diverse(*cases.DIVERSE_SIZES[0], torch.bfloat16, settings.device)
    for N, C in ((cases.SIGLIP.N, cases.SIGLIP.C), (cases.LLAVA_NEXT.R, cases.CLIP.C)):
        yield _clusters(N, C, settings.device)
    for shape, C in ((cases.CLIP, cases.CLIP.D), (cases.SIGLIP, cases.SIGLIP.C)):
        yield _halves(shape.N, C, settings.device)
    yield _text(32, cases.LLAVA_NEXT.R, cases.LLAVA_NEXT.C, settings.device)
    yield _redundancy(cases.CLIP.N, cases.CLIP.C, settings.device)


def _diverse(N: int, k: int, C: int, dtype: torch.dtype, device: str) -> Case:
    distances: dict[int, Tensor] = {}

    def check(inputs: Inputs, output: Tensor, ours: bool) -> str | None:
        """Every pick, in float64, is the farthest from the picks before it."""
        x = inputs[0]
        if 0 not in distances:
            distances[0] = similarity.distances(x[0].cpu(), "cosine")
        d, best = distances[0], 0.0
        if output.shape != (1, k) or output[0].unique().numel() != k:
            return f"{tuple(output.shape)} is not {k} different tokens"
        near = similarity.nearest_other(d)
        left = torch.ones(N, dtype=torch.bool)
        for place, pick in enumerate(output[0].tolist()):
            best = max(best, float(near[left].max()) - float(near[pick]))
            near = d[pick].clone() if place == 0 else torch.minimum(near, d[pick])
            left[pick] = False
        return None if best <= (SLACK if ours else 50 * SLACK) else f"a pick is nearer than the farthest token by {best:.2g}"

    return Case(
        op="select_diverse",
        case=f"{N} keep {k}, C={C}",
        dtype=cases.name(dtype),
        inputs=lambda seed: (cases.randn(seed, 1, N, C, dtype=dtype, device=device), k),
        ours=lambda x, k: ts.select_diverse(x, k, order="pick"),
        peers={"incremental eager": peers.diverse_incremental, "eager code": peers.diverse_loop},
        check=check,
        bytes=N * C * dtype.itemsize + k * N * 4,
        flops=N * N * C,
        quick=N < 1000,
        targets=(Target(1.8 if N < 1000 else 2.5, "incremental eager"), *([Target(20, "eager code")] if N > 1000 else [])),
        skipped={"torch.compile": f"it unrolls the {k} picks"},
    )


def _clusters(N: int, C: int, device: str) -> Case:
    """DPC-KNN: a quarter of the tokens as centres, and every token's cluster."""
    K = N // 4

    def inputs(seed: int) -> Inputs:  # around centres of their own, so that rounding decides nothing
        near = cases.randn(seed, 1, N // 8 + 1, C, device=device).repeat_interleave(8, 1)[:, :N]
        return (near + 0.4 * cases.randn(seed + 1, 1, N, C, device=device),)

    def check(inputs: Inputs, output: tuple[Tensor, ...], ours: bool) -> str | None:
        index, labels = (t.cpu() for t in output[:2])
        d = density.distances(inputs[0])
        own = d[0, index[0], :].gather(0, labels)[0]
        if index[0].unique().numel() != K:
            return f"{index[0].unique().numel()} centres, want {K}"
        score = density.density(inputs[0], 5) * density.denser_distance(inputs[0], density.density(inputs[0], 5))
        return checks.near(score[0, index[0]], score.topk(K).values[0], 1e-4) or checks.near(own, d[0, index[0]].amin(0), 1e-4)

    return Case(
        op="cluster_tokens",
        case=f"{N} to {K}, C={C}",
        dtype="f32",
        inputs=inputs,
        ours=lambda x: ts.cluster_tokens(x, K),
        peers={"eager code": lambda x: peers.density_clusters(x, K, 5)},
        compiled="eager code",
        check=check,
        bytes=N * C * 4 + N * 16,
        flops=N * N * C + 2 * N * K * C,
        quick=N < 1000,
        targets=(Target(3, "eager code"),),
    )


def _match_check(exclude_self: bool = False) -> Callable[[Inputs, Any, bool], str | None]:
    def check(inputs: Inputs, output: tuple[Tensor, Tensor], ours: bool) -> str | None:
        a, b = (t.cpu() for t in inputs)
        pairs = similarity.cosine(a, b)
        if exclude_self:
            pairs.diagonal(dim1=1, dim2=2).fill_(-2.0)
        value, index = (t.cpu() for t in output)
        chosen = pairs.gather(2, index[..., None])[..., 0]
        return checks.near(value, pairs.amax(2), 1e-5) or checks.near(chosen, pairs.amax(2), 1e-5)

    return check


def _halves(N: int, C: int, device: str) -> Case:
    """ToMe: even tokens look for their best odd one."""

    def inputs(seed: int) -> Inputs:
        x = cases.randn(seed, 1, N, C, device=device)
        return x[:, ::2], x[:, 1::2]

    return Case(
        op="cosine_match",
        case=f"even to odd of {N}, C={C}",
        dtype="f32",
        inputs=inputs,
        ours=ts.cosine_match,
        peers={"smart eager": peers.best_match},
        compiled="smart eager",
        check=_match_check(),
        bytes=N * C * 4 + N // 2 * 12,
        flops=2 * (N - N // 2) * (N // 2) * C,
        quick=C < 100,
        targets=(Target(1.5, "smart eager"),),
    )


def _text(M: int, N: int, C: int, device: str) -> Case:
    """The best image token of every text token."""
    return Case(
        op="cosine_match",
        case=f"{M} text rows to {N}, C={C}",
        dtype="f32",
        inputs=lambda seed: (cases.randn(seed, 1, M, C, device=device), cases.randn(seed + 1, 1, N, C, device=device)),
        ours=ts.cosine_match,
        peers={"smart eager": peers.best_match},
        compiled="smart eager",
        check=_match_check(),
        bytes=(M + N) * C * 4 + M * 12,
        flops=2 * M * N * C,
    )


def _redundancy(N: int, C: int, device: str) -> Case:
    """Turbo: mean similarity of every token to all others."""

    def check(inputs: Inputs, output: Tensor, ours: bool) -> str | None:
        return checks.near(output.cpu(), similarity.cosine_scores(*inputs, exclude_self=True), 1e-4)

    def inputs(seed: int) -> Inputs:
        x = cases.randn(seed, 1, N, C, device=device)
        return x, x

    return Case(
        op="cosine_scores",
        case=f"mean to the others, {N}, C={C}",
        dtype="f32",
        inputs=inputs,
        ours=lambda a, b: ts.cosine_scores(a, b, exclude_self=True),
        peers={"smart eager": peers.mean_similarity},
        compiled="smart eager",
        check=check,
        bytes=2 * N * C * 4 + N * 4,
        flops=4 * N * C,
        quick=True,
        targets=(Target(4, "smart eager"),),
    )
