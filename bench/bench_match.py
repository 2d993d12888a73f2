"""bipartite_match: ToMe's layers, ToMeSD's grid, AIM's frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import similarity
from torch import Tensor

from . import cases, checks, peers
from .harness import Case, Inputs, Settings, Target


def build(settings: Settings) -> Iterator[Case]:
    device = settings.device
    clip, siglip = cases.CLIP, cases.SIGLIP
    yield _match(f"even to odd of {clip.N}, C={clip.D}, r 23", (1, clip.N, clip.D), 23, True, device, quick=True, target=1.5)
    yield _match(f"even to odd of {siglip.N}, C={siglip.C}, r 182", (1, siglip.N, siglip.C), 182, False, device, target=1.5)
    yield _match("ToMeSD, 64 x 64, C=320, r 2048", (1, 4096, 320), 2048, False, device, lists=_windows(64, device))
    yield _match("AIM, 32 frames of 196, C=3584, r 98", (32, 196, 3584), 98, False, device)


def _windows(side: int, device: str) -> tuple[Tensor, Tensor]:
    """(sources, targets): the top left token of every 2 x 2 cell receives."""
    at = torch.arange(side * side, device=device)
    target = (at % side % 2 == 0) & (at // side % 2 == 0)
    return at[~target], at[target]


def _match_check(r: int, lists: peers.Lists, cls: bool) -> Callable[[Inputs, Any, bool], str | None]:
    """Every pair is the best of its source, and the sources are the r best, in float64."""

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        x = inputs[0].cpu().double()
        a, b = (slice(0, None, 2), slice(1, None, 2)) if lists is None else (t.cpu() for t in lists)
        pairs = similarity.cosine(x[:, a], x[:, b])
        if cls:
            pairs[:, 0] = -2.0
        source, destination = output[0].cpu(), output[1].cpu()
        unit = torch.nn.functional.normalize(x, dim=2)
        rows = (unit.gather(1, t[..., None].expand(-1, -1, x.shape[2])) for t in (source, destination))
        chosen, best = torch.mul(*rows).sum(2), pairs.amax(2)
        if source.shape[1] != r or any(row.unique().numel() != r for row in source):
            return f"{tuple(source.shape)} is not {r} different sources"
        return checks.near(chosen.sort(dim=1).values, best.topk(r, dim=1).values.flip(1), 1e-5)

    return check


def _match(
    case: str,
    shape: tuple[int, int, int],
    r: int,
    cls: bool,
    device: str,
    *,
    lists: peers.Lists = None,
    quick: bool = False,
    target: float | None = None,
) -> Case:
    B, N, C = shape
    S, T = (N - N // 2, N // 2) if lists is None else (lists[0].numel(), lists[1].numel())
    given: dict[str, Any] = {"keep": int(cls)} if lists is None else {"sources": lists[0], "targets": lists[1]}
    return Case(
        op="bipartite_match",
        case=case,
        dtype="f32",
        inputs=lambda seed: (cases.randn(seed, *shape, device=device),),
        ours=lambda x: ts.bipartite_match(x, r, **given),
        peers={
            "smart eager": lambda x: peers.match_topk(x, r, lists, cls),
            "eager code": lambda x: peers.match_sorted(x, r, lists, cls),
        },
        compiled="eager code",
        check=_match_check(r, lists, cls),
        bytes=B * (N * C * 4 + 20 * r + 8 * (2 * N - r)),
        flops=2 * B * S * T * C,
        quick=quick,
        targets=() if target is None else (Target(target, "eager code"),),
    )
