"""bipartite_match gives the reference's plan: exactly where cosines are exact, else every pair is the best up to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, seeded
from reference.match import bipartite_match as reference
from reference.similarity import floor_of, random_mask, rows
from same_bits import on_any_threads

# (N, C): one token, odd and even, panel (16), block (144 sources) and radix (40 keys) edges, real sizes
SHAPES = [(1, 4), (2, 4), (3, 16), (31, 16), (33, 64), (83, 16), (289, 64), (577, 16)]


def assert_plan(got: ts.MergePlan, metric: torch.Tensor, r: int, floor: float = 1e-6, **options: Any) -> None:
    want = reference(metric, r, **options)
    for name, g, w in zip(got._fields, got, want, strict=True):
        if name == "similarity":
            assert torch.allclose(g.cpu().double(), w, rtol=0, atol=floor, equal_nan=True), name
        else:
            assert_equal(g.cpu(), w, f"{name} r={r} {tuple(metric.shape)} {list(options)}")


def amounts(most: int) -> list[int]:
    return sorted({0, min(1, most), most // 3, most})


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("kind", ["signs", "one-hot", "special"])
def test_bipartite_match_exact_cosines_exact_plans(kind: str, order: str, device: str) -> None:
    for N, C in SHAPES:
        x = rows(seeded(N), kind, 2, N, C, device=device)
        for keep in sorted({0, 1, min(2, N)} if N < 200 else {1}):
            most = min(len(range(keep + keep % 2, N, 2)), len(range(keep + 1 - keep % 2, N, 2)))
            for r in amounts(most):
                assert_plan(ts.bipartite_match(x, r, keep=keep, order=order), x, r, keep=keep, order=order)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bipartite_match_normal_data_every_dtype(dtype: torch.dtype, device: str) -> None:
    for N, C in ((40, 24), (197, 64), (128, 200)):
        x = normal(seeded(N), 2, N, C, dtype=dtype, device=device)
        for r in amounts(N // 2 - 1):
            assert_plan(ts.bipartite_match(x, r, keep=1), x, r, 4 * floor_of(C), keep=1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bipartite_match_heads_are_averaged_in_float32(dtype: torch.dtype, device: str) -> None:
    keys = normal(seeded(5), 2, 61, 3, 20, dtype=dtype, device=device).transpose(1, 2)  # (B, H, N, D), storage (B, N, H, D)
    assert_plan(ts.bipartite_match(keys, 20, keep=1), keys, 20, 4 * floor_of(20), keep=1)
    mean = ts.bipartite_match(keys.float().mean(1), 20, keep=1)
    for got, want in zip(ts.bipartite_match(keys[:, :, :, :], 20, keep=1)[3:], mean[3:], strict=True):
        assert_equal(got, want)


def test_bipartite_match_is_tomes_matching(device: str) -> None:
    """Spec tome: even and odd tokens, CLS never a source, best pairs first; written with the whole matrix."""
    x = normal(seeded(3), 2, 197, 64, device=device)
    unit = x / x.norm(dim=-1, keepdim=True)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, to = scores.max(-1)
    rank = best.argsort(dim=-1, descending=True)
    plan = ts.bipartite_match(x, 13, keep=1)
    assert_equal(plan.source, 2 * rank[:, :13])
    assert_equal(plan.destination, 2 * to.gather(1, rank[:, :13]) + 1)
    stay = (2 * rank[:, 13:]).sort(dim=1).values
    assert_equal(plan.index, torch.cat([stay, torch.arange(1, 197, 2, device=device).expand(2, -1)], 1))


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("kind", ["signs", "special"])
def test_bipartite_match_given_lists(kind: str, order: str, device: str) -> None:
    N = 90
    x = rows(seeded(9), kind, 2, N, 16, device=device)
    shuffled = torch.stack([torch.randperm(N, generator=seeded(s)) for s in (1, 2)]).to(device)
    for keep, S, T in ((0, 60, 30), (3, 20, 67), (5, 50, 20), (4, 3, 1), (0, 0, 90)):
        parts = shuffled[:, :keep], shuffled[:, keep : keep + S], shuffled[:, keep + S : keep + S + T]
        for lists in (parts, tuple(p[0] for p in parts)):
            options = {"keep": lists[0], "sources": lists[1], "targets": lists[2], "order": order}
            for r in amounts(S):
                assert_plan(ts.bipartite_match(x, r, **options), x, r, **options)


def test_bipartite_match_lists_with_minus_one_and_unnamed_tokens(device: str) -> None:
    x = rows(seeded(4), "signs", 1, 12, 16, device=device)
    options = {
        "sources": torch.tensor([[0, -1, 4, 6]], device=device),
        "targets": torch.tensor([[1, -1, 5]], device=device),
        "keep": torch.tensor([[11, -1]], device=device),
    }
    for r in range(5):
        assert_plan(ts.bipartite_match(x, r, **options), x, r, **options)
    plan = ts.bipartite_match(x, 4, **options)
    assert plan.source[0, -1] == plan.destination[0, -1] == -1
    assert plan.inverse[0, 2] == -1  # in no list


@pytest.mark.parametrize("kind", ["signs", "special"])
def test_bipartite_match_bias_ranks_sources_and_leaves_targets(kind: str, device: str) -> None:
    x = rows(seeded(6), kind, 2, 64, 16, device=device)
    bias = torch.randint(-4, 5, (2, 32), generator=seeded(7)).div(4.0)
    bias[0, 3], bias[1, 5], bias[1, 6] = torch.inf, -torch.inf, torch.nan
    bias = bias.to(device)
    for order in ("position", "score"):
        for r in amounts(32):
            assert_plan(ts.bipartite_match(x, r, bias=bias, order=order), x, r, bias=bias, order=order)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_bipartite_match_candidates_neither_merge_nor_receive(share: float, device: str) -> None:
    x = rows(seeded(8), "special", 3, 51, 16, device=device)
    mask = random_mask(3, 3, 51, share).to(device)
    lists = {"sources": torch.arange(30, 50, device=device), "targets": torch.arange(5, 30, device=device), "keep": 5}
    for options in ({}, {"keep": 1}, lists):
        for r in amounts(20):
            plan = ts.bipartite_match(x, r, candidates=mask, **options)
            assert_plan(plan, x, r, candidates=mask, **options)
            for b in range(3):
                for side in (plan.source[b], plan.destination[b]):
                    assert bool(mask[b][side[side >= 0]].all())


def test_bipartite_match_equal_tokens_and_zero_tokens(device: str) -> None:
    for x in (torch.ones(1, 10, 8, device=device), torch.zeros(1, 10, 8, device=device)):
        plan = ts.bipartite_match(x, 3)
        assert_equal(plan.source.cpu(), torch.tensor([[0, 2, 4]]))  # ties: first source, first target
        assert_equal(plan.destination.cpu(), torch.tensor([[1, 1, 1]]))
        torch.testing.assert_close(plan.similarity.cpu(), torch.full((1, 3), float(x[0, 0, 0])))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bipartite_match_large_values_do_not_overflow(dtype: torch.dtype, device: str) -> None:
    """Values up to 32768: their squares and the sum of four heads are beyond float16. Up to 2 ** 61: squares are nearly beyond float32."""
    large = 2.0**13 if dtype == torch.float16 else 2.0**59
    x = rows(seeded(3), "signs", 2, 33, 16, dtype=dtype, device=device)
    for metric, small in ((x * large, x), (x[:, None].expand(-1, 4, -1, -1) * large, x)):
        got, want = ts.bipartite_match(metric, 9), ts.bipartite_match(small, 9)
        assert_equal(got.index, want.index)
        assert_equal(got.inverse, want.inverse)
        torch.testing.assert_close(got.similarity, want.similarity, rtol=1e-5, atol=1e-6)


def test_bipartite_match_empty_batch_and_tokens(device: str) -> None:
    assert ts.bipartite_match(torch.ones(0, 6, 4, device=device), 2).index.shape == (0, 4)
    assert ts.bipartite_match(torch.ones(2, 0, 4, device=device), 0).inverse.shape == (2, 0)
    no_channels = ts.bipartite_match(torch.ones(1, 6, 0, device=device), 2)
    assert_equal(no_channels.source.cpu(), torch.tensor([[0, 2]]))


def test_bipartite_match_strides_unaligned_and_repeatable(device: str) -> None:
    x = rows(seeded(2), "signs", 3, 70, 16, device=device)
    wide = torch.full((3, 140, 33), 5.0, device=device)
    wide[:, ::2, 1:17] = x
    view = wide[:, ::2, 1:17]
    for got, want in zip(ts.bipartite_match(view, 20), ts.bipartite_match(x, 20), strict=True):
        assert_equal(got, want)
    for got, want in zip(ts.bipartite_match(x, 20), ts.bipartite_match(x, 20), strict=True):
        assert_equal(got, want)
    one = ts.bipartite_match(x[1:2], 20)
    for got, want in zip(one, ts.bipartite_match(x, 20), strict=True):
        assert_equal(got[0], want[1])


def test_bipartite_match_threads_give_one_plan() -> None:
    x = normal(seeded(11), 3, 300, 72)
    on_any_threads(lambda: ts.bipartite_match(x, 80, keep=1))


def test_bipartite_match_opcheck(device: str) -> None:
    op = torch.ops.tokensieve.bipartite_match.default
    x = normal(seeded(1), 2, 20, 8, device=device)
    lists = torch.arange(0, 12, device=device), torch.arange(12, 18, device=device), torch.arange(18, 20, device=device)
    bias, mask = normal(seeded(2), 2, 12, device=device), normal(seeded(3), 2, 20, device=device) > 0
    for arguments in ((x, 4, 1, None, None, None, None, None, 0), (x.clone().requires_grad_(), 7, 0, *lists, bias, mask, 1)):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("seed", range(8))
def test_bipartite_match_fuzz(seed: int, device: str) -> None:
    g = seeded(seed + 1000)
    B, N, C = (int(torch.randint(1, n, (1,), generator=g)) for n in (4, 200, 3))
    x = rows(g, "special", B, N, 4**C, device=device)
    order = ("position", "score")[seed % 2]
    mask = (torch.rand(B, N, generator=g) < 0.8).to(device)
    S = int(torch.randint(0, N + 1, (1,), generator=g))
    ids = torch.stack([torch.randperm(N, generator=g) for _ in range(B)]).to(device)
    bias = torch.randint(-3, 4, (B, S), generator=g).float().to(device)
    lists = {"sources": ids[:, :S], "targets": ids[:, S:], "bias": bias}
    r = int(torch.randint(0, S + 1, (1,), generator=g))
    for options in ({**lists, "order": order}, {**lists, "candidates": mask, "order": order}):
        assert_plan(ts.bipartite_match(x, r, **options), x, r, **options)


X = torch.ones(2, 10, 6)
LIST = torch.arange(5)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "metric type": (lambda: ts.bipartite_match([1.0], 0), TypeError, "metric must be a torch.Tensor, got list"),
    "metric rank": (lambda: ts.bipartite_match(X[0], 0), ValueError, r"metric must be \(B, N, C\) or \(B, H, N, D\), got shape \(10, 6\)"),
    "metric dtype": (lambda: ts.bipartite_match(X.double(), 0), TypeError, "metric must be float32 or float16 or bfloat16, got float64"),
    "metric stride": (lambda: ts.bipartite_match(X.transpose(1, 2), 0), ValueError, "metric must be contiguous .* got stride 6"),
    "no heads": (lambda: ts.bipartite_match(torch.ones(2, 0, 10, 6), 0), ValueError, "metric must have at least one head"),
    "r negative": (lambda: ts.bipartite_match(X, -1), ValueError, r"r must be in \[0, 5\] \(half of the tokens behind keep\), got -1"),
    "r above half": (lambda: ts.bipartite_match(X, 6), ValueError, r"r must be in \[0, 5\] .* got 6"),
    "r of one token": (lambda: ts.bipartite_match(X[:, :1], 1), ValueError, r"r must be in \[0, 0\] .* got 1"),
    "r of no token": (lambda: ts.bipartite_match(X[:, :0], 1), ValueError, r"r must be in \[0, 0\] .* got 1"),
    "r odd": (lambda: ts.bipartite_match(X[:, :9], 5), ValueError, r"r must be in \[0, 4\] .* got 5"),
    "r above half behind keep": (lambda: ts.bipartite_match(X, 5, keep=1), ValueError, r"r must be in \[0, 4\] .* got 5"),
    "r above S": (lambda: ts.bipartite_match(X, 6, sources=LIST, targets=LIST + 5), ValueError, r"r must be in \[0, 5\] \(S\), got 6"),
    "r float": (lambda: ts.bipartite_match(X, 1.5), TypeError, "r must be an int, got float"),
    "one list": (lambda: ts.bipartite_match(X, 1, sources=LIST), ValueError, "sources and targets come together or not at all"),
    "list dtype": (lambda: ts.bipartite_match(X, 1, sources=LIST.int(), targets=LIST), TypeError, "sources must be int64, got int32"),
    "list shape": (
        lambda: ts.bipartite_match(X, 1, sources=LIST, targets=LIST.expand(3, -1)),
        ValueError,
        r"targets must be \(n,\) or \(B=2, n\), got shape \(3, 5\)",
    ),
    "list range": (
        lambda: ts.bipartite_match(X, 1, sources=LIST + 6, targets=LIST),
        ValueError,
        r"sources must be in \[-1, N=10\), got 10 at \(4,\)",
    ),
    "keep range": (lambda: ts.bipartite_match(X, 0, keep=11), ValueError, r"keep must be in \[0, N=10\], got 11"),
    "keep tensor alone": (lambda: ts.bipartite_match(X, 0, keep=LIST), ValueError, "keep must be an int where sources"),
    "bias shape": (
        lambda: ts.bipartite_match(X, 1, bias=torch.ones(2, 4)),
        ValueError,
        r"bias must be \(B, S\) = \(2, 5\), got shape \(2, 4\)",
    ),
    "bias dtype": (lambda: ts.bipartite_match(X, 1, bias=torch.ones(2, 5).half()), TypeError, "bias must be float32, got float16"),
    "mask dtype": (lambda: ts.bipartite_match(X, 1, candidates=torch.ones(2, 10)), TypeError, "candidates must be bool, got float32"),
    "mask shape": (
        lambda: ts.bipartite_match(X, 1, candidates=torch.ones(2, 9).bool()),
        ValueError,
        r"candidates must be \(B, N\) = \(2, 10\)",
    ),
    "order": (lambda: ts.bipartite_match(X, 1, order="best"), ValueError, "order must be one of 'position', 'score', got 'best'"),
    "device": (
        lambda: ts.bipartite_match(X, 1, candidates=torch.ones(2, 10, device="meta").bool()),
        ValueError,
        "candidates must be on the device of metric",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bipartite_match_errors(name: str) -> None:
    call, kind, text = BAD[name]
    with pytest.raises(kind, match=r"tokensieve\.bipartite_match: " + text):
        call()


def test_bipartite_match_debug_checks_find_a_token_in_two_lists() -> None:
    with ts.debug_checks(), pytest.raises(ValueError, match="sources, targets and keep must name a token once per row"):
        ts.bipartite_match(X, 1, sources=LIST, targets=LIST + 4)


def test_bipartite_match_meta_and_no_gradient() -> None:
    plan = ts.bipartite_match(X.to("meta"), 3)
    assert [tuple(t.shape) for t in plan] == [(2, 3), (2, 3), (2, 3), (2, 7), (2, 10)]
    assert not ts.bipartite_match(X.clone().requires_grad_(), 3).similarity.requires_grad
