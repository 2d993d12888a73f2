"""select_mass and select_threshold against exact integers, and what they do at the edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference import ragged as reference
from torch import Tensor

INF, NAN = math.inf, math.nan


def rows(seed: int, B: int, N: int, kind: str) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, generator=draw)
    if kind == "attention":
        return torch.softmax(3 * x, -1)
    if kind == "ties":
        return torch.randint(0, 4, (B, N), generator=draw).float() / 4
    special = torch.tensor([NAN, -INF, 0.0, -0.0, 1e-40, -1e-40, 3e38, 1e-30])
    return torch.where(torch.rand(B, N, generator=draw) < 0.3, special[torch.randint(0, 8, (B, N), generator=draw)], x)


def check(out: ts.Selection, want: list[list[int]], capacity: int, order: str) -> None:
    assert out.counts.tolist() == [len(tokens) for tokens in want]
    assert out.overflow.tolist() == [len(tokens) > capacity for tokens in want]
    for got, tokens in zip(out.index.tolist(), want):
        kept = tokens[:capacity]
        assert got == (kept if order == "score" else sorted(kept)) + [-1] * (capacity - len(kept))


@pytest.mark.parametrize("kind", ["attention", "ties", "special"])
@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 100, 400])
@pytest.mark.parametrize("inclusive", ["reach", "below"])
def test_mass_is_exact(kind: str, N: int, inclusive: str) -> None:
    scores = rows(N, 3, N, kind)
    for mass in (1e-9, 0.3, 0.5, 0.95, 1.0):
        for order in ("position", "score"):
            out = ts.select_mass(scores, mass, capacity=N, inclusive=inclusive, order=order)
            check(out, reference.select_mass(scores, [mass] * 3, below=inclusive == "below"), N, order)


@pytest.mark.parametrize("kind", ["attention", "ties", "special"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mass_with_masks_limits_and_rows(kind: str, dtype: torch.dtype) -> None:
    scores = rows(5, 4, 67, kind).to(dtype)
    draw = torch.Generator().manual_seed(1)
    candidates, always = (torch.rand(4, 67, generator=draw) < share for share in (0.6, 0.1))
    mass = torch.tensor([0.1, 0.5, 0.9, 1.0])
    for extra, min_k, max_k in ((0, 0, None), (1, 0, None), (3, 5, 20), (0, 30, 30)):
        out = ts.select_mass(scores, mass, capacity=25, extra=extra, min_k=min_k, max_k=max_k, candidates=candidates, always_keep=always)
        want = reference.select_mass(
            scores, mass.tolist(), extra=extra, min_k=min_k, max_k=max_k, candidates=candidates, always_keep=always
        )
        check(out, want, 25, "position")


def test_mass_matches_a_float64_sort_where_the_cut_is_clear() -> None:
    scores = rows(9, 8, 5000, "attention")
    out = ts.select_mass(scores, 0.9, capacity=5000, order="score")
    ordered = scores.double().sort(dim=1, descending=True, stable=True).values
    held = ordered.cumsum(1)
    for b in range(8):
        n = int((held[b] < 0.9 * held[b, -1]).sum()) + 1
        assert out.counts[b] == n
        assert torch.equal(scores[b, out.index[b, :n]].double(), ordered[b, :n])


@pytest.mark.parametrize("kind", ["attention", "ties", "special"])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_threshold_is_exact(kind: str, strict: bool, dtype: torch.dtype) -> None:
    scores = rows(2, 3, 133, kind).to(dtype)
    draw = torch.Generator().manual_seed(1)
    candidates, always = (torch.rand(3, 133, generator=draw) < share for share in (0.6, 0.1))
    for tau in (-INF, -0.5, 0.0, -0.0, 0.25, 0.01, INF, NAN):
        for masks in ({}, {"candidates": candidates, "always_keep": always}):
            out = ts.select_threshold(scores, tau, capacity=100, strict=strict, **masks)
            check(out, reference.select_threshold(scores, [tau] * 3, strict=strict, **masks), 100, "position")


def test_threshold_per_row_and_limits() -> None:
    scores, tau = rows(3, 3, 50, "attention"), torch.tensor([0.01, 0.05, 1.0])
    for min_k, max_k in ((0, None), (4, 10)):
        out = ts.select_threshold(scores, tau, capacity=50, min_k=min_k, max_k=max_k, order="score")
        check(out, reference.select_threshold(scores, tau.tolist(), min_k=min_k, max_k=max_k), 50, "score")


@pytest.mark.parametrize(
    ("row", "mass", "reach", "below"),
    [
        ([INF, 1.0, INF], 0.6, [0, 2], [0]),
        ([0.0, 0.0], 0.5, [], [0, 1]),
        ([-1.0, NAN], 1.0, [], [0, 1]),
        ([1.0, 1.0, 1.0, 1.0], 0.5, [0, 1], [0, 1]),
        ([1.0, 1.0, 1.0, 1.0], 1.0, [0, 1, 2, 3], [0, 1, 2, 3]),
        ([3.0, 1.0], 0.75, [0], [0]),
        ([3.0, 1.0], 0.74, [0], []),
        ([1e-45, 1e-45], 0.5, [0], [0]),
        ([1.0, 1e-30], 1.0, [0], [0, 1]),
    ],
)
def test_mass_at_the_edges(row: list[float], mass: float, reach: list[int], below: list[int]) -> None:
    for inclusive, want in (("reach", reach), ("below", below)):
        out = ts.select_mass(torch.tensor([row]), mass, capacity=len(row), inclusive=inclusive)
        assert out.index[0, : out.counts[0]].tolist() == want


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 4)])
def test_empty_input_and_no_room(shape: tuple[int, int]) -> None:
    scores = torch.rand(shape)
    for out in (ts.select_mass(scores, 0.5, capacity=0), ts.select_threshold(scores, -1.0, capacity=0)):
        assert out.index.shape == (shape[0], 0)
        assert out.overflow.tolist() == [shape[1] > 0] * shape[0]


def test_all_masked_rows_keep_nothing() -> None:
    scores, nothing = torch.rand(2, 9), torch.zeros(2, 9, dtype=torch.bool)
    for out in (
        ts.select_mass(scores, 0.5, capacity=9, candidates=nothing, min_k=3),
        ts.select_mass(scores, 0.5, capacity=9, candidates=nothing, inclusive="below", extra=2),
        ts.select_threshold(scores, 0.0, capacity=9, candidates=nothing, min_k=3),
    ):
        assert out.counts.tolist() == [0, 0]
        assert (out.index == -1).all()


def test_strided_and_unaligned_rows() -> None:
    wide = rows(4, 3, 300, "attention")
    view = wide[:, 7:150]
    assert all(map(torch.equal, ts.select_mass(view, 0.7, capacity=50), ts.select_mass(view.contiguous(), 0.7, capacity=50)))


@pytest.mark.parametrize(
    ("call", "kind", "rule"),
    [
        (lambda x: ts.select_mass(x, 0.0, capacity=2), ValueError, r"select_mass: mass must be in \(0, 1\], got 0.0"),
        (lambda x: ts.select_mass(x, 1.5, capacity=2), ValueError, r"mass must be in \(0, 1\], got 1.5"),
        (lambda x: ts.select_mass(x, NAN, capacity=2), ValueError, r"mass must be in \(0, 1\], got nan"),
        (lambda x: ts.select_mass(x, "a", capacity=2), TypeError, "mass must be a number or a tensor, got str"),
        (lambda x: ts.select_mass(x, torch.ones(3), capacity=2), ValueError, r"mass must be \(B,\) = \(2,\), got shape \(3,\)"),
        (lambda x: ts.select_mass(x, 0.5, capacity=9), ValueError, r"capacity must be in \[0, N=4\], got 9"),
        (lambda x: ts.select_mass(x, 0.5, capacity=2.0), TypeError, "capacity must be an int, got float"),
        (lambda x: ts.select_mass(x, 0.5, capacity=2, extra=-1), ValueError, "extra must be 0 or more, got -1"),
        (lambda x: ts.select_mass(x, 0.5, capacity=2, inclusive="all"), ValueError, "inclusive must be one of 'reach', 'below', got 'all'"),
        (lambda x: ts.select_mass(x, 0.5, capacity=2, min_k=3, max_k=1), ValueError, "0 <= min_k <= max_k <= N=4, got 3 and 1"),
        (lambda x: ts.select_mass(x.long(), 0.5, capacity=2), TypeError, "scores must be float32 or float16 or bfloat16, got int64"),
        (lambda x: ts.select_mass(x.t(), 0.5, capacity=2), ValueError, "scores must be contiguous in its last dimension"),
        (lambda x: ts.select_threshold(x, None, capacity=2), TypeError, "tau must be a number or a tensor, got NoneType"),
        (lambda x: ts.select_threshold(x, 0.5, capacity=2, order="best"), ValueError, "order must be one of 'position', 'score'"),
        (lambda x: ts.select_threshold(x, 0.5, capacity=2, candidates=x > 9), ValueError, None),
    ],
)
def test_bad_input(call: Any, kind: type[Exception], rule: str | None) -> None:
    x = torch.rand(2, 4)
    if rule is None:
        with pytest.raises(kind, match="candidates must be"):
            ts.select_threshold(x, 0.5, capacity=2, candidates=torch.ones(2, 3, dtype=torch.bool))
        return
    with pytest.raises(kind, match=rule):
        call(x)


def test_debug_checks_find_nan_and_wrong_shares() -> None:
    with ts.debug_checks():
        with pytest.raises(ValueError, match="scores must hold no NaN"):
            ts.select_mass(torch.tensor([[NAN]]), 0.5, capacity=1)
        with pytest.raises(ValueError, match=r"mass must be in \(0, 1\] in every row"):
            ts.select_mass(torch.tensor([[1.0]]), torch.tensor([2.0]), capacity=1)
