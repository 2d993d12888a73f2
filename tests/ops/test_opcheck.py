"""torch.library.opcheck on every op: schema, autograd registration, fake against real, AOT dispatch with dynamic shapes."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve  # noqa: F401  (registers the ops)
import torch
from reference.inputs import FLOATS, normal, queries_and_keys, seeded

ops = torch.ops.tokensieve


def check(op: Any, *arguments: Any) -> None:
    results = torch.library.opcheck(op.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_attention_scores(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(1), 2, 4, 2, 3, 20, 16, dtype, device)
    check(ops.attention_scores, query, key, None, False, None, None, None, None, 0, 20, 0, 1, 1, 0, None, None)
    bias, positions = normal(seeded(2), 2, 1, 1, 20, device=device), torch.tensor([[3, -1, 19]] * 2, device=device)
    weights, lse = torch.rand(2, 3).to(device), torch.zeros(2, 4, 3, device=device)
    check(ops.attention_scores, query.requires_grad_(), key, 0.25, True, bias, lse, weights, positions, 3, 17, 1, 2, 0, 0, None, None)
    heads, before = torch.rand(2, 4).to(device), torch.rand(2, 14).to(device)
    check(ops.attention_scores, query, key, None, True, bias, None, weights, positions, 3, 17, 0, 4, 2, 2, heads, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_select_topk(dtype: torch.dtype, device: str) -> None:
    scores = normal(seeded(3), 3, 20, dtype=dtype, device=device)
    mask = scores > 0
    check(ops.select_topk, scores, 5, None, None, None, 0)
    check(ops.select_topk, scores.clone().requires_grad_(), 7, torch.tensor([1, 7, 3], device=device), mask, ~mask, 1)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64, torch.int64], ids=str)
def test_opcheck_gather_tokens(dtype: torch.dtype, device: str) -> None:
    x = normal(seeded(4), 2, 10, 6, device=device).mul(10).to(dtype)
    heads = normal(seeded(5), 2, 3, 10, 4, device=device).mul(10).to(dtype).transpose(1, 2)
    ids, index = torch.arange(20, device=device).view(2, 10), torch.tensor([[9, 0, -1], [4, 5, 6]], device=device)
    check(ops.gather_tokens, [x, ids, heads], index)
    if dtype.is_floating_point:
        check(ops.gather_tokens, [x.requires_grad_(), ids, heads.detach().requires_grad_()], index)
    check(ops.gather_tokens_backward, [torch.ones(2, 3, 6, device=device).to(dtype), torch.ones(2, 3, device=device).to(dtype)], index, 10)
    out = [torch.empty(2, 3, 6, dtype=dtype, device=device), torch.empty(2, 3, dtype=torch.int64, device=device)]
    check(ops.gather_tokens_out, [x.detach(), ids], index, out)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_prune_tokens(dtype: torch.dtype, device: str) -> None:
    query, key = queries_and_keys(seeded(6), 2, 4, 2, 1, 20, 16, dtype, device)
    x, ids = normal(seeded(7), 2, 20, 6, dtype=dtype, device=device), torch.arange(40, device=device).view(2, 20)
    options = (0.25, False, None, None, None, None, 3, 17, 0, 1, 1)
    check(ops.prune_tokens, query, key, [x, ids], 5, *options, True)
    check(ops.prune_tokens, query, key, [x.requires_grad_(), ids], 5, *options, False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_similarity(dtype: torch.dtype, device: str) -> None:
    a, b = normal(seeded(8), 2, 9, 6, dtype=dtype, device=device), normal(seeded(9), 2, 20, 6, dtype=dtype, device=device)
    mask, first = normal(seeded(10), 2, 20, device=device) > 0, torch.tensor([3, -1], device=device)
    check(ops.cosine_match, a, b, 1, True, None, False)
    check(ops.cosine_match, b.clone().requires_grad_(), b, 5, False, mask, True)
    for reduction in (1, 2, 3, 4):
        check(ops.cosine_scores, a.clone().requires_grad_(), b, reduction, mask, False)
    check(ops.knn_density, b, 3, None, None)
    check(ops.knn_density, b.clone().requires_grad_(), 20, torch.rand(2, 20, device=device), mask)
    check(ops.nearest_center, b, torch.tensor([[3, 1], [-1, 0]], device=device))
    check(ops.select_diverse, b, 7, None, None, 0, 0)
    check(ops.select_diverse, b.clone().requires_grad_(), 12, mask, first, 1, 1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_pooling(dtype: torch.dtype, device: str) -> None:
    x, scores = normal(seeded(1), 2, 24, 6, dtype=dtype, device=device).requires_grad_(), torch.rand(2, 24, device=device)
    windows = (1, 4, 6, 1, 2, 3, 1, 2, 2, 1, 2, 2)
    check(ops.pool_grid, x, *windows, None, 1.0, False, 0)
    check(ops.pool_grid, x, 1, 4, 6, 1, 3, 4, 1, 4, 3, 1, 3, 2, None, 1.0, True, 1)
    check(ops.pool_grid, x, 1, 4, 6, 1, 3, 9, 1, 4, 6, 1, 3, 9, None, 1.0, True, 2)
    check(ops.pool_grid, x, *windows, scores.requires_grad_(), 0.5, False, 3)
    check(ops.pool_grid, x, *windows, None, 1.0, False, 4)
    grad, out = normal(seeded(2), 2, 6, 6, dtype=dtype, device=device), ops.pool_grid(x.detach(), *windows, None, 1.0, False, 1)
    check(ops.pool_grid_backward, grad, x.detach(), out, *windows, None, 1.0, False, 1, True, False)
    check(ops.pool_grid_backward, grad, None, None, *windows, None, 1.0, False, 0, True, False)
    starts = torch.tensor([[2], [5]], device=device)
    check(ops.pool_runs, x, starts, 9, 4)
    check(ops.pool_runs_backward, normal(seeded(3), 2, 17, 6, dtype=dtype, device=device), starts, 24, 9, 4)
    check(ops.row_column_means, normal(seeded(4), 2, 3, 4, 5, dtype=dtype, device=device).requires_grad_())
    check(ops.row_column_means_backward, grad, grad[:, :2].contiguous())
