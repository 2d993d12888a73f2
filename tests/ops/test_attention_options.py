"""attention_scores: activation, head weights, accumulate and the mean over the rows that see a key, against the float64 map."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tokensieve as ts
import torch
from ops.test_attention_scores import check
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, queries_and_keys, seeded

ROWS = ("mean", "sum", "max", "visible_mean", None)
HEADS = ("mean", "sum", "max", None)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["logit", "sigmoid"])
@pytest.mark.parametrize("L", [1, 3, 19])
def test_attention_scores_activation(L: int, activation: str, dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(L), 2, 6, 3, L, 131, 32, dtype, device)
    for rows, heads, causal in itertools.product(ROWS, HEADS, (False, True)):
        check(query, key, activation=activation, query_reduction=rows, head_reduction=heads, causal=causal)
        check(query, key, activation=activation, query_reduction=rows, head_reduction=heads, causal=causal, key_range=(5, 90))


@pytest.mark.parametrize("activation", ["logit", "sigmoid"])
def test_attention_scores_activation_max_passes_hidden_keys_by(activation: str, device: str) -> None:
    query, key = torch.ones(1, 1, 8, 4, device=device), -torch.ones(1, 1, 8, 4, device=device)  # every logit is -2
    value = -2.0 if activation == "logit" else float(torch.tensor(-2.0).sigmoid())
    got, _ = check(query, key, activation=activation, query_reduction="max", causal=True)
    torch.testing.assert_close(got, torch.full((1, 8), value, device=device))
    positions = torch.tensor([[5, -1, 3, -1, -1, 0, -1, -1]], device=device)
    got, _ = check(query, key, activation=activation, query_reduction="max", query_positions=positions)
    torch.testing.assert_close(got[0, :6], torch.full((6,), value, device=device))
    assert bool((got[0, 6:] == 0).all())
    hidden = torch.zeros(1, 1, 1, 8, device=device).masked_fill(torch.arange(8, device=device) % 3 == 0, -torch.inf)
    for bias in (hidden, hidden == 0):  # an additive mask and a bool one say the same
        got, _ = check(query, key, activation=activation, query_reduction="max", bias=bias)
        assert bool((got[0, ::3] == 0).all())
        got, _ = check(query, key, activation=activation, bias=bias, head_reduction=None)
        assert bool((got[0, 0, ::3] == 0).all())


def test_attention_scores_nan_logit_stays_with_its_key(device: str) -> None:
    query, key = queries_and_keys(seeded(1), 1, 2, 2, 3, 40, 16, torch.float32, device)
    key[0, 0, 7] = torch.nan
    for activation, rows in itertools.product(("logit", "sigmoid"), ROWS):
        got, _ = ts.attention_scores(query, key, activation=activation, query_reduction=rows, head_reduction=None, return_lse=True)
        nan = torch.isnan(got)
        assert bool(nan[0, 0, ..., 7].all())
        assert int(nan.sum()) == (3 if rows is None else 1)


def test_attention_scores_activation_lse_covers_what_normalize_says(device: str) -> None:
    query, key = queries_and_keys(seeded(2), 1, 2, 2, 3, 60, 16, torch.float32, device)
    options: dict[str, Any] = {"key_range": (10, 30), "causal": True}
    for normalize in ("row", "range"):
        _, want = ts.attention_scores(query, key, normalize=normalize, return_lse=True, **options)
        got, lse = check(query, key, activation="logit", normalize=normalize, **options)
        torch.testing.assert_close(lse, want)
        assert_equal(got, ts.attention_scores(query, key, activation="logit", **options))


@pytest.mark.parametrize("bias_dtype", [None, torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("L", [1, 4, 21])
def test_attention_scores_visible_mean(L: int, bias_dtype: torch.dtype | None, device: str) -> None:
    query, key = queries_and_keys(seeded(L), 2, 4, 2, L, 150, 32, torch.float32, device)
    weights = torch.rand(2, L, generator=seeded(3)).to(device)
    weights[1, 0] = 0
    positions = torch.randint(-1, 150, (2, L), generator=seeded(4)).to(device)
    for heads in (1, 4):
        bias = None
        if bias_dtype is not None:
            drawn = normal(seeded(5), 2, heads, L, 150, device=device)
            bias = drawn > 0 if bias_dtype == torch.bool else drawn.masked_fill(drawn > 0, -torch.inf).to(bias_dtype)
        for options in ({}, {"causal": True}, {"query_positions": positions}, {"key_range": (3, 77), "causal": True, "normalize": "range"}):
            for how in HEADS:
                check(query, key, bias=bias, query_reduction="visible_mean", head_reduction=how, **options)
            check(query, key, bias=bias, query_reduction="visible_mean", row_weights=weights, **options)
            check(query, key, bias=bias, query_reduction="visible_mean", activation="logit", **options)


def test_attention_scores_visible_mean_divides_by_who_sees(device: str) -> None:
    query, key = torch.zeros(1, 1, 4, 2, device=device), torch.zeros(1, 1, 4, 2, device=device)
    got, _ = check(query, key, causal=True, query_reduction="visible_mean")  # rows give 1, 1/2, 1/3, 1/4
    torch.testing.assert_close(got[0], torch.tensor([25 / 48, 13 / 36, 7 / 24, 1 / 4], device=device))
    positions = torch.tensor([[1, -1, 1, -1]], device=device)
    got, _ = check(query, key, query_positions=positions, query_reduction="visible_mean")
    torch.testing.assert_close(got[0], torch.tensor([0.5, 0.5, 0.0, 0.0], device=device))  # a key that nobody sees is 0


def test_attention_scores_head_weights(device: str) -> None:
    query, key = queries_and_keys(seeded(6), 3, 6, 2, 4, 70, 32, torch.float32, device)
    weights = torch.rand(3, 6, generator=seeded(7)).to(device)
    weights[0, 2] = weights[1] = 0
    weights[2, :2] = torch.tensor([-0.5, 0.5], device=device)
    for rows, heads in itertools.product(ROWS, ("mean", "sum")):
        got, _ = check(query, key, head_weights=weights, query_reduction=rows, head_reduction=heads)
        assert bool((got[1] == 0).all())
    check(query, key, head_weights=weights.t().contiguous().t(), causal=True, row_weights=torch.ones(3, 4, device=device))
    query[0, 2] = torch.nan
    got = ts.attention_scores(query, key, head_weights=weights)
    assert not bool(torch.isnan(got).any()), "a head of weight 0 counts for nothing, even NaN"
    weights[0, 2] = 1e-30
    assert bool(torch.isnan(ts.attention_scores(query, key, head_weights=weights)[0]).all())


@pytest.mark.parametrize("L", [1, 30])
def test_attention_scores_accumulate(L: int, device: str) -> None:
    query, key = queries_and_keys(seeded(8), 2, 8, 8, L, 70, 16, torch.float32, device)
    for rows, heads in itertools.product(ROWS, HEADS):
        plain = ts.attention_scores(query, key, query_reduction=rows, head_reduction=heads)
        before = torch.rand(plain.shape, generator=seeded(9)).to(device)
        kept = before.clone()
        got, _ = check(query, key, accumulate=before, query_reduction=rows, head_reduction=heads)
        assert_equal(got, before + plain)
        assert_equal(before, kept)
        assert_equal(
            ts.attention_scores(query, key, accumulate=before.flip(-1), query_reduction=rows, head_reduction=heads), before.flip(-1) + plain
        )


def test_attention_scores_accumulate_without_rows(device: str) -> None:
    query, key = queries_and_keys(seeded(10), 2, 4, 2, 0, 20, 16, torch.float32, device)
    before = torch.rand(2, 20, generator=seeded(11)).to(device)
    assert_equal(ts.attention_scores(query, key, accumulate=before), before)


def test_attention_scores_accumulates_layers_to_their_sum(device: str) -> None:
    total, layers = torch.zeros(1, 50, device=device), []
    for layer in range(3):
        query, key = queries_and_keys(seeded(layer), 1, 4, 4, 5, 50, 16, torch.float32, device)
        layers.append(ts.attention_scores(query, key))
        total = ts.attention_scores(query, key, accumulate=total)
    assert_equal(total, layers[0] + layers[1] + layers[2])
