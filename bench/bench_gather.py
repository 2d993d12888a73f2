"""gather_tokens: kept rows, into fresh and reused outputs; scatter_tokens: back again; pack_tokens: ragged batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import ops as reference
from torch import Tensor

from . import cases, checks, peers
from .harness import Case, Inputs, Settings, Target


def build(settings: Settings) -> Iterator[Case]:
    for N, k, C in cases.GATHER_SIZES:
        dtypes = (torch.float32, torch.bfloat16) if N == 2880 or settings.device == "cuda" else (torch.float32,)
        for dtype in dtypes:
            yield _fresh(N, k, C, dtype, settings.device)
            yield _reused(N, k, C, dtype, settings.device)
    yield _several(2944, 704, 4096, settings.device)
    for dtype in (torch.float32, torch.bfloat16):
        yield _scatter(2944, 704, 4096, dtype, "replace", settings.device)
        yield _scatter(2944, 704, 4096, dtype, "add", settings.device)
    for dtype in (torch.float32, torch.bfloat16):
        yield _pack(64, 197, 384, dtype, settings.device)


def _bytes(k: int, C: int, dtype: torch.dtype) -> int:
    return 2 * k * C * dtype.itemsize + 8 * k


def _check(inputs: Inputs, output: Tensor, ours: bool) -> str | None:
    return checks.copies([inputs[0]], inputs[1], [output])


def _fresh(N: int, k: int, C: int, dtype: torch.dtype, device: str) -> Case:
    return Case(
        op="gather_tokens",
        case=f"{k}x{C} of {N}, fresh output",
        dtype=cases.name(dtype),
        inputs=lambda seed: (cases.randn(seed, 1, N, C, dtype=dtype, device=device), cases.random_index(seed, 1, N, k, device)),
        ours=ts.gather_tokens,
        peers={"index_select": peers.rows, "torch.gather": peers.gather_expand},
        compiled="index_select",
        check=_check,
        bytes=_bytes(k, C, dtype),
        quick=N == 2880,
        targets=(Target(1, "index_select"), Target(1, "torch.gather")) if dtype == torch.float32 else (),
    )


def _reused(N: int, k: int, C: int, dtype: torch.dtype, device: str) -> Case:
    def inputs(seed: int) -> Inputs:
        x = cases.randn(seed, 1, N, C, dtype=dtype, device=device)
        return x, cases.random_index(seed, 1, N, k, device), torch.zeros(1, k, C, dtype=dtype, device=device)

    def ours(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
        ts.gather_tokens_out((x,), index, (out,))
        return out

    def index_select(x: Tensor, index: Tensor, out: Tensor) -> Tensor:
        return torch.index_select(x, 1, index[0], out=out)

    def check(inputs: Inputs, output: Tensor, is_ours: bool) -> str | None:
        problem = _check(inputs, output, is_ours)
        output.zero_()  # the next contender writes to the same memory
        return problem

    return Case(
        op="gather_tokens_out",
        case=f"{k}x{C} of {N}, reused output",
        dtype=cases.name(dtype),
        inputs=inputs,
        ours=ours,
        peers={"index_select": index_select, "torch.gather": peers.gather_expand},
        check=check,
        bytes=_bytes(k, C, dtype),
        quick=N == 2880,
        targets=(Target(3, "torch.gather"), Target(2, "index_select")) if dtype == torch.float32 else (),
    )


def _several(N: int, k: int, C: int, device: str) -> Case:
    """What a decoder layer needs: hidden states, position ids and an attention mask by one index."""

    def inputs(seed: int) -> Inputs:
        hidden = cases.randn(seed, 1, N, C, dtype=torch.bfloat16, device=device)
        positions = torch.arange(N, device=device).view(1, N)
        mask = cases.randn(seed + 1, 1, N, device=device) > -1
        return [hidden, positions, mask], cases.random_index(seed, 1, N, k, device)

    def select_each(tensors: list[Tensor], index: Tensor) -> list[Tensor]:
        return [peers.rows(x, index) for x in tensors]

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        return checks.copies(*inputs, output)

    return Case(
        op="gather_tokens",
        case=f"hidden {k}x{C} + positions + mask of {N}",
        dtype="bf16",
        inputs=inputs,
        ours=ts.gather_tokens,
        peers={"index_select": select_each},
        compiled="index_select",
        check=check,
        bytes=_bytes(k, C, torch.bfloat16) + 2 * k * 9,
    )


def _scatter(N: int, k: int, C: int, dtype: torch.dtype, mode: str, device: str) -> Case:
    """What ends a mixture-of-depths layer: the tokens that went through it are written back, or added with the router's weight."""

    def inputs(seed: int) -> Inputs:
        x, y = (cases.randn(seed + i, 1, rows, C, dtype=dtype, device=device) for i, rows in enumerate((N, k)))
        return x, cases.random_index(seed, 1, N, k, device), y, cases.randn(seed + 2, 1, k, device=device) if mode == "add" else None

    def eager(x: Tensor, index: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return x.index_copy(1, index[0], y)
        return x.index_add(1, index[0], y * weights[..., None].to(y.dtype))

    def check(inputs: Inputs, output: Tensor, ours: bool) -> str | None:
        want = reference.scatter_tokens([inputs[0]], inputs[1], [inputs[2]], mode, inputs[3])[0]
        return checks.near(output, want, 0.0 if ours or mode == "replace" else checks.PEER_TOLERANCE[dtype])

    return Case(
        op="scatter_tokens",
        case=f"{mode} {k}x{C} of {N}" + (", weighted" if mode == "add" else ""),
        dtype=cases.name(dtype),
        inputs=inputs,
        ours=lambda x, index, y, weights: ts.scatter_tokens(x, index, y, mode=mode, weights=weights),
        peers={"index_copy" if mode == "replace" else "index_add": eager},
        compiled="index_copy" if mode == "replace" else "index_add",
        check=check,
        bytes=(2 * N + (k if mode == "add" else 0)) * C * dtype.itemsize + 8 * k,
        quick=True,
    )


def _pack(B: int, N: int, C: int, dtype: torch.dtype, device: str) -> Case:
    """A-ViT and ATS on DeiT-S: about 60 % of the tokens are alive, another number in every image."""

    def inputs(seed: int) -> Inputs:
        alive = cases.randn(seed + 1, B, N, device=device) < 0.25
        index = torch.arange(N, device=device).where(alive, N).sort(1).values
        return cases.randn(seed, B, N, C, dtype=dtype, device=device), index.where(index < N, -1), alive

    def masked(x: Tensor, index: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
        return x[alive], torch.nn.functional.pad(alive.sum(1).cumsum(0, dtype=torch.int32), (1, 0))

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        want, lengths = masked(*inputs)
        return checks.equal(output[0][: len(want)], want) or checks.equal(output[1], lengths)

    return Case(
        op="pack_tokens",
        case=f"{B} images of {N}x{C}, 60 % alive",
        dtype=cases.name(dtype),
        inputs=inputs,
        ours=lambda x, index, alive: ts.pack_tokens(x, index, 3 * B * N // 4),
        peers={"x[mask], synchronises": masked},
        check=check,
        bytes=2 * int(0.6 * B * N) * C * dtype.itemsize + 16 * B * N,
        quick=True,
    )
