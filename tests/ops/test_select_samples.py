"""select_samples picks exactly the tokens of a search over all distances (ATS's rule)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference import inputs
from reference.compare import assert_equal
from reference.inputs import FLOATS, integer, log_uniform, seeded
from reference.samples import sample_row
from same_bits import on_every_level
from torch import Tensor

S = torch.rand(2, 5)


def check(scores: Tensor, points: int | Tensor, what: str = "", capacity: int | None = None, candidates: Tensor | None = None) -> None:
    got = ts.select_samples(scores, points, capacity=capacity, candidates=candidates)
    width = capacity if capacity is not None else points if isinstance(points, int) else points.shape[1]
    counted = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
    assert got.index.shape == (scores.shape[0], width)
    for b, (row, mask) in enumerate(zip(scores.float().tolist(), counted.tolist(), strict=True)):
        want = sample_row(row, points if isinstance(points, int) else points[b].cpu().numpy(), mask)
        assert (int(got.counts[b]), bool(got.overflow[b])) == (len(want), len(want) > width), f"row {b} of {what}"
        kept = want[len(want) - width :] if len(want) > width else want
        assert got.index[b].tolist() == kept + [-1] * (width - len(kept)), f"row {b} of {what}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", inputs.SCORE_KINDS)
def test_select_samples_matches_reference(kind: str, dtype: torch.dtype, device: str) -> None:
    for N in (1, 2, 7, 33, 196, 577):
        x = inputs.scores(seeded(N), kind, 2, N, dtype, device)
        mask = (torch.rand(2, N, generator=seeded(N)) < 0.6).to(device)
        for R in (1, N // 2, N):
            check(x, R, f"{kind} N={N} R={R}")
            check(x.abs(), R, f"|{kind}| N={N} R={R}", capacity=R // 2, candidates=mask)


def test_select_samples_is_ats(device: str) -> None:
    """ATS's steps in torch: sort, cumsum, normalise, argmin over all distances, unique; float64, so that its sums are as exact as ours."""
    x = torch.softmax(2 * torch.randn(4, 196, generator=seeded(1)), -1).to(device)
    ordered, where = x.double().sort(dim=1, stable=True)
    cdf = ordered.cumsum(1)
    cdf = ((cdf - cdf[:, :1]) / (cdf[:, -1:] - cdf[:, :1])).float()
    start = cdf.where(cdf > 0, torch.inf).amin(1, keepdim=True)
    points = start + (1 - start) * torch.arange(196, device=device) / 195
    picks = (points[:, :, None] - cdf[:, None]).abs().argmin(2)
    for given in (196, points):
        got = ts.select_samples(x, given)
        for b in range(4):
            assert got.index[b, : got.counts[b]].tolist() == where[b][picks[b].unique()].tolist()
            assert bool((got.index[b, got.counts[b] :] == -1).all())


def test_select_samples_edges(device: str) -> None:
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[0.0, 0.0, 0.0], [nan, -1.0, 2.0], [inf, 1.0, inf], [-inf, -0.0, 0.0], [1.0, 1.0, 1.0]], device=device)
    got = ts.select_samples(rows, 4)
    assert got.counts.tolist() == [0, 1, 2, 0, 2]
    assert got.index.tolist() == [[-1] * 4, [2, -1, -1, -1], [0, 2, -1, -1], [-1] * 4, [1, 2, -1, -1]]
    assert ts.select_samples(rows[:, :1], 3).counts.tolist() == [0] * 5  # one token: nothing lies above the weakest
    few = ts.select_samples(rows[4:], 4, capacity=1)
    assert (few.index.tolist(), few.counts.tolist(), few.overflow.tolist()) == ([[2]], [2], [True])
    zero = torch.tensor([[0.0, nan]], device=device)
    assert ts.select_samples(rows[4:], zero).index.tolist() == [[0, -1]]  # only points of one's own pick the weakest token


@pytest.mark.parametrize(("B", "N", "R"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_select_samples_empty(B: int, N: int, R: int, device: str) -> None:
    got = ts.select_samples(torch.rand(B, N, device=device), R)
    assert (got.index.shape, got.counts.tolist(), got.overflow.tolist()) == ((B, R), [0] * B, [False] * B)
    assert bool((got.index == -1).all())


def test_select_samples_strided_rows_levels_and_threads() -> None:
    wide = inputs.scores(seeded(6), "negative", 90, 200).abs()
    for view in (wide[:, 1:], wide[::20, 3:90], wide[1:2, 7:].expand(4, -1)):
        check(view, 50)
    on_every_level(lambda: ts.select_samples(wide, 64))


def test_select_samples_fuzz(device: str) -> None:
    for seed in range(120):
        g = seeded(seed)
        B, N = log_uniform(g, 1, 5), log_uniform(g, 1, 500)
        x = inputs.scores(g, inputs.SCORE_KINDS[integer(g, 0, len(inputs.SCORE_KINDS) - 1)], B, N, FLOATS[integer(g, 0, 2)], device)
        R = integer(g, 0, N + 5)
        points: int | Tensor = R if integer(g, 0, 1) else (torch.rand(B, R, generator=g) * 1.4 - 0.2).to(device)
        mask = (torch.rand(B, N, generator=g) < torch.rand((), generator=g)).to(device) if integer(g, 0, 1) else None
        check(x, points, f"seed {seed}", None if integer(g, 0, 1) else integer(g, 0, R), mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_select_samples_opcheck(dtype: torch.dtype, device: str) -> None:
    x = inputs.normal(seeded(3), 3, 20, dtype=dtype, device=device)
    for arguments in ((x, 7, None, 7, None), (x, 4, torch.rand(3, 4, device=device), 2, x > 0)):
        results = torch.library.opcheck(torch.ops.tokensieve.select_samples.default, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


def test_select_samples_compiles_with_dynamic_shapes(device: str) -> None:
    def step(scores: Tensor, points: Tensor, R: int) -> tuple[Tensor, ...]:
        return (*ts.select_samples(scores * 2, R), *ts.select_samples(scores, points * 0.5, capacity=R))

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, N, R, P in ((2, 30, 7, 9), (3, 77, 40, 50), (5, 200, 11, 12)):
            scores, points = torch.rand(B, N, generator=seeded(N)).to(device), torch.rand(B, P, generator=seeded(P)).to(device)
            for got, want in zip(function(scores, points, R), step(scores, points, R), strict=True):
                assert_equal(got, want)
    torch._dynamo.reset()


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scores list": ({"scores": [[1.0]]}, TypeError, "scores must be a torch.Tensor, got list"),
    "scores rank": ({"scores": S[0]}, ValueError, r"scores must be \(B, N\), got shape \(5,\)"),
    "scores dtype": ({"scores": S.double()}, TypeError, "scores must be float32 or .*, got float64"),
    "scores stride": ({"scores": S.t()}, ValueError, "scores must be contiguous in its last dimension"),
    "points float": ({"points": 2.5}, TypeError, "points must be an int, got float"),
    "points negative": ({"points": -1}, ValueError, "points must be at least 0, got -1"),
    "points rank": ({"points": torch.rand(3)}, ValueError, r"points must be \(B, R\), got shape \(3,\)"),
    "points rows": ({"points": torch.rand(3, 4)}, ValueError, r"points must be \(B=2, R\), got shape \(3, 4\)"),
    "points dtype": ({"points": torch.rand(2, 4).double()}, TypeError, "points must be float32, got float64"),
    "points device": ({"points": torch.rand(2, 4, device="meta")}, ValueError, "points must be on the device of scores"),
    "capacity": ({"capacity": -2}, ValueError, "capacity must be at least 0, got -2"),
    "capacity float": ({"capacity": 2.0}, TypeError, "capacity must be an int, got float"),
    "candidates shape": ({"candidates": torch.ones(2, 4).bool()}, ValueError, r"candidates must be \(B, N\) = \(2, 5\)"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_select_samples_bad_input(name: str) -> None:
    change, kind, message = ERRORS[name]
    with pytest.raises(kind, match=rf"^tokensieve\.select_samples: {message}"):
        ts.select_samples(**({"scores": S, "points": 3} | change))


def test_select_samples_meta() -> None:
    got = ts.select_samples(S.to("meta"), 7, capacity=4)
    assert [t.shape for t in got] == [(2, 4), (2,), (2,)]
    assert [t.dtype for t in got] == [torch.int64, torch.int64, torch.bool]
