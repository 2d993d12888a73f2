"""Pooling of tokens: channels stay last, where torch's layers want images, windows to unfold, or two readings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import tokensieve as ts
import torch
from torch import Tensor
from torch.nn import functional as F

from . import cases, checks
from .harness import Case, Inputs, Settings

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
Kind = Literal["mean", "max", "bilinear"]


def build(settings: Settings) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield _grid(4, 27, 1024, (14, 14), "bilinear", dtype, settings.device)  # LLaVA-OneVision's frames
    yield _grid(4, 24, 1024, (12, 12), "mean", torch.float32, settings.device)
    yield _grid(4, 24, 1024, (9, 9), "max", torch.float32, settings.device)
    yield _within(8, 14, 384, settings.device)
    yield _windows(16, 24, 1024, settings.device)
    yield _fold(8, 26, 1152, settings.device)
    yield _runs(1, 640, 576, 8, 4096, settings.device)
    yield _means(1, 100, 256, 1024, settings.device)


def _image(x: Tensor, h: int, w: int) -> Tensor:
    return x.view(x.shape[0], h, w, x.shape[2]).permute(0, 3, 1, 2)


def _tokens(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _pool(
    op: str,
    case: str,
    make: Callable[[int], Inputs],
    ours: Callable[..., Any],
    eager: Callable[..., Any],
    nbytes: int,
    dtype: torch.dtype = torch.float32,
    copied: Callable[..., Any] | None = None,
) -> Case:
    """eager: the best of torch; copied: what code that keeps its images as NCHW does."""

    def check(inputs: Inputs, output: Any, mine: bool) -> str | None:
        want = eager(*(i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs))
        pairs = zip(output, want, strict=True) if isinstance(want, tuple) else ((output, want),)
        return next((wrong for o, w in pairs if (wrong := checks.near(o, w, TOLERANCE[dtype]))), None)

    return Case(
        op=op,
        case=case,
        dtype=cases.name(dtype),
        inputs=make,
        ours=ours,
        peers={"smart eager": eager} if copied is None else {"smart eager": eager, "eager code": copied},
        compiled="smart eager" if dtype == torch.float32 else None,
        check=check,
        bytes=nbytes,
        quick=True,
    )


def _grid(B: int, S: int, C: int, size: tuple[int, int], kind: Kind, dtype: torch.dtype, device: str) -> Case:
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "bilinear": lambda t: F.interpolate(t, size, mode="bilinear"),
        "mean": lambda t: F.adaptive_avg_pool2d(t, size),
        "max": lambda t: F.adaptive_max_pool2d(t, size),
    }

    def copied(x: Tensor) -> Tensor:
        return _tokens(layers[kind](_image(x, S, S).contiguous())).contiguous()

    return _pool(
        "pool_grid",
        f"{B} x {S} x {S} to {size[0]} x {size[1]}, {kind}, C={C}",
        lambda seed: (cases.randn(seed, B, S * S, C, dtype=dtype, device=device),),
        lambda x: ts.pool_grid(x, (S, S), size=size, kind=kind),
        lambda x: _tokens(layers[kind](_image(x, S, S))),
        B * (S * S + math.prod(size)) * C * dtype.itemsize,
        dtype,
        copied,
    )


def _within(B: int, S: int, C: int, device: str) -> Case:
    """STViT: 3 x 3 bins of the maximum in every window of 7 x 7."""
    parts = S // 7

    def eager(x: Tensor) -> Tensor:
        windows = x.view(B, parts, 7, parts, 7, C).permute(0, 1, 3, 5, 2, 4).flatten(0, 2)
        bins = F.adaptive_max_pool2d(windows, 3).view(B, parts, parts, C, 3, 3)
        return bins.permute(0, 1, 4, 2, 5, 3).reshape(B, 9 * parts**2, C)

    return _pool(
        "pool_grid",
        f"STViT {B} x {S} x {S}, windows of 7 x 7 to 3 x 3, C={C}",
        lambda seed: (cases.randn(seed, B, S * S, C, device=device),),
        lambda x: ts.pool_grid(x, (S, S), size=(3 * parts, 3 * parts), within=(7, 7), kind="max"),
        eager,
        4 * B * (S * S + 9 * parts**2) * C,
    )


def _windows(T: int, S: int, C: int, device: str) -> Case:
    """PPLLaVA: 2 x 3 x 3 tokens by a softmax of their scores."""
    grid, window = (T, S, S), (2, 3, 3)
    outputs = math.prod(n // w for n, w in zip(grid, window, strict=True))

    def unfold(t: Tensor) -> Tensor:
        return t.unfold(0, 2, 2).unfold(1, 3, 3).unfold(2, 3, 3)

    def eager(x: Tensor, scores: Tensor) -> Tensor:
        weights = torch.softmax(unfold(scores.view(grid)).reshape(outputs, 18) / 0.1, 1)
        return (unfold(x.view(*grid, C)).reshape(outputs, C, 18) @ weights[..., None]).view(1, outputs, C)

    return _pool(
        "pool_windows",
        f"PPLLaVA {T} x {S} x {S} by 2 x 3 x 3, C={C}",
        lambda seed: (cases.randn(seed, 1, T * S * S, C, device=device), cases.randn(seed + 1, 1, T * S * S, device=device).sigmoid()),
        lambda x, scores: ts.pool_windows(x, scores, grid, window, temperature=0.1),
        eager,
        4 * C * (T * S * S + outputs) + 4 * T * S * S,
    )


def _fold(B: int, S: int, C: int, device: str) -> Case:
    """LEOPARD: one copy for both sides."""
    return _pool(
        "space_to_depth",
        f"{B} x {S} x {S} by 2 x 2, C={C}",
        lambda seed: (cases.randn(seed, B, S * S, C, device=device),),
        lambda x: ts.space_to_depth(x, (S, S)),
        lambda x: x.view(B, S // 2, 2, S // 2, 2, C).transpose(2, 3).reshape(B, S * S // 4, 4 * C),
        8 * B * S * S * C,
    )


def _runs(B: int, S: int, V: int, stride: int, C: int, device: str) -> Case:
    """LLaVolta."""

    def inputs(seed: int) -> Inputs:
        return cases.randn(seed, B, S, C, device=device), torch.full((B, 1), 35, device=device)

    def eager(x: Tensor, starts: Tensor) -> Tensor:
        image = x[:, 35 : 35 + V].unflatten(1, (V // stride, stride)).mean(2)
        return torch.cat([x[:, :35], image, x[:, 35 + V :]], 1)

    def copied(x: Tensor, starts: Tensor) -> Tensor:
        image = F.avg_pool1d(x[:, 35 : 35 + V].transpose(1, 2), stride, stride).transpose(1, 2)
        return torch.cat([x[:, :35], image, x[:, 35 + V :]], 1)

    rows = S - V + V // stride
    return _pool(
        "pool_runs",
        f"{S} tokens, {V} of them by {stride}, C={C}",
        inputs,
        lambda x, starts: ts.pool_runs(x, starts, V, stride),
        eager,
        4 * B * (S + rows) * C,
        copied=copied,
    )


def _means(B: int, T: int, N: int, C: int, device: str) -> Case:
    """RED-VILLM: eager reads the video twice."""
    return _pool(
        "row_column_means",
        f"{T} frames of {N}, C={C}",
        lambda seed: (cases.randn(seed, B, T, N, C, device=device),),
        ts.row_column_means,
        lambda x: (x.mean(2), x.mean(1)),
        4 * B * (T * N + T + N) * C,
    )
