"""How results are compared: scores by the 2x-naive rule against float64, everything else exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import attention_logits, attention_scores

EPS = torch.finfo(torch.float32).eps


def logit_magnitude(query: Tensor, key: Tensor, scale: float | None, bias: Tensor | None) -> float:
    """Largest sum of |scale * q_i * k_i| (and of the bias): what the rounding error of a float32 logit is relative to."""
    if not query.numel() or not key.numel():
        return 0.0
    factor = None if scale is None else abs(scale)
    logits = attention_logits(query.abs(), key.abs(), factor, None, torch.float64)
    if bias is not None and bias.dtype != torch.bool:
        logits = logits + bias.double().abs().nan_to_num(0.0, 0.0, 0.0)
    finite = logits[torch.isfinite(logits)]
    return float(finite.max()) if finite.numel() else 0.0


def worst(got: Tensor, want: Tensor) -> str:
    """The coordinate of the largest difference, for the failure message."""
    difference = (got.double() - want.double()).abs().nan_to_num(torch.inf)
    flat = int(difference.flatten().argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
    return f"worst at {at}: got {float(got.flatten()[flat])}, want {float(want.flatten()[flat])}"


def assert_near(got: Tensor, want: Tensor, naive: Tensor, floor: float, what: str) -> None:
    """Error of `got` <= 2 x error of `naive` + floor, both against `want` (float64); infinities and NaN must match exactly."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == torch.float32, f"{what}: dtype {got.dtype}"
    finite = torch.isfinite(want)
    same = (got.double() == want) | (torch.isnan(got) & torch.isnan(want))
    assert bool((finite | same).all()), f"{what}: {worst(got.masked_fill(finite, 0), want.masked_fill(finite, 0))}"
    assert bool(torch.isfinite(got[finite]).all()), f"{what}: {worst(got, want)}"
    if not bool(finite.any()):
        return
    naive_finite = finite & torch.isfinite(naive)
    naive_error = float((naive.double() - want)[naive_finite].abs().max()) if bool(naive_finite.any()) else 0.0
    error = float((got.double() - want)[finite].abs().max())
    assert error <= 2 * naive_error + floor, f"{what}: error {error:.3g} > 2 x {naive_error:.3g} + {floor:.3g}; {worst(got, want)}"


def assert_scores(got: Tensor, got_lse: Tensor, query: Tensor, key: Tensor, what: str = "", **options: Any) -> None:
    """Checks scores and lse of attention_scores(query, key, **options) against the reference."""
    want, want_lse = attention_scores(query, key, **options)
    naive, naive_lse = attention_scores(query, key, **options, dtype=query.dtype)
    # A float32 logit is off by a few eps of its magnitude, and so, relatively, is exp of it.
    relative = EPS * (16 + 4 * logit_magnitude(query, key, options.get("scale"), options.get("bias")))
    finite = want[torch.isfinite(want)].abs()
    top = float(finite.max()) if finite.numel() else 0.0
    described = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in options.items()}
    what = f"{what} query {tuple(query.shape)} key {tuple(key.shape)} {query.dtype} {described}"
    assert_near(got, want, naive, relative * top, f"scores of {what}")
    assert_near(got_lse, want_lse, naive_lse, relative, f"lse of {what}")


def assert_equal(got: Tensor, want: Tensor, what: str = "") -> None:
    """Same dtype, shape and bits (NaN equals NaN)."""
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    same = (got == want) | ((got != got) & (want != want))
    if not bool(same.all()):
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"{what}: {int((~same).sum())} differ, the first at {at}: got {got[at]}, want {want[at]}")
