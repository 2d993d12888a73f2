"""attention_pagerank against v times the stored float64 map."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import EPS, assert_equal, logit_magnitude, worst
from reference.inputs import FLOATS, integer, log_uniform, queries_and_keys, seeded
from reference.ops import attention_pagerank
from same_bits import on_any_threads, on_every_level
from torch import Tensor


def check(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    got, want = ts.attention_pagerank(query, key, **options), attention_pagerank(query, key, **options)
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    if want.numel():
        magnitude = logit_magnitude(query, key, options.get("scale"), None) / options.get("temperature", 1.0)
        error = float((got.double() - want).abs().max())
        limit = EPS * (16 + 4 * magnitude) * float(want.abs().max()) * max(1, options.get("iterations", 5))
        assert error <= limit, f"{worst(got, want)}, limit {limit:.3g}"
    return got


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_pagerank_iterations_and_masks(causal: bool, dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(1), 2, 4, 2, 90, 90, 32, dtype, device, tokens_first=causal)
    mask = torch.rand(2, 90, generator=seeded(2)).to(device) > 0.3
    start = torch.rand(2, 90, generator=seeded(3)).to(device)
    for iterations in (0, 1, 2, 5):
        check(query, key, causal=causal, iterations=iterations)
        check(query, key, causal=causal, iterations=iterations, mask=mask, temperature=0.5)
        check(query, key, causal=causal, iterations=iterations, mask=mask, start=start, scale=0.05)


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "N", "D"),
    [(1, 4, 4, 196, 64), (1, 7, 1, 130, 128), (3, 1, 1, 25, 16), (1, 1, 1, 1, 4), (2, 2, 2, 2, 3), (1, 1, 1, 300, 256), (5, 27, 27, 20, 8)],
)
def test_attention_pagerank_shapes(B: int, H: int, Hkv: int, N: int, D: int, device: str) -> None:
    query, key = queries_and_keys(seeded(N), B, H, Hkv, N, N, D, torch.float32, device)
    check(query, key)
    check(query, key, causal=True, iterations=3)


def test_attention_pagerank_keeps_the_mass(device: str) -> None:
    query, key = queries_and_keys(seeded(4), 1, 2, 2, 80, 80, 16, torch.float32, device)
    torch.testing.assert_close(ts.attention_pagerank(query, key, iterations=20).sum(-1), torch.ones(1, 2, device=device))
    rank = ts.attention_pagerank(query, key, causal=True, iterations=200)
    torch.testing.assert_close(rank[..., 0], torch.ones(1, 2, device=device), rtol=1e-4, atol=0)  # all flows to the first token


def test_attention_pagerank_masked_tokens_spread_but_receive_nothing(device: str) -> None:
    query, key = queries_and_keys(seeded(5), 1, 2, 2, 60, 60, 16, torch.float32, device)
    mask = torch.arange(60, device=device)[None] % 3 != 0
    rank = check(query, key, mask=mask, iterations=1)
    assert bool((rank[..., ::3] == 0).all())
    torch.testing.assert_close(rank.sum(-1), torch.ones(1, 2, device=device))  # ghosts gave theirs
    rank = check(query, key, mask=mask, causal=True, iterations=1)  # token 0 sees nothing: its share is lost
    torch.testing.assert_close(rank.sum(-1), torch.full((1, 2), 59 / 60, device=device))
    assert bool((ts.attention_pagerank(query, key, mask=torch.zeros_like(mask)) == 0).all())


def test_attention_pagerank_first_pass_is_a_mean_of_rows(device: str) -> None:
    query, key = queries_and_keys(seeded(6), 2, 4, 2, 70, 70, 32, torch.float32, device)
    once = ts.attention_pagerank(query, key, iterations=1)
    torch.testing.assert_close(once, ts.attention_scores(query, key, head_reduction=None), rtol=1e-5, atol=1e-8)
    twice = ts.attention_scores(query[:, 1:2], key[:, :1], row_weights=once[:, 1], query_reduction="sum")
    torch.testing.assert_close(ts.attention_pagerank(query, key, iterations=2)[:, 1], twice, rtol=1e-5, atol=1e-8)


def test_attention_pagerank_nan_and_hidden_nan(device: str) -> None:
    query, key = queries_and_keys(seeded(7), 1, 2, 2, 60, 60, 16, torch.float32, device)
    mask = torch.ones(1, 60, dtype=torch.bool, device=device)
    mask[0, 7] = False
    want = ts.attention_pagerank(query, key, mask=mask)
    key[:, :, 7] = torch.nan
    assert_equal(ts.attention_pagerank(query, key, mask=mask), want)
    rank = ts.attention_pagerank(query[:, :, :], key.nan_to_num(0.0).index_fill(1, torch.tensor([1], device=device), torch.nan))
    assert not bool(torch.isnan(rank[:, 0]).any())
    assert bool(torch.isnan(rank[:, 1]).all())


def test_attention_pagerank_of_nothing(device: str) -> None:
    for B, H, N in ((0, 2, 4), (1, 2, 0), (2, 0, 5)):
        query = torch.zeros(B, H, N, 8, device=device)
        assert ts.attention_pagerank(query, torch.zeros(B, max(H, 1), N, 8, device=device)).shape == (B, H, N)


def test_attention_pagerank_threads_and_repetition_do_not_matter() -> None:
    query, key = queries_and_keys(seeded(8), 1, 2, 2, 400, 400, 64, torch.bfloat16)
    on_any_threads(lambda: ts.attention_pagerank(query, key, causal=True))


@pytest.mark.parametrize(("N", "D", "dtype"), [(130, 72, torch.float32), (70, 33, torch.bfloat16), (49, 300, torch.float16)], ids=str)
def test_attention_pagerank_cpu_levels_agree_to_the_bit(N: int, D: int, dtype: torch.dtype) -> None:
    query, key = queries_and_keys(seeded(N), 2, 4, 2, N, N, D, dtype)
    on_every_level(lambda: ts.attention_pagerank(query, key, causal=True, temperature=0.3))


def test_attention_pagerank_fuzz(device: str) -> None:
    for seed in range(7000, 7040):
        generator = seeded(seed)
        Hkv, group = log_uniform(generator, 1, 3), log_uniform(generator, 1, 4)
        B, N, D = log_uniform(generator, 1, 3), log_uniform(generator, 1, 200), log_uniform(generator, 1, 140)
        dtype = FLOATS[integer(generator, 0, 2)]
        query, key = queries_and_keys(generator, B, Hkv * group, Hkv, N, N, D, dtype, device, bool(seed % 2))
        options: dict[str, Any] = {"causal": bool(integer(generator, 0, 1)), "iterations": integer(generator, 0, 6)}
        if integer(generator, 0, 1):
            options["mask"] = (torch.rand(B, 2 * N, generator=generator) > 0.4).to(device)[:, ::2]  # a view
        if integer(generator, 0, 1):
            options["start"] = torch.rand(N, B, generator=generator).to(device).t()
        check(query, key, **options)


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": Q[0]}, ValueError, "query must be (B, H, L, D), got shape (4, 5, 8)"),
        ({"key": torch.zeros(2, 2, 6, 8)}, ValueError, "query and key must be the same tokens, got L=5, N=6"),
        ({"key": K.half()}, TypeError, "key must be float32, got float16"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a float, got str"),
        ({"mask": torch.ones(2, 5)}, TypeError, "mask must be bool, got float32"),
        ({"mask": torch.ones(2, 4).bool()}, ValueError, "mask must be (B, N) = (2, 5), got shape (2, 4)"),
        ({"start": torch.ones(2, 4, 5)}, ValueError, "start must be (B, N), got shape (2, 4, 5)"),
        ({"start": torch.ones(2, 5).double()}, TypeError, "start must be float32, got float64"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
        ({"iterations": 2.0}, TypeError, "iterations must be an int, got float"),
    ],
    ids=str,
)
def test_attention_pagerank_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"query": Q, "key": K, **options}
    with pytest.raises(error, match="tokensieve.attention_pagerank: " + re.escape(message)):
        ts.attention_pagerank(given.pop("query"), given.pop("key"), **given)


def test_attention_pagerank_opcheck_and_compile(device: str) -> None:
    query, key = queries_and_keys(seeded(4), 2, 4, 2, 20, 20, 16, torch.float32, device)
    mask, start = torch.rand(2, 20).to(device) > 0.5, torch.rand(2, 20).to(device)
    for given in ((query, key, None, 1.0, False, None, None, 2), (query.clone().requires_grad_(), key, 0.5, 0.1, True, mask, start, 3)):
        results = torch.library.opcheck(torch.ops.tokensieve.attention_pagerank.default, given)
        assert set(results.values()) == {"SUCCESS"}, results

    def importance(q: Tensor, k: Tensor, seen: Tensor, iterations: int) -> Tensor:
        return ts.attention_pagerank(q * 2, k, mask=seen, causal=True, temperature=0.1, iterations=iterations).square().mean(1).sqrt()

    torch._dynamo.reset()
    function = torch.compile(importance, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, H, N, D, iterations in ((2, 6, 40, 16, 3), (3, 8, 77, 32, 4)):
            query, key = queries_and_keys(seeded(N), B, H, H // 2, N, N, D, torch.float32, device)
            seen = torch.rand(B, N, generator=seeded(1)).to(device) > 0.2
            assert_equal(function(query, key, seen, iterations), importance(query, key, seen, iterations))
    torch._dynamo.reset()
