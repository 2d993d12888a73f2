"""Whole vision encoders, pixels to logits: a method inside the blocks against the same model without it, and against its eager form."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import vit as reference
from tokensieve.flops import encoder_block_flops
from tokensieve.methods import ToMe
from torch import Tensor

from . import cases, checks
from .harness import Case, Inputs, Settings, Target

UNPATCHED, EAGER = "unpatched", "eager code"
R = 13
SHARE = 0.85  # of the FLOP ratio that has to become time


def vit_s(device: str) -> Any:
    """timm's ViT-S/16 with random weights, larger than at initialisation: tokens differ, as they do in a trained model."""
    import timm_here  # noqa: F401 - before timm
    from timm.models import create_model

    torch.manual_seed(0)
    model = create_model("vit_small_patch16_224").eval()
    for name, parameter in model.named_parameters():
        if "blocks" in name and parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return model.requires_grad_(False).to(device)


def flops(r: int) -> float:
    """Of one image: 12 blocks whose MLP sees r tokens fewer than their attention, and the patch embedding."""
    C, total, tokens = 384, 2.0 * 196 * 768 * 384, 197
    for _ in range(12):
        total += encoder_block_flops(4 * C * C, 8 * C * C, C, tokens, tokens - r)
        tokens -= r
    return total


def build(settings: Settings) -> Iterator[Case]:
    yield _vit_s(settings, 1)
    yield _vit_s(settings, 8)


def _vit_s(settings: Settings, batch: int) -> Case:
    made: dict[str, Any] = {}

    def models() -> tuple[Any, Any]:
        """(patched, plain), made once; the sieve lasts as long as the process."""
        if not made:
            made["plain"] = vit_s(settings.device)
            made["patched"] = copy.deepcopy(made["plain"])
            ts.attach(made["patched"], ToMe(r=R))
        return made["patched"], made["plain"]

    def inputs(seed: int) -> Inputs:
        models()
        return (cases.randn(seed, batch, 3, 224, 224, device=settings.device),)

    def patched(image: Tensor) -> tuple[str, Tensor]:
        return "merged", models()[0](image)

    def plain(image: Tensor) -> tuple[str, Tensor]:
        return "all", models()[1](image)

    def eager(image: Tensor) -> tuple[str, Tensor]:
        return "merged", reference.vit(models()[1], image, reference.tome(R, 1))

    wanted: dict[str, Tensor] = {}

    def check(given: Inputs, output: tuple[str, Tensor], ours: bool) -> str | None:
        if not wanted:
            exact = copy.deepcopy(models()[1]).double()
            wanted["merged"] = reference.vit(exact, given[0].double(), reference.tome(R, 1))
            wanted["all"] = exact(given[0].double())
        want = wanted[output[0]]
        return checks.near(output[1], want.float(), 1e-3)

    ratio = flops(0) / flops(R)
    return Case(
        op="ToMe",
        case=f"ViT-S/16, B={batch}, r = {R}, pixels to logits; FLOPs {ratio:.2f}x fewer",
        dtype="f32",
        inputs=inputs,
        ours=patched,
        peers={UNPATCHED: plain, EAGER: eager},
        check=check,
        bytes=4 * 22_000_000,  # the weights, once
        flops=int(batch * flops(R)),
        targets=(Target(SHARE * ratio, UNPATCHED),) if batch == 8 else (),
        quick=batch == 1,
        call_only=True,
        calls=True,
    )
