"""score_quantiles to the bit against a sort, and within one unit in the last place of torch.quantile; tukey_fence on top."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tokensieve as ts
import torch
from reference import inputs
from reference.compare import assert_equal
from reference.inputs import FLOATS, integer, log_uniform, seeded
from reference.quantiles import quantile_row
from same_bits import on_every_level
from torch import Tensor

Q = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
S = torch.zeros(2, 5)


def reference(scores: Tensor, q: Any = Q, candidates: Tensor | None = None) -> Tensor:
    counted = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
    rows = [[quantile_row(row, value, mask) for value in q] for row, mask in zip(scores.float().tolist(), counted.tolist(), strict=True)]
    return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(scores.shape[0], len(q))).to(scores.device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", inputs.SCORE_KINDS)
def test_score_quantiles_matches_reference(kind: str, dtype: torch.dtype, device: str) -> None:
    for N in (1, 2, 7, 16, 31, 33, 257, 577, 2880):
        x = inputs.scores(seeded(N), kind, 2, N, dtype, device)
        assert_equal(ts.score_quantiles(x, Q), reference(x), f"{kind} N={N} {dtype}")
        mask = (torch.rand(2, N, generator=seeded(N)) < 0.6).to(device)
        assert_equal(ts.score_quantiles(x, Q, candidates=mask), reference(x, candidates=mask), f"{kind} N={N} {dtype} masked")


@pytest.mark.parametrize("N", [2, 577, 12_544, 50_176])
def test_score_quantiles_follows_torch(N: int, device: str) -> None:
    x = torch.softmax(2 * torch.randn(3, N, generator=seeded(N)), -1).to(device)
    want = torch.quantile(x, torch.tensor(Q, device=device), dim=1).T
    got = ts.score_quantiles(x, Q)
    assert bool(((got - want).abs() <= torch.finfo(torch.float32).eps * want).all())
    exact = x.sort(dim=1).values
    assert_equal(ts.score_quantiles(x, (0.0, 1.0)), torch.stack([exact[:, 0], exact[:, -1]], 1))


def test_score_quantiles_edges(device: str) -> None:
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[-inf, inf, 1.0], [inf, inf, inf], [nan, 1.0, 2.0], [-inf, -inf, 3e38], [-3e38, 3e38, 3e38]], device=device)
    got = ts.score_quantiles(rows, (0.25, 0.5, 0.75))
    want = [[-inf, 1.0, inf], [inf, inf, inf], [nan, nan, nan], [-inf, -inf, -inf], [0.0, 3e38, 3e38]]
    assert_equal(got, torch.tensor(want, device=device))
    assert math.isnan(ts.score_quantiles(torch.tensor([[-inf, inf]], device=device), (0.5,)).item())
    zero = ts.score_quantiles(torch.tensor([[-0.0, -0.0]], device=device), (0.0,))
    assert not torch.signbit(zero).any()
    masked = ts.score_quantiles(rows, (0.5,), candidates=torch.zeros_like(rows, dtype=torch.bool))
    assert bool(masked.isnan().all())


@pytest.mark.parametrize(("B", "N", "n"), [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_score_quantiles_empty(B: int, N: int, n: int, device: str) -> None:
    got = ts.score_quantiles(torch.zeros(B, N, device=device), [0.5] * n)
    assert (got.shape, got.dtype, got.device.type) == ((B, n), torch.float32, device)
    assert bool(got.isnan().all()) == (N == 0 or not got.numel())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_score_quantiles_strided_and_unaligned_rows(dtype: torch.dtype, device: str) -> None:
    wide = inputs.scores(seeded(6), "normal", 8, 200, dtype, device)
    for view in (wide[:, 1:], wide[::2, 3:90], wide[1:2, 7:].expand(4, -1)):
        assert_equal(ts.score_quantiles(view, Q), reference(view))


def test_score_quantiles_levels_and_threads_agree() -> None:
    x = inputs.scores(seeded(1), "normal", 90, 700)
    (got,) = on_every_level(lambda: ts.score_quantiles(x, Q))
    assert_equal(got, reference(x))


def test_score_quantiles_fuzz(device: str) -> None:
    for seed in range(150):
        g = seeded(seed)
        B, N = log_uniform(g, 1, 5), log_uniform(g, 1, 2000)
        kind = inputs.SCORE_KINDS[integer(g, 0, len(inputs.SCORE_KINDS) - 1)]
        x = inputs.scores(g, kind, B, N, FLOATS[integer(g, 0, 2)], device)
        q = torch.rand(integer(g, 1, 4), generator=g).tolist()
        mask = (torch.rand(B, N, generator=g) < torch.rand((), generator=g)).to(device) if integer(g, 0, 1) else None
        assert_equal(ts.score_quantiles(x, q, candidates=mask), reference(x, q, mask), f"seed {seed}: {kind} B={B} N={N} q={q}")


def test_tukey_fence_counts_outliers(device: str) -> None:
    """PAINT's count: scores strictly above Q3 + 1.5 (Q3 - Q1) by numpy's percentiles."""
    x = torch.randn(4, 576, generator=seeded(2)).exp().to(device)
    got = ts.select_threshold(x, ts.tukey_fence(x), capacity=576)
    for b, row in enumerate(x.cpu().numpy()):
        first, third = np.percentile(row.astype(np.float64), [25, 75])
        assert int(got.counts[b]) == int((row > third + 1.5 * (third - first)).sum())
    lower = ts.tukey_fence(-x, side="lower")
    assert_equal(lower, -ts.tukey_fence(x))
    mask = torch.rand(4, 576, generator=seeded(3)).to(device) < 0.5
    quartiles = reference(x, (0.25, 0.75), mask)
    assert_equal(ts.tukey_fence(x, factor=2.0, candidates=mask), quartiles[:, 1] + 2.0 * (quartiles[:, 1] - quartiles[:, 0]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_score_quantiles_opcheck(dtype: torch.dtype, device: str) -> None:
    x = inputs.normal(seeded(3), 3, 20, dtype=dtype, device=device)
    for arguments in ((x, [0.25, 0.5], None), (x, [0.9], x > 0)):
        results = torch.library.opcheck(torch.ops.tokensieve.score_quantiles.default, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


def test_score_quantiles_compiles_with_dynamic_shapes(device: str) -> None:
    def step(scores: Tensor, capacity: int) -> tuple[Tensor, ...]:
        low, high = ts.score_quantiles(scores * 2, (0.05, 0.95)).unbind(1)
        kept = ts.select_threshold(scores * 2, low + 0.2 * (high - low), capacity=capacity)
        return (*kept, ts.tukey_fence(scores))

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, N, capacity in ((2, 30, 7), (3, 77, 40), (5, 200, 11)):
            scores = torch.rand(B, N, generator=seeded(N)).to(device)
            for got, want in zip(function(scores, capacity), step(scores, capacity), strict=True):
                assert_equal(got, want)
    torch._dynamo.reset()


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "scores list": (lambda: ts.score_quantiles([[1.0]], (0.5,)), TypeError, "score_quantiles: scores must be a torch.Tensor, got list"),
    "scores rank": (lambda: ts.score_quantiles(S[0], (0.5,)), ValueError, r"score_quantiles: scores must be \(B, N\), got shape \(5,\)"),
    "scores dtype": (
        lambda: ts.score_quantiles(S.double(), (0.5,)),
        TypeError,
        "score_quantiles: scores must be float32 or .*, got float64",
    ),
    "scores stride": (lambda: ts.score_quantiles(S.t(), (0.5,)), ValueError, "score_quantiles: scores must be contiguous in its last"),
    "q float": (lambda: ts.score_quantiles(S, 0.5), TypeError, "score_quantiles: q must be a sequence of floats, got float"),
    "q tensor": (lambda: ts.score_quantiles(S, torch.ones(2)), TypeError, "score_quantiles: q must be a sequence of floats, got Tensor"),
    "q text": (lambda: ts.score_quantiles(S, ("a",)), TypeError, "score_quantiles: q must be a sequence of floats, got str in it"),
    "q large": (lambda: ts.score_quantiles(S, (0.5, 1.1)), ValueError, r"score_quantiles: q must be in \[0, 1\], got 1.1"),
    "q nan": (lambda: ts.score_quantiles(S, (math.nan,)), ValueError, r"score_quantiles: q must be in \[0, 1\], got nan"),
    "q many": (lambda: ts.score_quantiles(S, [0.5] * 17), ValueError, "score_quantiles: q must hold at most 16 numbers, got 17"),
    "candidates": (
        lambda: ts.score_quantiles(S, (0.5,), candidates=torch.ones(2, 4).bool()),
        ValueError,
        r"score_quantiles: candidates must be \(B, N\) = \(2, 5\), got shape \(2, 4\)",
    ),
    "side": (lambda: ts.tukey_fence(S, side="left"), ValueError, "tukey_fence: side must be one of 'upper', 'lower', got 'left'"),
    "factor": (lambda: ts.tukey_fence(S, factor="wide"), TypeError, "tukey_fence: factor must be a float, got str"),
    "fence scores": (lambda: ts.tukey_fence(S.long()), TypeError, "tukey_fence: scores must be float32 or .*, got int64"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_score_quantiles_bad_input(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=rf"^tokensieve\.{message}"):
        call()


def test_score_quantiles_meta() -> None:
    got = ts.score_quantiles(S.to("meta").half(), (0.1, 0.2, 0.3))
    assert (got.shape, got.dtype) == ((2, 3), torch.float32)
    assert ts.tukey_fence(S.to("meta")).shape == (2,)


def test_thresholds_carry_no_gradient() -> None:
    scores = torch.rand(2, 9, requires_grad=True)
    assert not ts.score_quantiles(scores, (0.25, 0.5)).requires_grad
    assert not ts.tukey_fence(scores).requires_grad
