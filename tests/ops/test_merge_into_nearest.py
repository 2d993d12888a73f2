"""merge_into_nearest against PruMerge's and VisionZip's loops, token by token, in float64; and the pair sums below it."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import FLOATS, normal, seeded
from torch import Tensor

ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MODES = ("sum", "add_mean", "mean")


def cosines(metric: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    return unit @ unit.transpose(1, 2)


def fold(x: Tensor, weights: Tensor, center: int, others: list[int], mode: str) -> Tensor:
    """One centre and what goes into it, in differentiable float64."""
    w = weights.view(-1, *[1] * (x.dim() - 1))
    if mode == "mean":
        members = [center, *others]
        return (w[members] * x[members]).sum(0) / weights[members].sum()
    total = (w[others] * x[others]).sum(0)
    if mode == "add_mean" and others:
        total = total / weights[others].sum()
    return x[center] + total


def reference(x: Tensor, metric: Tensor, centers: Tensor, weights: Tensor | None, neighbors: int | None, mode: str) -> Tensor:
    B, N = x.shape[:2]
    scores, w = cosines(metric), torch.ones(B, N, dtype=torch.float64, device=x.device) if weights is None else weights
    out = []
    for b in range(B):
        ids = centers[b].tolist()
        for k, center in enumerate(ids):
            if neighbors is None:
                nearest = {n: max(range(len(ids)), key=lambda j: (float(scores[b, n, ids[j]]), -j)) for n in range(N)}
                others = [n for n in range(N) if n not in ids and nearest[n] == k]
            else:
                others = sorted((n for n in range(N) if n != center), key=lambda n: (-float(scores[b, center, n]), n))[:neighbors]
            out.append(fold(x[b], w[b], center, others, mode))
    return torch.stack(out).view(B, centers.shape[1], *x.shape[2:])


def problem(dtype: torch.dtype, device: str, B: int = 2, N: int = 30, K: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, metric = normal(seeded(1), B, N, 19, dtype=dtype, device=device), normal(seeded(2), B, N, 24, dtype=dtype, device=device)
    centers = torch.stack([torch.randperm(N, generator=seeded(b))[:K] for b in range(B)]).to(device)
    return x, metric, centers, (torch.rand(B, N, generator=seeded(3)) + 0.1).to(device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("neighbors", [None, 1, 5, 29])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_into_nearest_and_its_gradients(dtype: torch.dtype, neighbors: int | None, mode: str, device: str) -> None:
    x, metric, centers, weights = problem(dtype, device)
    leaves, truth = (
        (x.clone().requires_grad_(), weights.clone().requires_grad_()),
        (x.double().requires_grad_(), weights.double().requires_grad_()),
    )
    got = ts.merge_into_nearest(leaves[0], metric, centers, weights=leaves[1], neighbors=neighbors, mode=mode).tensors
    want = reference(truth[0], metric, centers, truth[1], neighbors, mode)
    options = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype] * float(want.detach().abs().max())}
    torch.testing.assert_close(got.double(), want, **options)
    assert got.dtype == dtype
    grad = normal(seeded(4), *got.shape, dtype=dtype, device=device)
    mine, theirs = torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, truth, grad.double())
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=ROUNDING[dtype], atol=4 * ROUNDING[dtype] * max(1.0, float(b.abs().max())))
    plain = ts.merge_into_nearest(x, metric, centers, neighbors=neighbors, mode=mode).tensors
    torch.testing.assert_close(plain.double(), reference(x.double(), metric, centers, None, neighbors, mode), **options)


def test_merge_into_nearest_assigned(device: str) -> None:
    x, metric, centers, _ = problem(torch.float32, device)
    _, labels = ts.merge_into_nearest(x, metric, centers)
    scores = cosines(metric).gather(2, centers[:, None].expand(-1, 30, -1))
    own = torch.arange(6, device=device).expand(2, -1)
    assert_equal(labels, scores.argmax(2).scatter(1, centers, own))
    _, near = ts.merge_into_nearest(x, metric, centers, neighbors=4, mode="sum")
    rows = cosines(metric).gather(1, centers[..., None].expand(-1, -1, 30)).scatter(2, centers[..., None], -9.0)
    assert_equal(near, rows.topk(4).indices)


def test_merge_into_nearest_ties_zero_rows_and_centres_alone(device: str) -> None:
    x = torch.arange(5.0, device=device).view(1, 5, 1)
    same = torch.ones(1, 5, 3, device=device)
    centers = torch.tensor([[3, 1]], device=device)
    got = ts.merge_into_nearest(x, same, centers)
    assert_equal(got.assigned, torch.tensor([[0, 1, 0, 0, 0]], device=device))  # every token is as near to both: the first of the list
    assert_equal(got.tensors, torch.tensor([[[3.0 + 2.0], [1.0]]], device=device))
    got = ts.merge_into_nearest(x, same, centers, neighbors=2, mode="sum")
    assert_equal(got.assigned, torch.tensor([[[0, 1], [0, 2]]], device=device))
    zero = torch.zeros(1, 5, 3, device=device)
    assert_equal(ts.merge_into_nearest(x, zero, centers).assigned, torch.tensor([[0, 1, 0, 0, 0]], device=device))
    none = torch.zeros(1, 5, device=device)
    for neighbors in (None, 2):  # weights that add up to 0 add nothing
        assert_equal(ts.merge_into_nearest(x, same, centers, weights=none, neighbors=neighbors).tensors, x[:, [3, 1]])
    every = torch.arange(5, device=device)[None]
    for mode in MODES:
        assert_equal(ts.merge_into_nearest(x, same, every, mode=mode).tensors, x)


def test_merge_into_nearest_half_precision_overflows_only_when_stored(device: str) -> None:
    x = torch.full((1, 6, 3), 40000.0, dtype=torch.float16, device=device)
    center = torch.tensor([[2]], device=device)
    for neighbors in (None, 4):
        assert_equal(ts.merge_into_nearest(x, x, center, neighbors=neighbors, mode="mean").tensors, x[:, :1])
        assert_equal(ts.merge_into_nearest(x, x, center, neighbors=neighbors, mode="sum").tensors, torch.full_like(x[:, :1], torch.inf))


@pytest.mark.filterwarnings("ignore:Input #")
def test_merge_into_nearest_opcheck_and_gradients_of_gradients(device: str) -> None:
    x = normal(seeded(1), 2, 6, 3, device=device).requires_grad_()
    source, row = torch.tensor([[0, 5, 5, -1], [2, 1, 0, 3]], device=device), torch.tensor([[0, 0, 1, 1], [1, -1, 1, 0]], device=device)
    w = (torch.rand(2, 4, generator=seeded(3)) + 0.1).to(device).requires_grad_()
    ops = torch.ops.tokensieve
    torch.library.opcheck(ops.sum_pairs, (x, source, row, 2, w))
    torch.library.opcheck(ops.sum_pairs, (x.detach().half(), source, row, 2, None))
    torch.library.opcheck(ops.pair_dots, (normal(seeded(2), 2, 2, 3, device=device).requires_grad_(), x, source, row))
    options = {"eps": 1e-2, "atol": 3e-3, "rtol": 3e-3}
    pairs = lambda x, w: ops.sum_pairs(x, source, row, 2, w)  # noqa: E731
    assert torch.autograd.gradcheck(pairs, (x, w), **options)
    assert torch.autograd.gradgradcheck(pairs, (x, w), **options)


def test_merge_into_nearest_compiles(device: str) -> None:
    def step(x: Tensor, metric: Tensor, centers: Tensor, w: Tensor) -> Tensor:
        folded = ts.merge_into_nearest(x * 2, metric, centers, weights=w, neighbors=3, mode="sum").tensors
        return folded.square().sum() + ts.merge_into_nearest(x, metric, centers).tensors.sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N, K in ((2, 12, 4), (3, 17, 5), (4, 30, 9)):
        x, metric, centers, w = problem(torch.float32, device, B, N, K)
        grads = []
        for run in (step, compiled):
            leaf = x.clone().requires_grad_()
            run(leaf, metric, centers, w).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads)


X, C = torch.zeros(2, 6, 4), torch.tensor([[0, 1], [4, 5]])
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "mode": (lambda: ts.merge_into_nearest(X, X, C, mode="amax"), ValueError, r"mode must be one of 'sum', 'mean', 'add_mean', got 'amax'"),
    "x dtype": (lambda: ts.merge_into_nearest(X.long(), X, C), TypeError, r"x must be float32 or float16 or bfloat16, got int64"),
    "x rank": (lambda: ts.merge_into_nearest(X[0, 0], X, C), ValueError, r"x must be \(B, N, ...\), got shape \(4,\)"),
    "metric": (lambda: ts.merge_into_nearest(X, X[:, :5], C), ValueError, r"metric must be \(B=2, N=6, D\), got shape \(2, 5, 4\)"),
    "metric strides": (lambda: ts.merge_into_nearest(X.mT.contiguous(), X.mT, C % 4), ValueError, r"metric must be contiguous"),
    "centers dtype": (lambda: ts.merge_into_nearest(X, X, C.int()), TypeError, r"centers must be int64, got int32"),
    "centers batch": (lambda: ts.merge_into_nearest(X, X, C[:1]), ValueError, r"centers must be \(B=2, K\), got shape \(1, 2\)"),
    "centers none": (lambda: ts.merge_into_nearest(X, X, C[:, :0]), ValueError, r"centers must hold at least one token a row, got none"),
    "centers range": (lambda: ts.merge_into_nearest(X, X, C + 1), ValueError, r"centers must be in \[0, N=6\), got 6 at \(1, 1\)"),
    "neighbors": (lambda: ts.merge_into_nearest(X, X, C, neighbors=6), ValueError, r"neighbors must be in \[1, N - 1 = 5\], got 6"),
    "neighbors zero": (lambda: ts.merge_into_nearest(X, X, C, neighbors=0), ValueError, r"neighbors must be in \[1, N - 1 = 5\], got 0"),
    "neighbors type": (lambda: ts.merge_into_nearest(X, X, C, neighbors=1.0), TypeError, r"neighbors must be an int, got float"),
    "weights": (lambda: ts.merge_into_nearest(X, X, C, weights=torch.ones(2, 5)), ValueError, r"weights must be \(B, N\) = \(2, 6\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_merge_into_nearest_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=rf"^tokensieve\.merge_into_nearest: ({message})"):
        call()


def test_merge_into_nearest_debug_checks_find_a_centre_named_twice() -> None:
    with (
        ts.debug_checks(),
        pytest.raises(ValueError, match=r"merge_into_nearest: centers must name a token once per row .* got 1 twice in row 0"),
    ):
        ts.merge_into_nearest(X, X, torch.tensor([[1, 1], [4, 5]]))
