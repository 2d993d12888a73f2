"""attention_scores of many query rows (all tokens): the one-pass kernel against the float64 map."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tokensieve as ts
import torch
from ops.test_attention_scores import check
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, queries_and_keys, seeded
from same_bits import on_any_threads

ROWS = ("mean", "sum", "max", "visible_mean", None)
HEADS = ("mean", "sum", "max", None)


@pytest.mark.parametrize("activation", ["softmax", "logit", "sigmoid"])
@pytest.mark.parametrize("L", [50, 91])
def test_all_rows_reductions(L: int, activation: str, device: str) -> None:
    query, key = queries_and_keys(seeded(L), 2, 4, 2, L, 83, 16, torch.float32, device)
    for rows, heads in itertools.product(ROWS, HEADS):
        check(query, key, activation=activation, query_reduction=rows, head_reduction=heads)
        check(query, key, activation=activation, query_reduction=rows, head_reduction=heads, causal=True, key_range=(37, 80))


@pytest.mark.parametrize(
    ("B", "H", "Hkv", "N", "D", "causal"),
    [
        (1, 4, 4, 577, 64, False),  # CLIP-L, a quarter of the heads
        (1, 2, 2, 729, 72, False),  # SigLIP
        (1, 2, 2, 640, 128, True),  # LLaVA-1.5
        (1, 7, 1, 300, 128, True),  # Qwen2.5-VL, seven query heads a key head
        (3, 1, 1, 200, 40, False),
        (1, 1, 1, 300, 1024, False),  # one wide head, DAMRO
        (2, 1, 1, 97, 1500, True),
        (1, 2, 2, 400, 257, False),
        (9, 16, 16, 60, 16, True),  # more key heads than a wave packs
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rows_shapes(B: int, H: int, Hkv: int, N: int, D: int, causal: bool, dtype: torch.dtype, device: str) -> None:
    if D > 256 and device == "cuda":
        pytest.skip("D must be at most 256 on CUDA")
    query, key = queries_and_keys(seeded(N), B, H, Hkv, N, N, D, dtype, device)
    check(query, key, causal=causal)
    check(query, key, causal=causal, head_reduction=None, query_reduction="visible_mean")
    check(query, key, causal=causal, head_reduction="max", query_reduction="max")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_rows_head_dims_and_layouts(dtype: torch.dtype, device: str) -> None:
    for D in (1, 8, 15, 16, 17, 33, 80, 96, 250, 256):
        for tokens_first in (False, True):
            query, key = queries_and_keys(seeded(D), 1, 4, 2, 70, 70, D, dtype, device, tokens_first)
            check(query, key, causal=tokens_first)


def test_all_rows_sizes_around_the_blocks(device: str) -> None:
    for L, N in itertools.product((48, 49, 71, 72, 73), (1, 15, 16, 17, 31, 32, 33, 64, 65)):
        query, key = queries_and_keys(seeded(L), 1, 2, 2, L, N, 16, torch.float32, device)
        check(query, key)
    for N in (100, 127, 128, 129, 160, 250):  # rows are the last L of N tokens, and more rows than keys
        for L in (60, N, 270):
            query, key = queries_and_keys(seeded(N), 1, 2, 2, L, N, 16, torch.float32, device)
            check(query, key, causal=True, query_reduction="sum", head_reduction=None)


@pytest.mark.parametrize("normalize", ["row", "range"])
@pytest.mark.parametrize("key_range", [(0, 131), (0, 1), (130, 131), (35, 99), (40, 40), (0, 0), (131, 131), (3, 128)])
def test_all_rows_key_range(key_range: tuple[int, int], normalize: str, device: str) -> None:
    query, key = queries_and_keys(seeded(1), 2, 4, 2, 90, 131, 32, torch.float32, device)
    bias = normal(seeded(2), 2, 1, 90, 131, device=device)
    for rows in ROWS:
        check(query, key, key_range=key_range, normalize=normalize, causal=True, query_reduction=rows, head_reduction=None)
        check(query, key, key_range=key_range, normalize=normalize, query_reduction=rows, bias=bias)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 100, 140), (1, 1, 1, 140), (2, 1, 100, 140), (1, 4, 1, 1), (2, 1, 1, 140)], ids=str)
def test_all_rows_bias(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(5), 2, 4, 2, 100, 140, 32, torch.float32, device)
    bias = normal(seeded(6), *shape, device=device)
    bias = bias > -0.7 if dtype == torch.bool else bias.masked_fill(bias > 1, -torch.inf).to(dtype)
    for rows in ROWS:
        check(query, key, bias=bias, causal=rows != "mean", query_reduction=rows)
    check(query, key, bias=bias, key_range=(11, 60), normalize="range", query_reduction="sum", activation="logit")


def test_all_rows_positions_and_weights(device: str) -> None:
    query, key = queries_and_keys(seeded(3), 3, 4, 2, 80, 90, 32, torch.float32, device)
    positions = torch.randint(-1, 90, (3, 80), generator=seeded(4)).to(device)
    positions[1, ::2] = -1
    positions[2] = -1
    weights = torch.rand(3, 80, generator=seeded(5)).to(device)
    weights[0, 10:60] = 0
    for rows in ROWS:
        got, lse = check(query, key, query_positions=positions, query_reduction=rows)
        assert bool((got[2] == 0).all())
        assert bool(torch.isneginf(lse[2]).all())
        check(query, key, query_positions=positions, query_reduction=rows, key_range=(20, 60), normalize="range", activation="logit")
        if rows in ("mean", "sum", "visible_mean"):
            check(query, key, row_weights=weights, query_reduction=rows, causal=True)
            check(query, key, row_weights=weights, query_reduction=rows, query_positions=positions, head_reduction=None)
    weights.zero_()
    assert bool((ts.attention_scores(query, key, row_weights=weights) == 0).all())


def test_all_rows_lse_in_and_out(device: str) -> None:
    query, key = queries_and_keys(seeded(12), 2, 4, 2, 100, 100, 64, torch.float32, device)
    for rows, causal in itertools.product(ROWS, (False, True)):
        options: dict[str, Any] = {"causal": causal, "key_range": (10, 97), "query_reduction": rows, "head_reduction": None}
        got, lse = check(query, key, **options)
        again, same = check(query, key, **options, lse=lse)
        assert_equal(same, lse)
        torch.testing.assert_close(again, got, rtol=4e-6, atol=1e-9)
    lse[:, 1, ::3] = -torch.inf
    got = ts.attention_scores(query, key, lse=lse, query_reduction=None, head_reduction=None)
    assert bool((got[:, 1, ::3] == 0).all())


def test_all_rows_head_weights_and_accumulate(device: str) -> None:
    query, key = queries_and_keys(seeded(13), 2, 4, 2, 70, 90, 32, torch.float32, device)
    heads = torch.rand(2, 4, generator=seeded(14)).to(device)
    heads[0, 1] = 0
    for rows, how in itertools.product(ROWS, HEADS):
        plain = ts.attention_scores(query, key, query_reduction=rows, head_reduction=how)
        before = torch.rand(plain.shape, generator=seeded(9)).to(device)
        got, _ = check(query, key, accumulate=before, query_reduction=rows, head_reduction=how)
        assert_equal(got, before + plain)
        if how in ("mean", "sum"):
            check(query, key, head_weights=heads, query_reduction=rows, head_reduction=how)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_rows_that_see_nothing(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(9), 1, 2, 2, 80, 50, 16, dtype, device)
    for rows, heads in itertools.product(ROWS, HEADS):
        got, lse = check(query, key, causal=True, query_reduction=rows, head_reduction=heads)  # rows 0..29 come before every key
        assert bool(torch.isneginf(lse[:, :, :30]).all())
        assert not bool(torch.isnan(got).any())
    for hidden in (torch.zeros(1, 1, 1, 50, dtype=torch.bool), torch.full((1, 1, 1, 50), -torch.inf)):
        got, lse = check(query, key, bias=hidden.to(device))
        assert bool((got == 0).all())
        assert bool(torch.isneginf(lse).all())


def test_all_rows_nan_stays_in_its_row_and_head(device: str) -> None:
    query, key = queries_and_keys(seeded(11), 1, 2, 2, 70, 70, 16, torch.float32, device)
    query[:, 0, 33] = torch.nan
    options = {"query_reduction": None, "head_reduction": None, "causal": True}
    got, lse = check(query, key, **options)
    assert int(torch.isnan(got).sum()) == 34, "the keys that row 33 sees"
    assert int(torch.isnan(lse).sum()) == 1
    got, _ = check(query, key, head_reduction=None, causal=True)
    assert bool(torch.isnan(got[0, 0, :34]).all())
    assert not bool(torch.isnan(got[0, 0, 34:]).any() or torch.isnan(got[0, 1]).any())


def test_all_rows_hidden_nan_key_changes_nothing(device: str) -> None:
    query, key = queries_and_keys(seeded(10), 1, 2, 2, 60, 80, 16, torch.float32, device)
    visible = torch.ones(1, 1, 1, 80, dtype=torch.bool, device=device)
    visible[..., 7] = visible[..., 79] = False
    want = ts.attention_scores(query, key, bias=visible)
    key[:, :, 7] = torch.nan
    key[:, :, 79] = torch.inf
    assert_equal(ts.attention_scores(query, key, bias=visible), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_rows_large_logits(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(17), 1, 2, 2, 100, 100, 64, dtype, device)
    for factor in (30.0, 300.0):
        got, lse = check(query * factor, key, scale=1.0)
        assert bool(torch.isfinite(got).all() and torch.isfinite(lse).all())
    check(query, key, scale=-0.5, causal=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_rows_unaligned_views(dtype: torch.dtype, device: str) -> None:
    wide_query, wide_key = queries_and_keys(seeded(19), 3, 5, 5, 75, 81, 33, dtype, device)
    check(wide_query[..., 1:], wide_key[..., 1:])
    check(wide_query[:, 1:, 1:, :20], wide_key[:, 1:, 2:, 3:23])
    check(wide_query[::2, ::2], wide_key[::2, ::2, ::3])
    check(wide_query[:1].expand(3, -1, -1, -1), wide_key[:, :1].expand(-1, 5, -1, -1))  # strides 0


@pytest.mark.parametrize(("B", "H", "Hkv", "L", "N"), [(0, 4, 2, 60, 10), (2, 4, 2, 60, 0), (2, 0, 2, 60, 10)], ids=["B=0", "N=0", "H=0"])
def test_all_rows_empty(B: int, H: int, Hkv: int, L: int, N: int, device: str) -> None:
    query, key = queries_and_keys(seeded(20), B, H, Hkv, L, N, 16, torch.float32, device)
    for rows in ("mean", "sum", "max", "visible_mean"):
        got = ts.attention_scores(query, key, query_reduction=rows, head_reduction="sum")
        assert got.shape == (B, N)
        assert bool((got == 0).all())


@pytest.mark.parametrize(("H", "L"), [(1, 700), (8, 300)])
def test_all_rows_threads_and_repetition_do_not_matter(H: int, L: int) -> None:
    query, key = queries_and_keys(seeded(24), 2, H, H, L, L, 64, torch.bfloat16)
    on_any_threads(lambda: ts.attention_scores(query, key, causal=True, return_lse=True))


def test_all_rows_agree_with_slices_of_rows(device: str) -> None:
    query, key = queries_and_keys(seeded(25), 1, 4, 4, 200, 200, 32, torch.float32, device)
    whole = ts.attention_scores(query, key, causal=True, query_reduction="sum")
    positions = torch.arange(200, device=device)[None]
    parts = [
        ts.attention_scores(query[:, :, i : i + 10], key, query_positions=positions[:, i : i + 10], query_reduction="sum")
        for i in range(0, 200, 10)
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0), rtol=2e-6, atol=1e-7)
