"""merge_by_label, fuse_dropped and run_labels against sums in float64, with gradients to the tokens and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tokensieve as ts
import torch
from reference import merge as reference
from reference.compare import assert_equal
from reference.inputs import FLOATS, integer, log_uniform, normal, seeded
from reference.pool import near
from same_bits import on_every_level
from torch import Tensor

KINDS = (("mean", False), ("mean", True), ("sum", False), ("sum", True), ("amax", False))


def random_labels(seed: int, B: int, N: int, rows: int, device: str) -> Tensor:
    return torch.randint(-1, rows, (B, N), generator=seeded(seed)).to(device)


def positive(seed: int, B: int, N: int, device: str) -> Tensor:
    return (torch.rand(B, N, generator=seeded(seed)) + 0.1).to(device)


@pytest.mark.parametrize(("mode", "weighted"), KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_by_label_widths(dtype: torch.dtype, mode: str, weighted: bool, device: str) -> None:
    for C in (1, 2, 7, 8, 16, 17, 33, 100, 1040):
        labels = random_labels(C, 2, 25, 7, device)
        x, w = normal(seeded(C), 2, 25, C, dtype=dtype, device=device), positive(C, 2, 25, device) if weighted else None
        for epsilon in (0.0, 0.5) if mode == "mean" else (0.0,):
            got, total = ts.merge_by_label(x, labels, 7, weights=w, mode=mode, epsilon=epsilon)
            want, sums = reference.merge_by_label(x, labels, 7, w, mode, epsilon)
            near(got, want, dtype, f"C={C} {mode}")
            near(total, sums, torch.float32)
            assert got.dtype == dtype
            assert total.dtype == torch.float32


@pytest.mark.parametrize(("mode", "weighted"), KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_by_label_gradients(dtype: torch.dtype, mode: str, weighted: bool, device: str) -> None:
    labels = random_labels(1, 2, 25, 7, device)
    x, w = normal(seeded(2), 2, 3, 25, 11, dtype=dtype, device=device), positive(3, 2, 25, device)
    g, h = normal(seeded(4), 2, 7, 3, 11, dtype=dtype, device=device), normal(seeded(5), 2, 7, device=device)
    for epsilon in (0.0, 0.5) if mode == "mean" else (0.0,):
        leaf, weight = x.clone().requires_grad_(), w.clone().requires_grad_() if weighted else None
        out, total = ts.merge_by_label(leaf.transpose(1, 2), labels, 7, weights=weight, mode=mode, epsilon=epsilon)
        loss = (out * g).sum().float() + ((total * h).sum() if weighted else 0.0)
        mine = torch.autograd.grad(loss, [leaf] if weight is None else [leaf, weight])
        truth, true_weight = x.double().requires_grad_(), w.double().requires_grad_() if weighted else None
        want, sums = reference.merge_by_label(truth.transpose(1, 2), labels, 7, true_weight, mode, epsilon)
        true_loss = (want * g.double()).sum() + ((sums * h.double()).sum() if weighted else 0.0)
        theirs = torch.autograd.grad(true_loss, [truth] if true_weight is None else [truth, true_weight])
        for a, b in zip(mine, theirs, strict=True):
            near(a, b, dtype, f"{mode} {epsilon}", 4.0)


def test_merge_by_label_integers_and_empty_segments(device: str) -> None:
    ids = torch.tensor([[5, -3, 2**40, 7]], device=device)
    labels = torch.tensor([[0, 2, 0, -1]], device=device)
    largest, total = ts.merge_by_label(ids, labels, 4, mode="amax")
    assert_equal(largest, torch.tensor([[2**40, 0, -3, 0]], device=device))
    assert_equal(total, torch.tensor([[2.0, 0.0, 1.0, 0.0]], device=device))
    assert_equal(ts.merge_by_label(ids, labels, 4, mode="sum")[0], torch.tensor([[2**40 + 5, 0, -3, 0]], device=device))
    x = torch.ones(1, 4, 2, device=device)
    out, total = ts.merge_by_label(x, labels, 4, weights=torch.tensor([[1.0, 0.0, -1.0, 3.0]], device=device))
    assert_equal(out, torch.zeros(1, 4, 2, device=device))  # no token, or weights that add up to 0
    assert_equal(total, torch.zeros(1, 4, device=device))


def test_merge_by_label_half_precision_overflows_only_when_stored(device: str) -> None:
    x = torch.full((1, 6, 3), 40000.0, dtype=torch.float16, device=device)
    labels, w = torch.zeros(1, 6, dtype=torch.int64, device=device), torch.full((1, 6), 1000.0, device=device)
    assert_equal(ts.merge_by_label(x, labels, 1)[0], x[:, :1])
    out, total = ts.merge_by_label(x, labels, 1, weights=w)
    assert_equal(out, x[:, :1])
    assert float(total) == 6000.0
    assert_equal(ts.merge_by_label(x, labels, 1, mode="sum")[0], torch.full_like(x[:, :1], torch.inf))
    none = torch.full((1, 1), -1, device=device)
    assert_equal(ts.fuse_dropped(x, w, none, normalize=True), x[:, :1])
    assert_equal(ts.fuse_dropped(x, w / 6000, none), x[:, :1])
    assert_equal(ts.fuse_dropped(x, w, none), torch.full_like(x[:, :1], torch.inf))


@pytest.mark.parametrize(("B", "N", "rows"), [(0, 5, 3), (2, 5, 0), (2, 0, 3), (0, 0, 0)])
def test_merge_by_label_empty(B: int, N: int, rows: int, device: str) -> None:
    for C in (4, 0):
        x, w = torch.ones(B, N, C, device=device).requires_grad_(), torch.ones(B, N, device=device).requires_grad_()
        for mode in ("mean", "sum"):
            out, total = ts.merge_by_label(x, torch.full((B, N), -1, device=device), rows, weights=w, mode=mode)
            assert_equal(out.detach(), torch.zeros(B, rows, C, device=device))
            assert_equal(total.detach(), torch.zeros(B, rows, device=device))
            for grad in torch.autograd.grad(out.sum() + total.sum(), (x, w)):
                assert not grad.any()
        fused = ts.fuse_dropped(x, w, torch.full((B, 2), -1, device=device))
        assert_equal(fused.detach(), torch.full((B, 1, C), float(N), device=device))


def test_merge_by_label_same_bits_at_every_level_and_thread_count() -> None:
    labels, w, kept = random_labels(1, 2, 300, 3, "cpu"), positive(2, 2, 300, "cpu"), torch.arange(0, 300, 7).repeat(2, 1)

    def run() -> Iterator[Tensor]:
        for dtype in FLOATS:
            x, weight = normal(seeded(3), 2, 300, 700, dtype=dtype).requires_grad_(), w.clone().requires_grad_()
            for mode, _ in KINDS:
                out, total = ts.merge_by_label(x, labels, 3, weights=None if mode == "amax" else weight, mode=mode)
                yield from (out, total, *torch.autograd.grad(out.float().square().sum(), x))
            fused = ts.fuse_dropped(x, weight, kept, normalize=True)
            yield from (fused, *torch.autograd.grad(fused.float().square().sum(), (x, weight)))

    on_every_level(run)


# ---- fuse_dropped, run_labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fuse_dropped_and_its_gradients(dtype: torch.dtype, normalize: bool, device: str) -> None:
    index = torch.stack([torch.randperm(40, generator=seeded(b))[:13] for b in range(3)]).to(device)
    index[0, 2:9] = -1
    for C in (1, 5, 16, 100):
        x, w = normal(seeded(C), 3, 40, C, dtype=dtype, device=device), positive(C, 3, 40, device)
        g = normal(seeded(C + 1), 3, 1, C, dtype=dtype, device=device)
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        got = ts.fuse_dropped(*leaves, index, normalize=normalize)
        truth = x.double().cpu().requires_grad_(), w.double().cpu().requires_grad_()
        want = reference.fuse_dropped(*truth, index.cpu(), normalize)
        near(got.detach(), want.detach(), dtype)
        assert got.dtype == dtype
        mine, theirs = torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, truth, g.double().cpu())
        for a, b in zip(mine, theirs, strict=True):
            near(a, b, dtype, f"C={C}", 8.0)


def test_fuse_dropped_is_evits_einsum(device: str) -> None:
    """EViT: the complement ascending, einsum of the raw scores; kept tokens contribute nothing, even where they are NaN."""
    x, scores = normal(seeded(1), 2, 30, 8, device=device), positive(2, 2, 30, device)
    index = ts.select_topk(scores, 12)
    rest = ts.complement_index(index, 30)
    want = torch.einsum("bnc,bn->bc", ts.gather_tokens(x, rest), scores.gather(1, rest))[:, None]
    x = x.scatter(1, index[..., None].expand(-1, -1, 8), torch.nan)
    torch.testing.assert_close(ts.fuse_dropped(x, scores, index), want)
    everything = torch.arange(30, device=device).repeat(2, 1)
    for normalize in (False, True):
        assert_equal(ts.fuse_dropped(x, scores, everything, normalize=normalize), torch.zeros(2, 1, 8, device=device))


def test_run_labels(device: str) -> None:
    starts = torch.tensor([[False, True, False, False, True, True], [True, False, False, False, False, False]], device=device)
    assert_equal(ts.run_labels(starts), torch.tensor([[-1, 0, 0, 0, 1, 2], [0, 0, 0, 0, 0, 0]], device=device))
    x = torch.arange(12.0, device=device).view(2, 6, 1)
    out, total = ts.merge_by_label(x, ts.run_labels(starts), 3)
    assert_equal(out[..., 0], torch.tensor([[2.0, 4.0, 5.0], [8.5, 0.0, 0.0]], device=device))
    assert_equal(total, torch.tensor([[3.0, 1.0, 1.0], [6.0, 0.0, 0.0]], device=device))


# ---- the other rules ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Input #")
def test_merge_by_label_gradcheck(device: str) -> None:
    labels, index = torch.tensor([[0, 1, 0, -1, 2]], device=device), torch.tensor([[0, 3, -1]], device=device)
    x, w = normal(seeded(1), 1, 5, 2, device=device).requires_grad_(), positive(2, 1, 5, device).requires_grad_()
    options = {"eps": 1e-2, "atol": 3e-3, "rtol": 3e-3}
    for mode in ("sum", "mean"):
        merge = lambda x, w, mode=mode: ts.merge_by_label(x, labels, 3, weights=w, mode=mode, epsilon=0.25 * (mode == "mean"))  # noqa: E731
        assert torch.autograd.gradcheck(merge, (x, w), **options)
        assert torch.autograd.gradgradcheck(merge, (x, w), **options)
        fuse = lambda x, w, mode=mode: ts.fuse_dropped(x, w, index, normalize=mode == "mean")  # noqa: E731
        assert torch.autograd.gradcheck(fuse, (x, w), **options)
        assert torch.autograd.gradgradcheck(fuse, (x, w), **options)
    apart = torch.randperm(10, generator=seeded(4)).view(1, 5, 2).float().to(device).requires_grad_()
    amax = lambda x: ts.merge_by_label(x, labels, 3, mode="amax")[0]  # noqa: E731
    assert torch.autograd.gradcheck(amax, (apart,), **options)
    assert torch.autograd.gradgradcheck(amax, (apart,), **options)


def test_merge_by_label_fuzz(device: str) -> None:
    for seed in range(60):
        g = seeded(seed)
        B, N, rows = log_uniform(g, 1, 4), log_uniform(g, 1, 60), log_uniform(g, 1, 20)
        mode, weighted = KINDS[integer(g, 0, 4)]
        dtype = FLOATS[integer(g, 0, 2)]
        x = torch.randn(B, log_uniform(g, 1, 4), N, log_uniform(g, 1, 70), generator=g).to(dtype).to(device).transpose(1, 2)
        labels, w = random_labels(seed, B, N, rows, device), positive(seed, B, N, device) if weighted else None
        got, _ = ts.merge_by_label(x, labels, rows, weights=w, mode=mode)
        near(got, reference.merge_by_label(x, labels, rows, w, mode)[0], dtype, f"seed {seed}")
        kept = torch.stack([torch.randperm(N, generator=g)[: N // 2] for _ in range(B)]).to(device)
        every = positive(seed, B, N, device)
        near(ts.fuse_dropped(x, every, kept), reference.fuse_dropped(x.cpu(), every.cpu(), kept.cpu()), dtype, f"fuse {seed}")


def test_merge_by_label_opcheck(device: str) -> None:
    labels, kept = random_labels(1, 2, 8, 3, device), torch.tensor([[1, 4], [0, -1]], device=device)
    ops = torch.ops.tokensieve
    for dtype in FLOATS:
        x, w = normal(seeded(4), 2, 8, 6, dtype=dtype, device=device).requires_grad_(), positive(2, 2, 8, device).requires_grad_()
        torch.library.opcheck(ops.merge_by_label, (x, labels, 3, w, 1, 0.5))
        torch.library.opcheck(ops.merge_by_label, (x, labels, 3, None, 3, 0.0))
        torch.library.opcheck(ops.fuse_dropped, (x, w, kept, True))
        out = normal(seeded(5), 2, 3, 6, dtype=dtype, device=device)
        for wanted in (True, False):
            arguments = (out, w.detach()[:, :3].contiguous(), x.detach(), out, labels, False, w.detach(), 1, 0.5, wanted, not wanted)
            torch.library.opcheck(ops.merge_by_label_backward, arguments)


def test_merge_by_label_compiles_with_gradients(device: str) -> None:
    def layer(x: Tensor, labels: Tensor, w: Tensor) -> Tensor:
        out, total = ts.merge_by_label(x * 2, labels, 4, weights=w.sin(), epsilon=1e-6)
        return out.sum() + total.sum() + ts.fuse_dropped(x, w, labels[:, :2].clamp(min=0)).square().sum()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N in ((2, 12), (3, 17), (4, 30)):
        found = []
        for run in (layer, compiled):
            x, w = normal(seeded(B), B, N, 5, device=device).requires_grad_(), positive(N, B, N, device).requires_grad_()
            loss = run(x, random_labels(N, B, N, 4, device), w)
            loss.backward()
            found.append((loss.detach(), x.grad, w.grad))
        torch.testing.assert_close(*found)


X, L, W, K = torch.zeros(2, 6, 4), torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6), torch.tensor([[0, 1], [4, 5]])
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "mode": (lambda: ts.merge_by_label(X, L, 2, mode="weighted"), ValueError, r"merge_by_label: mode must be one of 'mean', 'sum', 'amax'"),
    "label high": (
        lambda: ts.merge_by_label(X, L + 2, 2),
        ValueError,
        r"merge_by_label: labels must be in \[-1, rows=2\), got 2 at \(0, 0\)",
    ),
    "label low": (lambda: ts.merge_by_label(X, L - 2, 2), ValueError, r"merge_by_label: labels must be in \[-1, rows=2\), got -2"),
    "rows": (lambda: ts.merge_by_label(X, L, -1), ValueError, r"merge_by_label: rows must be at least 0, got -1"),
    "rows type": (lambda: ts.merge_by_label(X, L, 2.0), TypeError, r"merge_by_label: rows must be an int, got float"),
    "labels shape": (
        lambda: ts.merge_by_label(X, L[:, :5], 2),
        ValueError,
        r"merge_by_label: labels must be \(B, N\) = \(2, 6\), got shape \(2, 5\)",
    ),
    "labels dtype": (lambda: ts.merge_by_label(X, L.int(), 2), TypeError, r"merge_by_label: labels must be int64, got int32"),
    "x type": (lambda: ts.merge_by_label(np.zeros((2, 6)), L, 2), TypeError, r"merge_by_label: x must be a torch.Tensor, got ndarray"),
    "x rank": (lambda: ts.merge_by_label(X[0, 0], L, 2), ValueError, r"merge_by_label: x must be \(B, N, ...\), got shape \(4,\)"),
    "x dtype": (
        lambda: ts.merge_by_label(X.long(), L, 2),
        TypeError,
        r"merge_by_label: x must be float32 or float16 or bfloat16, got int64",
    ),
    "amax weights": (
        lambda: ts.merge_by_label(X, L, 2, weights=W, mode="amax"),
        ValueError,
        r"merge_by_label: weights must be None in mode 'amax'",
    ),
    "weights shape": (
        lambda: ts.merge_by_label(X, L, 2, weights=W[:1]),
        ValueError,
        r"merge_by_label: weights must be \(B, N\) = \(2, 6\)",
    ),
    "weights dtype": (
        lambda: ts.merge_by_label(X, L, 2, weights=W.half()),
        TypeError,
        r"merge_by_label: weights must be float32, got float16",
    ),
    "epsilon": (lambda: ts.merge_by_label(X, L, 2, epsilon="1"), TypeError, r"merge_by_label: epsilon must be a float, got str"),
    "fuse index": (lambda: ts.fuse_dropped(X, W, K + 1), ValueError, r"fuse_dropped: index must be in \[-1, N=6\), got 6 at \(1, 1\)"),
    "fuse batch": (lambda: ts.fuse_dropped(X, W, K[:1]), ValueError, r"fuse_dropped: index must be \(B=2, K\), got shape \(1, 2\)"),
    "fuse weights": (lambda: ts.fuse_dropped(X, None, K), TypeError, r"fuse_dropped: weights must be a torch.Tensor, got NoneType"),
    "fuse dtype": (
        lambda: ts.fuse_dropped(X.long(), W, K),
        TypeError,
        r"fuse_dropped: x must be float32 or float16 or bfloat16, got int64",
    ),
    "fuse normalize": (lambda: ts.fuse_dropped(X, W, K, normalize="yes"), TypeError, r"fuse_dropped: normalize must be a bool, got str"),
    "starts": (lambda: ts.run_labels(L), TypeError, r"run_labels: starts must be bool, got int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_merge_by_label_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=rf"^tokensieve\.{message}"):
        call()


def test_merge_by_label_debug_checks() -> None:
    with ts.debug_checks():
        with pytest.raises(ValueError, match=r"merge_by_label: labels must be in \[-1, rows=2\), got 7 at \(1, 0\)"):
            ts.merge_by_label(X, torch.tensor([[0] * 6, [7] * 6]), 2)
        ts.merge_by_label(X, L, 1)
        ts.fuse_dropped(X, W, K)
