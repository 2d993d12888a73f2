"""cosine_match and cosine_scores against the whole float64 matrix: exact where cosines are exact, else up to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve as ts
import torch
from reference import similarity
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, seeded
from reference.similarity import assert_match, floor_of, random_mask, rows
from same_bits import on_any_threads
from torch import Tensor

# (M, N, C): one row, tile and block edges (6, 8, 16, 48, 144 rows and columns; 128 channels), real sizes.
SHAPES = [(1, 1, 1), (1, 577, 64), (7, 16, 4), (15, 17, 33), (48, 143, 129), (145, 144, 256), (150, 300, 20), (33, 577, 64)]
EXACT_SHAPES = [(1, 40, 4), (20, 17, 16), (49, 150, 64), (150, 146, 256)]
RULES: list[dict[str, Any]] = [{}, {"masked": 0.5}, {"exclude_self": True}, {"exclude_self": True, "masked": 0.1}]


def options_of(rule: dict[str, Any], B: int, N: int, device: str) -> dict[str, Any]:
    options = {key: value for key, value in rule.items() if key != "masked"}
    if "masked" in rule:
        options["candidates"] = random_mask(N, B, N, rule["masked"]).to(device)
    return options


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cosine_match_every_match_is_as_good_as_the_best(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    M, N, C = shape
    a, b = rows(seeded(M), "normal", 2, M, C, dtype, device), rows(seeded(N), "normal", 2, N, C, dtype, device)
    for largest in (True, False):
        value, index = ts.cosine_match(a, b, largest=largest)
        assert value.shape == index.shape == (2, M)
        assert (value.dtype, index.dtype) == (torch.float32, torch.int64)
        assert_match(value[..., None], index[..., None], a, b, floor_of(C), f"{shape} {dtype}", largest=largest)
        for k in (1, 3, 32):
            options = {"largest": largest, "candidates": random_mask(k, 2, N, 0.6).to(device)}
            value, index = ts.cosine_match(a, b, k=k, **options)
            assert_match(value, index, a, b, floor_of(C), f"{shape} k={k} {dtype}", **options)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("kind", ["signs", "one-hot", "special"])
def test_cosine_match_ties_lowest_index_first_nan_last(kind: str, rule: dict[str, Any], device: str) -> None:
    for M, N, C in EXACT_SHAPES:
        b = rows(seeded(N), kind, 2, N, C, device=device)
        a = b if rule.get("exclude_self") else rows(seeded(M), kind, 2, M, C, device=device)
        options = options_of(rule, 2, N, device)
        for k, largest in ((1, True), (1, False), (5, True), (32, False)):
            value, index = ts.cosine_match(a, b, k=k, largest=largest, **options)
            want_value, want_index = similarity.cosine_match(a, b, k=k, largest=largest, **options)
            what = f"{kind} {(M, N, C)} k={k} largest={largest} {list(options)}"
            assert_equal(index.cpu(), want_index, what)
            assert_equal(value.cpu(), want_value.float(), what)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("reduction", [None, "mean", "sum", "max", "bottom"])
def test_cosine_scores_match_reference(reduction: str | None, rule: dict[str, Any], device: str) -> None:
    for kind, (M, N, C) in [*((k, s) for k in ("signs", "one-hot") for s in EXACT_SHAPES), *(("normal", s) for s in SHAPES)]:
        for dtype in FLOATS:
            b = rows(seeded(N), kind, 2, N, C, dtype, device)
            a = b if rule.get("exclude_self") else rows(seeded(M), kind, 2, M, C, dtype, device)
            options = options_of(rule, 2, N, device) | ({"t": 4} if reduction == "bottom" else {})
            got = ts.cosine_scores(a, b, reduction=reduction, **options)
            want = similarity.cosine_scores(a, b, reduction=reduction, **options)
            assert (got.shape, got.dtype) == (want.shape, torch.float32)
            scale = N if reduction == "sum" else 1
            error = float((got.cpu().double() - want).abs().max())
            assert error <= floor_of(C) * scale, f"{kind} {(M, N, C)} {dtype} {list(options)}: {error}"


def test_cosine_scores_nan_rows(device: str) -> None:
    x = torch.tensor([[[1.0, 0.0], [torch.nan, 0.0], [0.0, 0.0], [1.0, 1.0]]], device=device)
    assert ts.cosine_scores(x[:, :1], x, reduction="max").tolist() == [[1.0]]
    assert torch.isnan(ts.cosine_scores(x[:, 1:2], x, reduction="max")).all()
    assert torch.isnan(ts.cosine_scores(x, x)).all()
    seen = torch.tensor([[True, False, True, True]], device=device)
    got = ts.cosine_scores(x, x, candidates=seen)
    assert torch.isnan(got).tolist() == [[False, True, False, False]]
    pairs = ts.cosine_scores(x, x, reduction=None)
    assert torch.isnan(pairs).int().tolist() == [[[0, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]]


def test_cosine_zero_norm_and_large_values(device: str) -> None:
    a = torch.tensor([[[0.0, 0.0], [1e18, 0.0], [1e-18, 1e-18]]], device=device)
    value, index = ts.cosine_match(a, a)
    assert index.tolist() == [[0, 1, 2]]
    assert value[0, 0] == 0
    assert value[0, 1] == 1
    assert abs(float(value[0, 2]) - 1) < 1e-6
    assert ts.cosine_scores(a, a, exclude_self=True)[0, 0] == 0


def test_cosine_no_candidates_gives_minus_one_and_zero(device: str) -> None:
    a, none = normal(seeded(1), 2, 5, 8, device=device), torch.zeros(2, 5, dtype=torch.bool, device=device)
    value, index = ts.cosine_match(a, a, k=3, candidates=none)
    assert bool((index == -1).all())
    assert bool((value == 0).all())
    for reduction in (None, "mean", "sum", "max"):
        assert bool((ts.cosine_scores(a, a, reduction=reduction, candidates=none) == 0).all())
    assert bool((ts.cosine_scores(a, a, reduction="bottom", t=2, candidates=none) == 0).all())
    value, index = ts.cosine_match(a[:, :1], a[:, :1], k=2, exclude_self=True)
    assert index.tolist() == [[[-1, -1]]] * 2
    assert ts.cosine_match(a, a, k=32)[1][..., 5:].eq(-1).all()


@pytest.mark.parametrize(("B", "M", "N", "C"), [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)])
def test_cosine_empty(B: int, M: int, N: int, C: int, device: str) -> None:
    a, b = torch.zeros(B, M, C, device=device), torch.zeros(B, N, C, device=device)
    value, index = ts.cosine_match(a, b, k=2)
    assert value.shape == index.shape == (B, M, 2)
    assert bool((value == 0).all())
    assert bool((index == torch.tensor([0, 1] if N else [-1, -1], device=device)).all())
    for reduction in (None, "mean", "sum", "max"):
        got = ts.cosine_scores(a, b, reduction=reduction)
        assert got.shape == ((B, M, N) if reduction is None else (B, M))
        assert bool((got == 0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cosine_strided_and_unaligned_views(dtype: torch.dtype, device: str) -> None:
    wide = normal(seeded(2), 4, 90, 70, dtype=dtype, device=device)
    mask = random_mask(3, 4, 200, 0.6).to(device)
    views = [wide[:, 3:40, 1:], wide[::2, ::3, 5:69], wide[1:2].expand(3, -1, -1), wide.transpose(0, 1)[:50, :, :33]]
    for a in views:
        b = a.flip(1)[:, : a.shape[1] - 1]
        m = mask[:1, 7 : 7 + b.shape[1]].expand(b.shape[0], -1)
        for x, y in ((a, b), (b, a[:, 1:])):
            for got, want in zip(
                ts.cosine_match(x, y, k=3, candidates=m[:, : y.shape[1]]),
                ts.cosine_match(x.contiguous(), y.contiguous(), k=3, candidates=m[:, : y.shape[1]].contiguous()),
                strict=True,
            ):
                assert_equal(got, want, f"{x.shape} {x.stride()}")
            for reduction in (None, "mean", "max"):
                want = ts.cosine_scores(x.contiguous(), y.contiguous(), reduction=reduction)
                assert_equal(ts.cosine_scores(x, y, reduction=reduction), want, f"{x.shape} {x.stride()} {reduction}")


def test_cosine_one_row_equals_many(device: str) -> None:
    """A row's result does not depend on the rows and columns beside it, nor on how b is packed."""
    a, b = normal(seeded(4), 1, 300, 200, device=device), normal(seeded(5), 1, 400, 200, device=device)
    value, index = ts.cosine_match(a, b, k=4)
    for m in (0, 7, 143, 144, 299):
        got = ts.cosine_match(a[:, m : m + 1], b, k=4)
        assert_equal(got[0], value[:, m : m + 1])
        assert_equal(got[1], index[:, m : m + 1])


def test_cosine_is_deterministic_on_any_number_of_threads() -> None:
    a, b = normal(seeded(6), 3, 300, 130), normal(seeded(7), 3, 500, 130)

    def run() -> tuple[Tensor, ...]:
        few = ts.cosine_match(a[:, :9], b, k=7)
        return *ts.cosine_match(a, b), *few, ts.cosine_scores(a, b), ts.cosine_scores(a, b, reduction=None)

    on_any_threads(run)


def test_cosine_values_carry_no_gradient(device: str) -> None:
    a = normal(seeded(8), 1, 4, 6, device=device).requires_grad_()
    value, index = ts.cosine_match(a, a)
    assert not value.requires_grad
    assert not index.requires_grad
    for reduction in (None, "mean", "max"):
        assert not ts.cosine_scores(a, a, reduction=reduction).requires_grad
    assert not ts.cosine_scores(a, a, reduction="bottom", t=2).requires_grad


def test_cosine_does_not_write_its_inputs(device: str) -> None:
    a, mask = rows(seeded(9), "special", 2, 40, 16, device=device), torch.ones(2, 40, dtype=torch.bool, device=device)
    before = a.clone(), mask.clone()
    ts.cosine_match(a, a, k=4, candidates=mask, exclude_self=True)
    ts.cosine_scores(a, a, candidates=mask)
    assert_equal(a, before[0])
    assert_equal(mask, before[1])
