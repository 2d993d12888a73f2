"""attention_scores against the float64 map: error at most twice that of the naive version in the dtype of the inputs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal, assert_scores
from reference.inputs import FLOATS, normal, queries_and_keys, seeded
from same_bits import on_any_threads
from torch import Tensor

REDUCTIONS = ("mean", "sum", "max", None)


def check(query: Tensor, key: Tensor, what: str = "", **options: Any) -> tuple[Tensor, Tensor]:
    got, lse = ts.attention_scores(query, key, **options, return_lse=True)
    assert_scores(got, lse, query, key, what, **options)
    return got, lse


@pytest.mark.parametrize("tokens_first", [False, True], ids=["BHND", "BNHD"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("D", [16, 20, 64, 72, 80, 128, 256])
def test_attention_scores_head_dims(D: int, dtype: torch.dtype, tokens_first: bool, device: str) -> None:
    for L in (1, 5):
        query, key = queries_and_keys(seeded(D), 2, 4, 2, L, 67, D, dtype, device, tokens_first)
        check(query, key)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("L", [1, 2, 5, 17, 70])
def test_attention_scores_rows_and_reductions(L: int, dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(L), 2, 6, 3, L, 131, 32, dtype, device)
    for rows, heads in itertools.product(REDUCTIONS, REDUCTIONS):
        for causal in (False, True):
            check(query, key, causal=causal, query_reduction=rows, head_reduction=heads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "L", "N", "D"),
    [
        (1, 16, 16, 1, 577, 64),  # CLIP-L, the CLS row
        (1, 32, 32, 1, 640, 128),  # LLaVA-1.5, the last token
        (1, 28, 4, 1, 1500, 128),  # Qwen2.5-VL, seven query heads a key head
        (3, 8, 1, 2, 100, 40),  # one key head for all
        (2, 1, 1, 3, 1, 8),  # one token
        (1, 2, 2, 1, 2, 1),  # one channel
        (5, 3, 3, 9, 7, 24),  # more rows than tokens
    ],
)
def test_attention_scores_shapes(B: int, H: int, Hkv: int, L: int, N: int, D: int, dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(N), B, H, Hkv, L, N, D, dtype, device)
    check(query, key)
    check(query, key, causal=True, query_reduction="sum", head_reduction="max")


def test_attention_scores_key_block_boundaries(device: str) -> None:
    for N in (15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 511, 513, 1025):
        query, key = queries_and_keys(seeded(N), 1, 2, 2, 3, N, 16, torch.float32, device)
        check(query, key, causal=True)
        check(query, key, key_range=(N // 3, N - 1), normalize="range", head_reduction=None)


@pytest.mark.parametrize("normalize", ["row", "range"])
@pytest.mark.parametrize("key_range", [(0, 131), (0, 1), (130, 131), (35, 99), (40, 40), (0, 0), (131, 131), (3, 128)])
def test_attention_scores_key_range(key_range: tuple[int, int], normalize: str, device: str) -> None:
    query, key = queries_and_keys(seeded(1), 2, 4, 2, 3, 131, 32, torch.float32, device)
    bias = normal(seeded(2), 2, 1, 3, 131, device=device)
    for causal in (False, True):
        check(query, key, key_range=key_range, normalize=normalize, causal=causal)
        check(query, key, key_range=key_range, normalize=normalize, causal=causal, bias=bias, query_reduction="max", head_reduction=None)


def test_attention_scores_range_is_a_slice_of_the_row(device: str) -> None:
    query, key = queries_and_keys(seeded(2), 1, 4, 4, 1, 300, 64, torch.float32, device)
    whole = ts.attention_scores(query, key)
    part = ts.attention_scores(query, key, key_range=(35, 211))
    torch.testing.assert_close(part, whole[:, 35:211], rtol=1e-6, atol=0)
    torch.testing.assert_close(whole.sum(1), torch.ones(1, device=device), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_scores_query_positions(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(3), 3, 4, 2, 6, 90, 32, dtype, device)
    positions = torch.tensor([[0, 5, 89, 17, 88, 40], [-1, -1, 89, -1, 3, 0], [-1] * 6], device=device)
    for rows in REDUCTIONS:
        got, lse = check(query, key, query_positions=positions, query_reduction=rows)
        assert bool((got[2] == 0).all())
        assert bool(torch.isneginf(lse[2]).all())
        check(query, key, query_positions=positions, query_reduction=rows, key_range=(20, 60), normalize="range")
        check(query, key, query_positions=positions, causal=True, query_reduction=rows)  # positions win over the plain rule


def test_attention_scores_query_positions_may_be_strided(device: str) -> None:
    query, key = queries_and_keys(seeded(3), 2, 2, 2, 3, 20, 16, torch.float32, device)
    positions = torch.tensor([4, 19, -1], device=device).expand(2, 3)
    weights = torch.rand(3, 2, generator=seeded(4)).to(device).t()
    check(query, key, query_positions=positions, row_weights=weights)


@pytest.mark.parametrize("bias_dtype", [*FLOATS, torch.bool], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 77), (1, 1, 1, 77), (2, 1, 1, 77), (1, 4, 1, 77), (2, 1, 5, 77), (1, 1, 5, 1), (2, 4, 1, 1), (1, 1, 1, 1)], ids=str
)
def test_attention_scores_bias(shape: tuple[int, ...], bias_dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(5), 2, 4, 2, 5, 77, 32, torch.float32, device)
    bias = normal(seeded(6), *shape, device=device)
    bias = bias > -0.7 if bias_dtype == torch.bool else bias.to(bias_dtype)
    for causal in (False, True):
        check(query, key, bias=bias, causal=causal)
        check(query, key, bias=bias, causal=causal, key_range=(11, 60), normalize="range", query_reduction="sum")
    half_query, half_key = query.half(), key.half()
    check(half_query, half_key, bias=bias)


def test_attention_scores_bias_views(device: str) -> None:
    query, key = queries_and_keys(seeded(5), 2, 4, 2, 3, 40, 16, torch.float32, device)
    wide = normal(seeded(7), 2, 4, 3, 100, device=device)
    check(query, key, bias=wide[..., 1:41])  # unaligned rows of a wider mask, as a static cache has
    check(query, key, bias=wide[:, :, :, 7:47].transpose(0, 1).contiguous().transpose(0, 1))
    check(query, key, bias=wide[:1, :1, :1, 3:43].expand(2, 4, 3, 40))  # strides 0
    check(query, key, bias=wide[..., :1].expand(2, 4, 3, 40))


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_scores_padding(side: str, device: str) -> None:
    query, key = queries_and_keys(seeded(8), 4, 4, 2, 2, 50, 32, torch.float16, device)
    lengths = torch.tensor([50, 30, 1, 0], device=device)
    slots = torch.arange(50, device=device)
    visible = (slots >= 50 - lengths[:, None]) if side == "left" else (slots < lengths[:, None])
    boolean = visible[:, None, None, :]
    got, lse = check(query, key, bias=boolean)
    assert bool((got[3] == 0).all())
    assert bool(torch.isneginf(lse[3]).all())
    assert bool((got.masked_select(~visible) == 0).all())
    additive = torch.zeros(4, 1, 1, 50, device=device).masked_fill(~boolean, -torch.inf)
    torch.testing.assert_close(ts.attention_scores(query, key, bias=additive), got, rtol=1e-6, atol=0)
    check(query, key, bias=additive, causal=True, query_reduction=None, head_reduction=None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_scores_fully_masked_rows_are_zero(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(9), 1, 2, 2, 8, 5, 16, dtype, device)
    for rows, heads in itertools.product(REDUCTIONS, REDUCTIONS):
        got, lse = check(query, key, causal=True, query_reduction=rows, head_reduction=heads)  # rows 0..2 come before every key
        assert bool(torch.isneginf(lse[:, :, :3]).all())
        assert not bool(torch.isnan(got).any())
    for hidden in (torch.zeros(1, 1, 1, 5, dtype=torch.bool), torch.full((1, 1, 1, 5), -torch.inf)):
        got, lse = check(query, key, bias=hidden.to(device))
        assert bool((got == 0).all())
        assert bool(torch.isneginf(lse).all())


def test_attention_scores_hidden_nan_key_changes_nothing(device: str) -> None:
    query, key = queries_and_keys(seeded(10), 1, 2, 2, 2, 40, 16, torch.float32, device)
    visible = torch.ones(1, 1, 1, 40, dtype=torch.bool, device=device)
    visible[..., 7] = visible[..., 39] = False
    want = ts.attention_scores(query, key, bias=visible)
    key[:, :, 7] = torch.nan
    key[:, :, 39] = torch.inf
    assert_equal(ts.attention_scores(query, key, bias=visible), want)


def test_attention_scores_nan_and_infinite_logits(device: str) -> None:
    query, key = queries_and_keys(seeded(11), 1, 2, 2, 3, 40, 16, torch.float32, device)
    query[:, 0, 1] = torch.nan
    options = {"query_reduction": None, "head_reduction": None}
    got, _ = check(query, key, **options)
    assert bool(torch.isnan(got[0, 0, 1]).all())
    assert not bool(torch.isnan(got[0, 0, [0, 2]]).any() or torch.isnan(got[0, 1]).any())
    bias = torch.zeros(1, 1, 1, 40, device=device)
    bias[..., 5] = torch.inf
    got, _ = ts.attention_scores(query[:, 1:], key[:, 1:], bias=bias, **options, return_lse=True)
    assert bool(torch.isnan(got[..., 5]).all())


@pytest.mark.parametrize("normalize", ["row", "range"])
def test_attention_scores_lse_in_and_out(normalize: str, device: str) -> None:
    query, key = queries_and_keys(seeded(12), 2, 4, 2, 5, 100, 64, torch.float32, device)
    options: dict[str, Any] = {"causal": True, "key_range": (10, 97), "normalize": normalize, "query_reduction": "sum"}
    got, lse = check(query, key, **options)
    again, _ = ts.attention_scores(query, key, **options, lse=lse, return_lse=True)
    torch.testing.assert_close(again, got, rtol=2e-6, atol=1e-9)
    check(query, key, **options, lse=lse)
    foreign = (lse + 0.5).transpose(1, 2).contiguous().transpose(1, 2)  # any strides
    shifted = ts.attention_scores(query, key, **options, lse=foreign)
    torch.testing.assert_close(shifted, got * torch.exp(torch.tensor(-0.5, device=device)), rtol=1e-5, atol=1e-9)


def test_attention_scores_given_lse_of_a_masked_row(device: str) -> None:
    query, key = queries_and_keys(seeded(13), 1, 2, 2, 6, 4, 16, torch.float32, device)
    got, lse = ts.attention_scores(query, key, causal=True, query_reduction=None, return_lse=True)
    again = ts.attention_scores(query, key, causal=True, query_reduction=None, lse=lse)
    torch.testing.assert_close(again, got, rtol=2e-6, atol=0)
    assert bool((again[:, :2] == 0).all())


def test_attention_scores_row_weights(device: str) -> None:
    query, key = queries_and_keys(seeded(14), 3, 4, 2, 5, 60, 32, torch.float32, device)
    weights = torch.rand(3, 5, generator=seeded(15)).to(device)
    weights[1] = 0  # a zero sum gives zeros
    weights[2, 1:4] = 0
    for rows, heads in itertools.product(("mean", "sum"), REDUCTIONS):
        got, _ = check(query, key, row_weights=weights, query_reduction=rows, head_reduction=heads)
        assert bool((got[1] == 0).all())
    positions = torch.tensor([[3, -1, 59, 20, -1]] * 3, device=device)
    check(query, key, row_weights=weights, query_positions=positions)
    negative = torch.tensor([[1.0, -1.0, 2.0, -2.0, 0.0]] * 3, device=device)  # sums to zero without being zero
    check(query, key, row_weights=negative, query_reduction="sum")
    assert bool((ts.attention_scores(query, key, row_weights=negative) == 0).all())


def test_attention_scores_scale(device: str) -> None:
    query, key = queries_and_keys(seeded(16), 1, 2, 2, 2, 30, 16, torch.float32, device)
    for scale in (0.0, 1.0, -0.5, 0.01, 3):
        check(query, key, scale=scale)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_scores_large_logits(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(17), 2, 4, 2, 3, 200, 64, dtype, device)
    for factor in (30.0, 300.0):  # logits up to about +-1e4
        got, lse = check(query * factor, key, scale=1.0)
        assert bool(torch.isfinite(got).all() and torch.isfinite(lse).all())
    far = normal(seeded(18), 2, 1, 1, 200, device=device) * 1e4
    check(query, key, bias=far)
    check(query, key, bias=far - 3e4)
    check(query, key, bias=torch.full((1, 1, 1, 200), torch.finfo(torch.float32).min / 2, device=device).masked_fill(far > 0, 0.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_scores_unaligned_views(dtype: torch.dtype, device: str) -> None:
    wide_query, wide_key = queries_and_keys(seeded(19), 3, 5, 5, 4, 41, 33, dtype, device)
    check(wide_query[..., 1:], wide_key[..., 1:])  # rows of 33 elements, base off by one
    check(wide_query[:, 1:, 1:, :20], wide_key[:, 1:, 2:, 3:23])
    check(wide_query[::2, ::2, ::2], wide_key[::2, ::2, ::3])
    check(wide_query[:1].expand(3, -1, -1, -1), wide_key[:, :1].expand(-1, 5, -1, -1))  # strides 0
    check(wide_query[..., :1], wide_key[..., 32:])


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "L", "N"), [(0, 4, 2, 3, 10), (2, 4, 2, 3, 0), (0, 4, 2, 3, 0), (2, 4, 2, 0, 10)], ids=["B=0", "N=0", "B=N=0", "L=0"]
)
def test_attention_scores_empty(B: int, H: int, Hkv: int, L: int, N: int, device: str) -> None:
    query, key = queries_and_keys(seeded(20), B, H, Hkv, L, N, 16, torch.float32, device)
    for rows in REDUCTIONS:
        check(query, key, query_reduction=rows)
        check(query, key, query_reduction=rows, head_reduction=None, causal=True, key_range=(0, 0))


def test_attention_scores_does_not_write_its_inputs(device: str) -> None:
    query, key = queries_and_keys(seeded(21), 2, 2, 2, 3, 40, 16, torch.float32, device)
    bias = normal(seeded(22), 2, 1, 1, 40, device=device)
    before = query.clone(), key.clone(), bias.clone()
    ts.attention_scores(query, key, bias=bias, causal=True)
    for now, old in zip((query, key, bias), before, strict=True):
        assert_equal(now, old)


def test_attention_scores_is_deterministic(device: str) -> None:
    query, key = queries_and_keys(seeded(23), 2, 8, 4, 5, 700, 64, torch.float32, device)
    first = ts.attention_scores(query, key, causal=True, return_lse=True)
    for i in range(20):
        torch.full((1000 * (i + 1),), torch.nan, device=device)  # dirties the memory that scratch comes from
        again = ts.attention_scores(query, key, causal=True, return_lse=True)
        assert_equal(again[0], first[0])
        assert_equal(again[1], first[1])


def test_attention_scores_thread_count_does_not_matter() -> None:
    query, key = queries_and_keys(seeded(24), 2, 8, 2, 3, 2000, 64, torch.bfloat16)
    on_any_threads(lambda: ts.attention_scores(query, key, return_lse=True))


def test_attention_scores_batch_rows_are_independent(device: str) -> None:
    query, key = queries_and_keys(seeded(25), 4, 4, 2, 2, 300, 32, torch.float32, device)
    whole = ts.attention_scores(query, key)
    one = torch.cat([ts.attention_scores(query[b : b + 1], key[b : b + 1]) for b in range(4)])
    torch.testing.assert_close(one, whole, rtol=1e-6, atol=0)
