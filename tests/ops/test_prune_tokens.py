"""prune_tokens is attention_scores, select_topk and gather_tokens in a row, bit for bit, and its gradient is the gather's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, queries_and_keys, seeded
from reference.ops import prune_tokens as reference
from torch import Tensor


def tensors_of(B: int, N: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [
        normal(seeded(1), B, N, 24, dtype=dtype, device=device),
        torch.arange(N, device=device).expand(B, N),
        normal(seeded(2), B, 3, N, 8, dtype=dtype, device=device).transpose(1, 2),
        torch.rand(B, N, generator=seeded(3)).to(device) > 0.5,
    ]


def check(query: Tensor, key: Tensor, tensors: list[Tensor], k: int, *, keep_outside: bool = True, **options: Any) -> ts.PruneResult:
    """Equal to the three ops, and to the reference's selection from the same scores."""
    N = key.shape[2]
    got = ts.prune_tokens(query, key, tensors, k, keep_outside=keep_outside, **options)
    what = f"{tuple(key.shape)} k={k} keep_outside={keep_outside} {list(options)}"
    assert_equal(got.scores, ts.attention_scores(query, key, **options), f"scores {what}")
    want, index = reference(got.scores, tensors, k, N, options.get("key_range"), keep_outside)
    assert_equal(got.index, index, f"index {what}")
    for i, (g, w, again) in enumerate(zip(got.tensors, want, ts.gather_tokens(tensors, got.index), strict=True)):
        assert_equal(g, w, f"tensor {i} {what}")
        assert_equal(again, w, f"gathered tensor {i} {what}")
    return got


@pytest.mark.parametrize("keep_outside", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_prune_tokens_equals_the_three_ops(dtype: torch.dtype, keep_outside: bool, device: str) -> None:
    for N, key_range in ((1, None), (50, None), (50, (0, 50)), (50, (7, 41)), (50, (49, 50)), (200, (35, 150)), (50, (20, 20))):
        query, key = queries_and_keys(seeded(N), 2, 4, 2, 2, N, 32, dtype, device)
        R = N if key_range is None else key_range[1] - key_range[0]
        for k in sorted({0, R // 2, R}):
            check(query, key, tensors_of(2, N, dtype, device), k, keep_outside=keep_outside, key_range=key_range)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"scale": 0.3, "normalize": "range"},
        {"query_reduction": "max", "head_reduction": "sum"},
        {"query_reduction": "sum", "head_reduction": "max", "causal": True},
        {"bias": "padding"},
        {"bias": "additive"},
        {"row_weights": True},
        {"query_positions": True, "normalize": "range"},
        {"lse": True},
    ],
    ids=lambda o: "-".join(o),
)
def test_prune_tokens_passes_every_option_on(options: dict[str, Any], device: str) -> None:
    query, key = queries_and_keys(seeded(4), 3, 4, 2, 3, 90, 16, torch.float32, device)
    options = dict(options)
    if options.get("bias") == "padding":
        options["bias"] = (torch.arange(90) >= torch.tensor([[0], [40], [90]]))[:, None, None].to(device)
    elif options.get("bias") == "additive":
        options["bias"] = normal(seeded(5), 1, 4, 1, 90, device=device)
    if "row_weights" in options:
        options["row_weights"] = torch.tensor([[1.0, 0.0, 2.0]] * 3, device=device)
    if "query_positions" in options:
        options["query_positions"] = torch.tensor([[80, -1, 89], [-1, -1, -1], [0, 30, 60]], device=device)
    if "lse" in options:
        options["lse"] = normal(seeded(6), 3, 4, 3, device=device)
    check(query, key, tensors_of(3, 90, torch.float32, device), 20, key_range=(10, 80), **options)


def test_prune_tokens_ties_lowest_index_first(device: str) -> None:
    query, key = torch.zeros(1, 1, 1, 8, device=device), torch.ones(1, 1, 6, 8, device=device)
    got = ts.prune_tokens(query, key, [torch.arange(6, device=device)[None]], 2, key_range=(1, 5))
    assert got.index.tolist() == [[0, 1, 2, 5]]
    assert got.tensors[0].tolist() == [[0, 1, 2, 5]]


def test_prune_tokens_a_row_that_sees_nothing_keeps_the_first(device: str) -> None:
    query, key = queries_and_keys(seeded(7), 1, 2, 2, 1, 8, 16, torch.float32, device)
    hidden = torch.zeros(1, 1, 1, 8, dtype=torch.bool, device=device)
    assert check(query, key, tensors_of(1, 8, torch.float32, device), 3, bias=hidden).index.tolist() == [[0, 1, 2]]


def test_prune_tokens_more_than_eight_tensors(device: str) -> None:
    query, key = queries_and_keys(seeded(8), 2, 2, 2, 1, 40, 16, torch.float32, device)
    check(query, key, [normal(seeded(i), 2, 40, 1 + i, device=device) for i in range(19)], 10, key_range=(3, 33))


@pytest.mark.parametrize(("B", "N", "k"), [(0, 6, 2), (2, 0, 0), (2, 6, 0), (1, 1, 1)])
def test_prune_tokens_empty(B: int, N: int, k: int, device: str) -> None:
    query, key = queries_and_keys(seeded(9), B, 2, 2, 1, N, 8, torch.float32, device)
    got = ts.prune_tokens(query, key, [torch.ones(B, N, 3, device=device)], k)
    assert got.tensors[0].shape == (B, k, 3)
    assert got.index.shape == (B, k)
    assert got.scores.shape == (B, N)


@pytest.mark.parametrize("keep_outside", [True, False])
def test_prune_tokens_gradient_is_that_of_the_gather(keep_outside: bool, device: str) -> None:
    query, key = queries_and_keys(seeded(10), 2, 2, 2, 1, 40, 16, torch.float32, device)
    query.requires_grad_()
    hidden = normal(seeded(11), 2, 40, 6, device=device)
    ids = torch.arange(40, device=device).expand(2, 40)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = ts.prune_tokens(query, key, [mine, ids], 9, key_range=(5, 30), keep_outside=keep_outside)
    assert not got.index.requires_grad
    assert not got.scores.requires_grad
    assert not got.tensors[1].requires_grad
    weight = normal(seeded(12), *got.tensors[0].shape, device=device)
    (got.tensors[0] * weight).sum().backward()
    (reference(got.scores, [theirs], 9, 40, (5, 30), keep_outside)[0][0] * weight).sum().backward()
    assert_equal(mine.grad, theirs.grad)
    assert query.grad is None


def test_prune_tokens_is_deterministic(device: str) -> None:
    query, key = queries_and_keys(seeded(13), 2, 8, 2, 1, 640, 64, torch.float16, device)
    tensors = tensors_of(2, 640, torch.float16, device)
    first = ts.prune_tokens(query, key, tensors, 144, key_range=(35, 611))
    for _ in range(20):
        again = ts.prune_tokens(query, key, tensors, 144, key_range=(35, 611))
        assert_equal(again.index, first.index)
        assert_equal(again.scores, first.scores)
        for a, b in zip(again.tensors, first.tensors, strict=True):
            assert_equal(a, b)


def test_calls_from_several_python_threads_agree() -> None:
    query, key, hidden = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 300, 64)
    want = ts.prune_tokens(query, key, [hidden], 40)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: ts.prune_tokens(query, key, [hidden], 40), range(64)):
            assert torch.equal(got.index, want.index)
            assert torch.equal(got.scores, want.scores)
            assert torch.equal(got.tensors[0], want.tensors[0])
