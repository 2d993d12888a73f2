"""A step that is checked against the authors' way in float64: scores within rounding, nearly all of the selection (ties move)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..harness import Case, Inputs

SAME = 0.98  # share of the selected positions that must agree with float64


def double(value: Any) -> Any:
    """Floats to float64, in lists too."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [double(item) for item in value] if isinstance(value, (list, tuple)) else value


def overlap(got: Tensor, want: Tensor) -> str | None:
    """Positions of each row as sets; -1 is padding."""
    for b, (have, wish) in enumerate(zip(got.tolist(), want.tolist())):
        a, c = set(have) - {-1}, set(wish) - {-1}
        if len(a & c) < SAME * max(len(a), len(c)):
            return f"row {b}: {len(a & c)} of {len(c)} positions agree"
    return None


def alike_rows(got: Tensor, want: Tensor, tolerance: float) -> str | None:
    """Merged tokens (B, M, ...): a near tie may pair two tokens otherwise, so that a few rows of float64 may differ."""
    if got.shape != want.shape:
        return f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    close = (got.double() - want).abs().flatten(2 if got.dim() > 2 else 1) <= tolerance * want.abs().max()
    share = float((close.all(-1) if got.dim() > 2 else close).double().mean())
    return None if share >= SAME else f"{share:.2%} of the rows agree"


def step(
    name: str,
    what: str,
    inputs: Callable[[int], Inputs],
    ours: Callable[..., Sequence[Tensor]],
    eager: Callable[..., Sequence[Tensor]],
    *,
    nbytes: int,
    flops: int = 0,
    tolerance: float = 2e-4,
    rows: bool = False,
) -> Case:
    """Both give the same list of tensors: float ones are compared as values (`rows`: row by row), (B, K) integer ones as selections."""
    compare = alike_rows if rows else checks.near

    def check(given: Inputs, output: Sequence[Tensor], is_ours: bool) -> str | None:
        with torch.no_grad():
            wanted = eager(*[double(item) for item in given])
        for i, (got, want) in enumerate(zip(output, wanted, strict=True)):
            problem = compare(got, want, tolerance) if want.is_floating_point() else overlap(got, want)
            if problem:
                return f"output {i}: {problem}"
        return None

    return Case(
        op=name,
        case=f"prune step, {what}",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": eager},
        check=check,
        bytes=nbytes,
        flops=flops,
        quick=True,
    )
