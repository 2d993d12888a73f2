"""unmerge_tokens copies rows back, and source maps say what ToMe's source matrix says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, seeded
from reference.merge import Plan, random_plan

X = torch.zeros(2, 6, 4)
PLAN = Plan(torch.tensor([[1, 3, 5]] * 2), torch.tensor([[0, 0, 1, 1, -1, 2]] * 2))


def test_unmerge_tokens_copies_rows_back(device: str) -> None:
    plan = random_plan(seeded(1), 3, 40, 15, 0.2, device)
    heads = normal(seeded(2), 3, 4, 15, 8, device=device).transpose(1, 2)
    ids = torch.randint(0, 99, (3, 15), device=device)
    got = ts.unmerge_tokens([heads, ids, ids > 5], plan)
    for g, t in zip(got, (heads, ids, ids > 5), strict=True):
        rows = torch.stack([t[b][plan.inverse[b].clamp(min=0)] for b in range(3)])
        keep = (plan.inverse >= 0).view(3, 40, *[1] * (t.dim() - 2))
        assert_equal(g, torch.where(keep, rows, torch.zeros_like(rows)))
    x = normal(seeded(3), 3, 40, 9, device=device)
    back = ts.unmerge_tokens(ts.merge_tokens(x, plan, mode="sum").tensors, plan)
    again = ts.merge_tokens(back, plan).tensors
    torch.testing.assert_close(again, ts.merge_tokens(x, plan, mode="sum").tensors)


def test_unmerge_tokens_gradient_is_the_sum_of_a_row(device: str) -> None:
    plan = random_plan(seeded(1), 2, 40, 15, 0.2, device)
    for dtype in FLOATS:
        y = normal(seeded(2), 2, 15, 9, dtype=dtype, device=device).requires_grad_()
        g = normal(seeded(3), 2, 40, 9, dtype=dtype, device=device)
        ts.unmerge_tokens(y, plan).backward(g)
        want, _ = ts.merge_by_label(g, plan.inverse, 15, mode="sum")
        assert_equal(y.grad, want)


def test_trace_tokens_and_assignment_matrix_are_tomes_source_matrix(device: str) -> None:
    """E' = merge(E, amax) from the identity on, through three plans, against the map."""
    B, N = 2, 30
    matrix = torch.eye(N, device=device).expand(B, N, N)
    trace = torch.arange(N, dtype=torch.int32, device=device).expand(B, N)
    for step, M in enumerate((22, 15, 6)):
        plan = random_plan(seeded(step), B, matrix.shape[1], M, 0.1, device)
        matrix = ts.merge_tokens(matrix, plan, mode="amax").tensors
        trace = ts.trace_tokens(trace, plan)
        assert trace.dtype == torch.int32
        assert_equal(ts.assignment_matrix(trace, M), matrix)
    assert bool((trace == -1).any())
    assert ts.trace_tokens(trace[:, :0].long(), plan).shape == (B, 0)
    assert_equal(
        ts.trace_tokens(
            torch.full((B, 2), -1, device=device), SimpleNamespace(inverse=torch.zeros(B, 0, dtype=torch.int64, device=device))
        ),
        torch.full((B, 2), -1, device=device),
    )


def test_unmerge_tokens_gradient_of_half_precision_is_summed_in_float32(device: str) -> None:
    x = torch.zeros(1, 1, 3, dtype=torch.float16, device=device, requires_grad=True)
    plan = Plan(torch.tensor([[0]], device=device), torch.zeros(1, 4, dtype=torch.int64, device=device))
    out = ts.unmerge_tokens(x, plan)
    large = torch.tensor([40000.0, 40000.0, -40000.0, -30000.0], dtype=torch.float16, device=device)  # 80000 on the way is no float16
    (gradient,) = torch.autograd.grad(out, x, large[None, :, None].expand_as(out).contiguous())
    assert_equal(gradient, torch.full_like(x, 10000.0))


def test_unmerge_and_trace_bad_input() -> None:
    with pytest.raises(ValueError, match=r"^tokensieve\.unmerge_tokens: plan.inverse must be in \[-1, M=2\), got 2 at \(0, 5\)"):
        ts.unmerge_tokens(X[:, :2], PLAN)
    with pytest.raises(TypeError, match=r"^tokensieve\.unmerge_tokens: plan must be a MergePlan"):
        ts.unmerge_tokens(X, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^tokensieve\.unmerge_tokens: tensors\[0\] must be \(B=2, N=6, \.\.\.\), got shape \(1, 6, 4\)"):
        ts.unmerge_tokens(X[:1], PLAN)
    with pytest.raises(TypeError, match=r"^tokensieve\.trace_tokens: trace must be int32 or int64, got float32"):
        ts.trace_tokens(X[..., 0], PLAN)
    with pytest.raises(ValueError, match=r"^tokensieve\.trace_tokens: plan.inverse must be \(B=1, N\), got shape \(2, 6\)"):
        ts.trace_tokens(PLAN.inverse[:1], PLAN)
    with pytest.raises(ValueError, match=r"^tokensieve\.assignment_matrix: rows must be at least 0, got -1"):
        ts.assignment_matrix(PLAN.inverse, -1)
    with ts.debug_checks(), pytest.raises(ValueError, match=r"trace_tokens: trace must be in \[-1, N=6\), got 6 at \(0, 1\)"):
        ts.trace_tokens(torch.tensor([[0, 6]] * 2), PLAN)
