"""pool_scores against a loop over the neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.inputs import FLOATS, normal, seeded


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize("width", [1, 3, 5, 7, 41])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pool_scores_neighbours(dtype: torch.dtype, width: int, kind: Any, device: str) -> None:
    scores = normal(seeded(1), 2, 3, 20, dtype=dtype, device=device)
    got = ts.pool_scores(scores, width, kind)
    assert got.dtype == dtype
    rows = scores.double().cpu()
    for n in range(20):
        near = rows[..., max(0, n - width // 2) : n + width // 2 + 1]
        want = near.sum(-1) / width if kind == "avg" else near.amax(-1)
        torch.testing.assert_close(got[..., n].double().cpu(), want, rtol=3 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_pool_scores_edges(device: str) -> None:
    assert ts.pool_scores(torch.zeros(2, 0, device=device), 3).shape == (2, 0)
    assert ts.pool_scores(torch.zeros(0, 5, device=device), 1).shape == (0, 5)
    scores = torch.rand(4, device=device)
    assert ts.pool_scores(scores, 1) is not scores
    given = torch.rand(3, 8, device=device).t().requires_grad_()  # strided, and with a gradient
    ts.pool_scores(given, 3).sum().backward()
    assert given.grad is not None
    assert given.grad.shape == given.shape
    assert bool(torch.isnan(ts.pool_scores(torch.tensor([0.0, torch.nan, 0.0, 0.0], device=device), 3, "max"))[:3].all())


def test_pool_scores_refuses() -> None:
    for arguments, error, message in (
        (([1.0], 3), TypeError, "scores must be a torch.Tensor, got list"),
        ((torch.zeros(4).long(), 3), TypeError, "scores must be floating point, got int64"),
        ((torch.zeros(()), 3), ValueError, r"scores must be \(..., N\), got shape \(\)"),
        ((torch.zeros(4), 2), ValueError, "width must be odd and at least 1, got 2"),
        ((torch.zeros(4), -1), ValueError, "width must be odd and at least 1, got -1"),
        ((torch.zeros(4), 3.0), TypeError, "width must be an int, got float"),
        ((torch.zeros(4), 3, "median"), ValueError, "kind must be one of 'avg', 'max', got 'median'"),
    ):
        with pytest.raises(error, match=rf"tokensieve.pool_scores: {message}"):
            ts.pool_scores(*arguments)
