"""attention_scores of a few rows: CLS, the last token, 16 text rows; and with the gradients to query and key."""

from __future__ import annotations

from collections.abc import Iterator

import tokensieve as ts
import torch
from reference import ops as reference
from torch import Tensor

from . import cases, checks, peers
from .cases import Shape
from .harness import Case, Function, Inputs, Settings, Target

CACHED = 2**25  # keys beyond 32 MB do not stay in the last-level cache of current CPUs: there the bandwidth limit is the target


def build(settings: Settings) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for B in (1, 8):
            yield case(cases.CLIP, "CLS row", B, 1, dtype, settings.device)
        yield case(cases.SIGLIP, "1 row", 1, 1, dtype, settings.device)
        for shape in (cases.LLAVA15, cases.LLAVA_NEXT, cases.QWEN_16K, cases.VIDEO_12K, cases.VIDEO_50K):
            yield case(shape, "last row", 1, 1, dtype, settings.device)
        for shape in (cases.LLAVA15, cases.LLAVA_NEXT):
            yield case(shape, "16 text rows", 1, 16, dtype, settings.device)
        yield training(cases.CLIP, "CLS row", 8, 1, dtype, settings.device)
        yield training(cases.LLAVA15, "16 text rows", 1, 16, dtype, settings.device)


def case(shape: Shape, what: str, B: int, L: int, dtype: torch.dtype, device: str) -> Case:
    causal = L > 1
    wanted: dict[int, Tensor] = {}

    def ours(query: Tensor, key: Tensor) -> Tensor:
        return ts.attention_scores(query, key, causal=causal, key_range=shape.image)

    def smart(query: Tensor, key: Tensor) -> Tensor:
        return peers.few_row_scores(query, key, shape.image, causal)

    def check(inputs: Inputs, output: Tensor, is_ours: bool) -> str | None:
        if 0 not in wanted:
            wanted[0] = reference.attention_scores(*inputs, causal=causal, key_range=shape.image)[0]
        return checks.near(output, wanted[0], checks.score_tolerance(dtype, is_ours))

    key_bytes = B * shape.Hkv * shape.N * shape.D * dtype.itemsize
    small = shape.N <= 640
    return Case(
        op="attention_scores",
        case=f"{shape.label}, {what}" + (f", B={B}" if B > 1 else ""),
        dtype=cases.name(dtype),
        inputs=lambda seed: cases.queries_keys(seed, shape, B, L, dtype, device),
        ours=ours,
        peers={"smart eager": smart},
        compiled="smart eager",
        check=check,
        bytes=key_bytes + B * shape.H * L * shape.D * dtype.itemsize + B * shape.R * 4,
        flops=2 * B * shape.H * L * shape.N * shape.D,
        quick=B == 1 and L == 1 and shape in (cases.CLIP, cases.LLAVA15),
        targets=(
            *([Target(1.5, "smart eager")] if small else []),
            *([Target(0.7, of="floor")] if key_bytes > CACHED else []),
            *([Target(8, of="median_us", device="cuda")] if shape is cases.LLAVA_NEXT and dtype == torch.bfloat16 else []),
        ),
    )


def training(shape: Shape, what: str, B: int, L: int, dtype: torch.dtype, device: str) -> Case:
    """EViT's CLS row, text rows: their scores, and the gradients of a loss on them."""

    def step(scores_of: Function) -> Function:
        def run(query: Tensor, key: Tensor, weights: Tensor) -> Tensor:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (query, key)]
                return torch.cat([g.flatten() for g in torch.autograd.grad((scores_of(*leaves) * weights).sum(), leaves)])

        return run

    def inputs(seed: int) -> Inputs:
        return *cases.queries_keys(seed, shape, B, L, dtype, device), cases.randn(seed + 5, B, shape.R, device=device)

    def check(inputs: Inputs, output: Tensor, is_ours: bool) -> str | None:
        want = step(lambda q, k: reference.attention_scores(q, k, key_range=shape.image)[0])(*(t.double() for t in inputs))
        return checks.near(output, want, max(checks.PEER_TOLERANCE[dtype], checks.score_tolerance(dtype, is_ours)))

    key_bytes = B * shape.Hkv * shape.N * shape.D * dtype.itemsize
    return Case(
        op="attention_scores",
        case=f"{shape.label}, {what} and gradients" + (f", B={B}" if B > 1 else ""),
        dtype=cases.name(dtype),
        inputs=inputs,
        ours=step(lambda q, k: ts.attention_scores(q, k, key_range=shape.image)),
        peers={"smart eager": step(lambda q, k: peers.few_row_scores(q, k, shape.image))},
        check=check,
        bytes=3 * key_bytes,
        quick=dtype == torch.float32 and L == 1,
    )
