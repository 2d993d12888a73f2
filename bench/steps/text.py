"""Methods that choose by the text, and fusion without softmax."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import methods
from tokensieve.methods import ademvl, mirage, slime
from torch import Tensor

from .. import cases, checks
from ..harness import Case, Inputs, Settings


def _mirage(settings: Settings) -> Case:
    method, images, tokens, C = methods.MIRAGE(top_k=5), 1000, 32, 1024

    def inputs(seed: int) -> Inputs:
        return cases.randn(seed, 1, images, tokens, C, device=settings.device), cases.randn(
            seed + 1, 1, images, device=settings.device
        ).sigmoid()

    def ours(blocks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return mirage.keep_images(blocks, scores, method)

    def eager(blocks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        k = method.top_k if bool((scores >= method.threshold).any()) else 1
        relevance = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(k, 1).indices, True)
        index = relevance[0].nonzero()[:, 0]
        return torch.stack([blocks[0, n] for n in index.tolist()])[None], index[None]

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        return checks.selection(inputs[1], output[1], method.top_k, exact=is_ours) or checks.copies([inputs[0]], output[1], [output[0]])

    return Case(
        op="MIRAGE",
        case=f"{method.top_k} of {images} images of {tokens} x {C}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": eager},
        check=check,
        bytes=8 * method.top_k * tokens * C + 4 * images,
        quick=True,
    )


def _ademvl(settings: Settings) -> Case:
    method, L, N, C = methods.ADEMVL(), 64, 320, 4096

    def inputs(seed: int) -> Inputs:
        hidden, visual = (cases.randn(seed + i, 1, rows, C, device=settings.device) for i, rows in enumerate((L, N)))
        return hidden, 0.1 * visual, *(0.1 * cases.randn(seed + 2 + i, 1, N, C, device=settings.device) for i in range(2))

    def ours(hidden: Tensor, visual: Tensor, e1: Tensor, e2: Tensor) -> Tensor:
        return ademvl.fuse(hidden, visual, e1, e2, method)

    def eager(hidden: Tensor, visual: Tensor, e1: Tensor, e2: Tensor) -> Tensor:
        silu = torch.nn.functional.silu
        scores = silu(hidden) @ silu(visual + e1).transpose(1, 2)
        limit = scores.sort(-1).values[..., int(method.drop * N)][..., None]
        return torch.where(scores < limit, 0.0, scores) @ (visual + e2)

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        return checks.near(output, eager(*(x.double() for x in inputs)), 1e-3)  # two scores near the limit may swap

    return Case(
        op="ADEMVL",
        case=f"{L} text rows, {N} visual tokens x {C}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": eager},
        check=check,
        bytes=4 * C * (2 * L + 3 * N),
        flops=4 * L * N * C,
        quick=True,
    )


def _slime(settings: Settings) -> Case:
    method, N, L, C = methods.SliME(), 576, 64, 4096

    def inputs(seed: int) -> Inputs:
        return tuple(cases.randn(seed + i, 1, rows, C, device=settings.device) for i, rows in enumerate((N, L)))

    def ours(tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return slime.keep_relevant(tokens, text, method)

    def eager(tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        similarity = torch.cosine_similarity(tokens[0][:, None], text[0][None], dim=-1).mean(1)
        p, order = torch.softmax(similarity / method.temperature, 0).sort(descending=True)
        index = order[: int((p.cumsum(0) <= method.top_p).sum()) + 1].sort().values
        return tokens[:, index], index[None], torch.tensor([len(index)])

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        want = eager(*(x.double() for x in inputs))[1]
        n = int(output[2])
        if abs(n - want.shape[1]) > 1 or len(set(want[0].tolist()) & set(output[1][0, :n].tolist())) < n - 2:  # equal at the cut
            return f"{n} tokens are kept, want {want.shape[1]}"
        return checks.copies([inputs[0]], output[1], [output[0]])

    return Case(
        op="SliME",
        case=f"{N} tokens, {L} text tokens x {C}, top-p {method.top_p}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": eager},
        check=check,
        bytes=4 * C * (3 * N + L),
        flops=2 * N * C,
        quick=True,
    )


STEPS = {"MIRAGE": _mirage, "ADEMVL": _ademvl, "SliME": _slime}
