"""pool_runs and row_column_means against slices and means in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference import pool as reference
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, seeded
from reference.pool import near
from same_bits import on_every_level
from torch import Tensor


def packed(device: str, starts: list[list[int]]) -> Tensor:
    return torch.tensor(starts, dtype=torch.int64, device=device).view(len(starts), -1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pool_runs_and_its_gradient(dtype: torch.dtype, device: str) -> None:
    for S, starts, length, stride in (
        (30, [[3, 14], [0, 20]], 10, 4),  # a tail of 2 is dropped; an image at each end
        (30, [[5, 15], [0, 10]], 10, 5),  # images side by side
        (12, [[0], [0]], 12, 3),
        (12, [[0], [0]], 12, 13),  # everything is dropped
        (12, [[1, 5], [2, 7]], 3, 4),  # images vanish
        (9, [[4], [1]], 5, 1),
        (9, [[], []], 5, 2),
        (40, [[0, 7, 14, 33], [1, 9, 20, 30]], 7, 2),
    ):
        for C in (1, 16, 37, 130):
            x = normal(seeded(C), 2, S, C, dtype=dtype, device=device)
            leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
            got, want = ts.pool_runs(leaf, packed(device, starts), length, stride), reference.pool_runs(truth, starts, length, stride)
            what = f"S={S} {starts} {length} {stride} C={C}"
            near(got, want, dtype, what)
            g = normal(seeded(S), *got.shape, dtype=dtype, device=device)
            (mine,), (theirs,) = torch.autograd.grad(got, leaf, g), torch.autograd.grad(want, truth, g.double())
            near(mine, theirs, dtype, f"gradient {what}")
    assert_equal(ts.pool_runs(x, packed(device, [[4], [1]]), 5, 1), x)


def test_pool_runs_copies_text_bit_for_bit(device: str) -> None:
    x = torch.tensor([[[torch.nan], [-0.0], [1.0], [3.0], [torch.inf], [7.0]]], device=device)
    assert_equal(
        ts.pool_runs(x, packed(device, [[2]]), 2, 2), torch.tensor([[[torch.nan], [-0.0], [2.0], [torch.inf], [7.0]]], device=device)
    )
    big = torch.full((1, 8, 3), 60000.0, dtype=torch.float16, device=device)
    assert_equal(ts.pool_runs(big, packed(device, [[0]]), 8, 8), big[:, :1])


def test_pool_runs_views_and_empties(device: str) -> None:
    base = normal(seeded(2), 3, 30, 67, device=device)
    view, starts = base[1:, 4:28:2, 3:50], packed(device, [[2, 0, 7], [3, 0, 8]])[:, ::2]
    dense = packed(device, [[2, 7], [3, 8]])
    assert_equal(ts.pool_runs(view, dense, 4, 2), ts.pool_runs(view.contiguous(), dense, 4, 2))
    with pytest.raises(ValueError, match=r"^tokensieve\.pool_runs: starts must be contiguous in its last dimension"):
        ts.pool_runs(view, starts, 4, 2)
    for B, S, C in ((0, 9, 4), (2, 9, 0), (2, 0, 4)):
        x = torch.zeros(B, S, C, device=device).requires_grad_()
        images = min(S, 1)
        out = ts.pool_runs(x, torch.zeros(B, images, dtype=torch.int64, device=device), 5, 2)
        assert out.shape == (B, S - 3 * images, C)
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_row_column_means_and_their_gradient(dtype: torch.dtype, device: str) -> None:
    for B, T, N, C in ((2, 5, 7, 3), (1, 1, 9, 16), (2, 9, 1, 33), (1, 4, 6, 700), (1, 11, 300, 130), (2, 1, 1, 1)):
        x = normal(seeded(C), B, T, N, C, dtype=dtype, device=device)
        leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
        got, want = ts.row_column_means(leaf), (truth.mean(2), truth.mean(1))
        grads = [normal(seeded(1), *y.shape, dtype=dtype, device=device) for y in got]
        for mine, theirs in zip(got, want, strict=True):
            near(mine, theirs, dtype, f"{x.shape}")
        (mine,) = torch.autograd.grad(got, leaf, grads, retain_graph=True)
        (theirs,) = torch.autograd.grad(want, truth, [g.double() for g in grads], retain_graph=True)
        near(mine, theirs, dtype, f"gradient {x.shape}")
        for i in (0, 1):  # one of the two is used
            (mine,), (theirs,) = torch.autograd.grad(got[i], leaf, grads[i], retain_graph=i == 0), (None,)
            (theirs,) = torch.autograd.grad(want[i], truth, grads[i].double(), retain_graph=True)
            near(mine, theirs, dtype, f"gradient of output {i} {x.shape}")


def test_row_column_means_views_empties_and_halves(device: str) -> None:
    base = normal(seeded(2), 3, 8, 9, 67, device=device)
    for view in (base[1:, ::2, 1:8:3, 3:50], base.transpose(1, 2), base[:1].expand(2, -1, -1, -1)):
        for got, want in zip(ts.row_column_means(view), ts.row_column_means(view.contiguous()), strict=True):
            assert_equal(got, want)
    for B, C in ((0, 4), (2, 0)):
        x = torch.zeros(B, 3, 5, C, device=device).requires_grad_()
        rows, columns = ts.row_column_means(x)
        assert (rows.shape, columns.shape) == ((B, 3, C), (B, 5, C))
        assert torch.autograd.grad(rows.sum() + columns.sum(), x)[0].shape == x.shape
    big = torch.full((1, 8, 9, 3), 60000.0, dtype=torch.float16, device=device)
    rows, columns = ts.row_column_means(big)
    assert_equal(rows, big[:, :, 0])
    assert_equal(columns, big[:, 0])


def test_means_have_gradients_of_gradients(device: str) -> None:
    x, starts = normal(seeded(1), 1, 8, 2, device=device).requires_grad_(), packed(device, [[2]])
    (once,) = torch.autograd.grad(ts.pool_runs(x, starts, 5, 2).square().sum(), x, create_graph=True)
    (mine,) = torch.autograd.grad(once.square().sum(), x)
    other = x.detach().double().requires_grad_()
    (once,) = torch.autograd.grad(reference.pool_runs(other, [[2]], 5, 2).square().sum(), other, create_graph=True)
    near(mine, torch.autograd.grad(once.square().sum(), other)[0], torch.float32)
    y, z = x.detach().view(1, 2, 4, 2).requires_grad_(), x.detach().view(1, 2, 4, 2).double().requires_grad_()
    found = []
    for t, means in ((y, ts.row_column_means), (z, lambda t: (t.mean(2), t.mean(1)))):
        rows, columns = means(t)
        (once,) = torch.autograd.grad(rows.square().sum() + columns.pow(3).sum(), t, create_graph=True)
        found.append(torch.autograd.grad(once.square().sum(), t)[0])
    near(found[0], found[1], torch.float32, "", 4.0)


def test_means_same_bits_at_every_level_and_thread_count() -> None:
    def run() -> Iterator[Tensor]:
        for dtype in FLOATS:
            x = normal(seeded(3), 2, 96, 345, dtype=dtype).requires_grad_()
            out = ts.pool_runs(x, packed("cpu", [[3, 40], [0, 60]]), 30, 7)
            for y in (out, *ts.row_column_means(x.view(2, 6, 16, 345))):
                yield from (y, torch.autograd.grad(y, x, y.detach().sin(), retain_graph=True)[0])

    on_every_level(run)


X, A = torch.zeros(2, 12, 4), torch.zeros(2, 1, dtype=torch.int64)
ERRORS: dict[str, tuple[Any, type[Exception]]] = {
    r"pool_runs: x must be float32 or float16 or bfloat16, got int64": (lambda: ts.pool_runs(X.long(), A, 3, 2), TypeError),
    r"pool_runs: x must be \(B, S, C\), got shape \(12, 4\)": (lambda: ts.pool_runs(X[0], A, 3, 2), ValueError),
    r"pool_runs: starts must be int64, got int32": (lambda: ts.pool_runs(X, A.int(), 3, 2), TypeError),
    r"pool_runs: starts must be \(B=2, I\), got shape \(1, 1\)": (lambda: ts.pool_runs(X, A[:1], 3, 2), ValueError),
    r"pool_runs: length must be at least 1, got 0": (lambda: ts.pool_runs(X, A, 0, 2), ValueError),
    r"pool_runs: stride must be at least 1, got 0": (lambda: ts.pool_runs(X, A, 3, 0), ValueError),
    r"pool_runs: starts must leave room for 1 runs of 13 among S=12 tokens": (lambda: ts.pool_runs(X, A, 13, 2), ValueError),
    r"pool_runs: starts must be ascending runs of 3 that do not overlap among S=12 tokens, got \[10\]": (
        lambda: ts.pool_runs(X, A + 10, 3, 2),
        ValueError,
    ),
    r"pool_runs: starts must be ascending runs of 3 that do not overlap among S=12 tokens, got \[-1\]": (
        lambda: ts.pool_runs(X, A - 1, 3, 2),
        ValueError,
    ),
    r"pool_runs: starts must be ascending runs of 3 that do not overlap among S=12 tokens, got \[4, 6\]": (
        lambda: ts.pool_runs(X, torch.tensor([[0, 3], [4, 6]]), 3, 2),
        ValueError,
    ),
    r"row_column_means: x must be \(B, T, N, C\), got shape \(2, 12, 4\)": (lambda: ts.row_column_means(X), ValueError),
    r"row_column_means: x must have T >= 1 frames of N >= 1 tokens, got shape \(2, 0, 3, 4\)": (
        lambda: ts.row_column_means(torch.zeros(2, 0, 3, 4)),
        ValueError,
    ),
    r"row_column_means: x must be float32 or float16 or bfloat16, got float64": (
        lambda: ts.row_column_means(torch.zeros(1, 1, 1, 1, dtype=torch.float64)),
        TypeError,
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_means_refuse(message: str) -> None:
    call, error = ERRORS[message]
    with pytest.raises(error, match=rf"^tokensieve\.{message}"):
        call()
