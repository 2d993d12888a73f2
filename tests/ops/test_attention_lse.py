"""attention_lse: the row normalisers, few rows and many, against float64 and against attention_scores."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import EPS, assert_equal, logit_magnitude
from reference.inputs import FLOATS, normal, queries_and_keys, seeded
from reference.ops import attention_scores
from torch import Tensor


def check(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    got = ts.attention_lse(query, key, **options)
    assert_equal(got, ts.attention_scores(query, key, **options, return_lse=True)[1])
    want = attention_scores(query, key, **options)[1]
    limit = EPS * (16 + 4 * logit_magnitude(query, key, options.get("scale"), options.get("bias")))
    assert got.dtype == torch.float32
    assert bool(((got.double() - want).abs().nan_to_num(0) <= limit).all())
    assert_equal(torch.isneginf(got), torch.isneginf(want))
    return got


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("L", [1, 5, 47, 48, 130])
def test_attention_lse_rows(L: int, dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(L), 2, 4, 2, L, 130, 32, dtype, device)
    check(query, key)
    check(query, key, causal=True, scale=0.3)
    positions = torch.randint(-1, 130, (2, L), generator=seeded(1)).to(device)
    check(query, key, query_positions=positions)
    bias = normal(seeded(2), 2, 1, 1, 130, device=device)
    check(query, key, bias=bias, causal=True)
    check(query, key, bias=bias > 0)


@pytest.mark.parametrize("L", [3, 60])
def test_attention_lse_of_rows_that_see_nothing(L: int, device: str) -> None:
    query, key = queries_and_keys(seeded(L), 1, 2, 2, L, 2, 16, torch.float32, device)
    lse = check(query, key, causal=True)
    assert bool(torch.isneginf(lse[:, :, : L - 2]).all())
    assert bool(torch.isfinite(lse[:, :, L - 2 :]).all())
    assert bool(torch.isneginf(ts.attention_lse(query, key[:, :, :0])).all())
    query[:, 1, L - 1] = torch.nan
    assert int(torch.isnan(ts.attention_lse(query, key)).sum()) == 1


def test_attention_lse_of_nothing(device: str) -> None:
    for shape in ((0, 2, 2, 3, 4, 8), (1, 2, 2, 0, 4, 8), (0, 2, 2, 60, 4, 8)):
        query, key = queries_and_keys(seeded(1), *shape, torch.float32, device)
        assert ts.attention_lse(query, key).shape == (shape[0], shape[1], shape[3])


def test_attention_lse_is_what_attention_scores_takes(device: str) -> None:
    query, key = queries_and_keys(seeded(3), 1, 4, 2, 70, 70, 32, torch.float32, device)
    lse = ts.attention_lse(query, key, causal=True)
    whole = ts.attention_scores(query, key, causal=True, query_reduction="sum")
    given = ts.attention_scores(query, key, causal=True, query_reduction="sum", lse=lse)
    torch.testing.assert_close(given, whole, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": torch.zeros(2, 3, 8)}, ValueError, "attention_lse: query must be (B, H, L, D), got shape (2, 3, 8)"),
        ({"key": torch.zeros(2, 3, 5, 8)}, ValueError, "attention_lse: query heads must be a multiple of key heads, got H=4, Hkv=3"),
        (
            {"query": torch.zeros(2, 4, 3, 8).double()},
            TypeError,
            "attention_lse: query must be float32 or float16 or bfloat16, got float64",
        ),
        ({"scale": "x"}, TypeError, "attention_lse: scale must be a float or None, got str"),
        ({"causal": "yes"}, TypeError, "attention_lse: causal must be a bool, got str"),
        ({"bias": torch.zeros(1, 1, 1, 4)}, ValueError, "attention_lse: bias must be broadcastable to (B, H, L, N) = (2, 4, 3, 5)"),
        ({"query_positions": torch.zeros(2, 4).long()}, ValueError, "attention_lse: query_positions must be (B, L) = (2, 3)"),
    ],
    ids=str,
)
def test_attention_lse_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"query": torch.zeros(2, 4, 3, 8), "key": torch.zeros(2, 2, 5, 8), **options}
    with pytest.raises(error, match="tokensieve." + re.escape(message)):
        ts.attention_lse(given.pop("query"), given.pop("key"), **given)


def test_attention_lse_opcheck_and_compile(device: str) -> None:
    query, key = queries_and_keys(seeded(4), 2, 4, 2, 3, 20, 16, torch.float32, device)
    bias, positions = normal(seeded(2), 2, 1, 1, 20, device=device), torch.tensor([[3, -1, 19]] * 2, device=device)
    for given in ((query, key, None, False, None, None), (query.clone().requires_grad_(), key, 0.5, True, bias, positions)):
        results = torch.library.opcheck(torch.ops.tokensieve.attention_lse.default, given)
        assert set(results.values()) == {"SUCCESS"}, results

    torch._dynamo.reset()
    function = torch.compile(lambda q, k: ts.attention_lse(q * 2, k, causal=True) + 1, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, H, L, N, D in ((2, 6, 5, 40, 16), (3, 8, 70, 77, 32)):
            query, key = queries_and_keys(seeded(N), B, H, H // 2, L, N, D, torch.float32, device)
            assert_equal(function(query, key), ts.attention_lse(query * 2, key, causal=True) + 1)
    torch._dynamo.reset()
