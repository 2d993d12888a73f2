"""Methods that work over the frames of a video."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import methods
from tokensieve.methods import tsllava
from torch import Tensor

from .. import cases, checks
from ..harness import Case, Inputs, Settings


def _tsllava(settings: Settings) -> Case:
    """50 frames of 576 tokens, as wide as a 7B model."""
    method, T, N, C = methods.TSLLaVA(), 50, 576, 4096

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, T, N, C, device=settings.device),)

    def ours(features: Tensor) -> tuple[Tensor, Tensor]:
        return tsllava.sample_tokens(features, method.tokens)

    def eager(features: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.linspace(0, T * N - 1, method.tokens).round().long().clamp(0, T * N - 1).to(features.device)
        return features.flatten(0, 1)[index][None], index[None]

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        return checks.copies([inputs[0].view(1, T * N, C)], output[1], [output[0]])

    return Case(
        op="TSLLaVA",
        case=f"sample {method.tokens} of {T} x {N} tokens x {C}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": eager},
        check=check,
        bytes=8 * method.tokens * C,
        quick=True,
    )


STEPS = {"TSLLaVA": _tsllava}
