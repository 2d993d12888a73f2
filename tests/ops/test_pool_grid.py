"""pool_grid, pool_windows and space_to_depth against output-by-output references in float64, and against torch's own pooling."""

from __future__ import annotations

import math
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
from torch.nn import functional as F

CASES: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((7, 5), {"window": (2, 2)}),
    ((7, 5), {"window": (3, 2), "stride": (1, 1)}),
    ((7, 5), {"window": (2, 1), "stride": (3, 2)}),  # tokens between the windows
    ((7, 5), {"window": (7, 5)}),
    ((7, 5), {"size": (3, 4)}),
    ((7, 5), {"size": (9, 1)}),
    ((6, 10), {"size": (6, 4), "within": (3, 5)}),
    ((23,), {"window": (4,)}),
    ((5, 4, 3), {"window": (2, 3, 2), "stride": (1, 1, 1)}),
    ((5, 4, 3), {"size": (2, 3, 3)}),
    ((1, 1), {"size": (1, 1)}),
)
BILINEAR = (
    ((7, 5), (4, 3)),
    ((5, 4), (11, 9)),
    ((9, 9), (9, 9)),
    ((27, 6), (14, 3)),
    ((1, 3), (2, 1)),
    ((3, 4, 5), (2, 4, 8)),
    ((13,), (4,)),
)


def variants() -> list[tuple[tuple[int, ...], dict[str, Any]]]:
    found = [(grid, {**options, "kind": kind}) for grid, options in CASES for kind in ("mean", "max")]
    return found + [(grid, {"size": size, "kind": "bilinear"}) for grid, size in BILINEAR]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pool_grid_and_its_gradient(dtype: torch.dtype, device: str) -> None:
    for i, (grid, options) in enumerate(variants()):
        for C in (1, 20, 83):
            x = normal(seeded(i), 2, math.prod(grid), C, dtype=dtype, device=device)
            leaf, truth = x.clone().requires_grad_(), x.double().requires_grad_()
            got, want = ts.pool_grid(leaf, grid, **options), reference.pool_grid(truth, grid, **options)
            what = f"{grid} {options} C={C}"
            near(got, want, dtype, what)
            assert got.dtype == dtype
            assert got.is_contiguous()
            g = normal(seeded(C), *got.shape, dtype=dtype, device=device)
            (mine,), (theirs,) = torch.autograd.grad(got, leaf, g), torch.autograd.grad(want, truth, g.double())
            near(mine, theirs, dtype, f"gradient {what}", 2.0)


def test_pool_grid_wide_rows_and_long_windows(device: str) -> None:
    """Channels past one chunk of the gradient's sums; windows of hundreds of tokens; a token in more than 64 windows."""
    for grid, options, C in (
        ((24, 24), {"size": (1, 1)}, 5),
        ((24, 24), {"size": (2, 3), "kind": "max"}, 40),
        ((4, 6), {"window": (2, 2)}, 2100),
        ((129,), {"window": (65,), "stride": (1,)}, 20),
        ((17, 17), {"window": (9, 9), "stride": (1, 1), "kind": "max"}, 3),
        ((2, 2), {"size": (30, 20), "kind": "bilinear"}, 1030),
    ):
        x = normal(seeded(C), 1, math.prod(grid), C, device=device).requires_grad_()
        truth = x.detach().double().requires_grad_()
        got, want = ts.pool_grid(x, grid, **options), reference.pool_grid(truth, grid, **options)  # type: ignore[arg-type]
        near(got, want, torch.float32, str(options), 4.0)
        g = normal(seeded(1), *got.shape, device=device)
        near(torch.autograd.grad(got, x, g)[0], torch.autograd.grad(want, truth, g.double())[0], torch.float32, str(options), 8.0)


def test_pool_grid_is_torch_pooling(device: str) -> None:
    x = normal(seeded(3), 2, 14 * 14, 24, device=device)
    image = x.view(2, 14, 14, 24).permute(0, 3, 1, 2)

    def tokens(y: Tensor) -> Tensor:
        return y.permute(0, 2, 3, 1).flatten(1, 2)

    assert_equal(ts.pool_grid(x, (14, 14), window=3, stride=2, kind="max"), tokens(F.max_pool2d(image, 3, 2)))
    assert_equal(ts.pool_grid(x, (14, 14), size=(5, 9), kind="max"), tokens(F.adaptive_max_pool2d(image, (5, 9))))
    torch.testing.assert_close(ts.pool_grid(x, (14, 14), size=(5, 9)), tokens(F.adaptive_avg_pool2d(image, (5, 9))))
    for size in ((7, 7), (5, 9), (28, 3)):
        torch.testing.assert_close(
            ts.pool_grid(x, (14, 14), size=size, kind="bilinear"), tokens(F.interpolate(image, size, mode="bilinear"))
        )
    parts = image.unfold(2, 7, 7).unfold(3, 7, 7).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # STViT: 4 windows of 7 x 7, bins overlap
    bins = F.adaptive_max_pool2d(parts, 3).view(2, 2, 2, 24, 3, 3).permute(0, 1, 4, 2, 5, 3).reshape(2, 36, 24)
    assert_equal(ts.pool_grid(x, (14, 14), size=(6, 6), within=(7, 7), kind="max"), bins)


def test_pool_grid_max_of_ties_and_nan(device: str) -> None:
    x = torch.zeros(1, 9, 3, device=device)
    x[0, 4, 0], x[0, 8, 1], x[0, :, 2] = torch.nan, torch.inf, -torch.inf
    leaf = x.clone().requires_grad_()
    out = ts.pool_grid(leaf, (3, 3), window=2, stride=1, kind="max")
    nan, inf = torch.nan, torch.inf
    assert_equal(out.detach(), torch.tensor([[[nan, 0, -inf], [nan, 0, -inf], [nan, 0, -inf], [nan, inf, -inf]]], device=device))
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert_equal(grad[0, :, 0], torch.tensor([0, 0, 0, 0, 4.0, 0, 0, 0, 0], device=device))
    assert_equal(grad[0, :, 1], torch.tensor([1.0, 1, 0, 1, 0, 0, 0, 0, 1], device=device))
    assert_equal(grad[0, :, 2], torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 0, 0], device=device))
    ties = torch.randint(0, 3, (2, 35, 40), generator=seeded(5)).float().to(device).requires_grad_()
    truth = ties.detach().double().requires_grad_()
    for options in ({"window": (3, 2), "stride": (1, 1)}, {"size": (3, 4)}):
        got = ts.pool_grid(ties, (7, 5), kind="max", **options)  # type: ignore[arg-type]
        want = reference.pool_grid(truth, (7, 5), kind="max", **options)  # type: ignore[arg-type]
        g = normal(seeded(6), *got.shape, device=device)
        near(torch.autograd.grad(got, ties, g)[0], torch.autograd.grad(want, truth, g.double())[0], torch.float32, str(options))


def test_pool_grid_copies_where_there_is_one_token(device: str) -> None:
    """An outsider's NaN or infinity never leaks in, and sums of halves do not overflow."""
    x = normal(seeded(1), 2, 12, 5, dtype=torch.float16, device=device)
    x[0, 3], x[1, 7] = torch.nan, torch.inf
    for options in ({"window": 1}, {"size": (3, 4)}, {"size": (3, 4), "kind": "bilinear"}, {"size": (3, 4), "kind": "max"}):
        assert_equal(ts.pool_grid(x, (3, 4), **options), x)  # type: ignore[arg-type]
    big = torch.full((1, 16, 3), 60000.0, dtype=torch.float16, device=device)
    assert_equal(ts.pool_grid(big, (4, 4), window=4), big[:, :1])
    assert_equal(ts.pool_windows(big, torch.zeros(1, 16, device=device), (4, 4), 4), big[:, :1])
    assert_equal(ts.pool_grid(big, (4, 4), size=(3, 3), kind="bilinear"), big[:, :9])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pool_windows_and_its_gradients(dtype: torch.dtype, device: str) -> None:
    for grid, window, stride in (((4, 6, 5), (2, 3, 2), None), ((5, 4), (2, 3), (1, 1)), ((6, 6), (2, 2), (3, 3)), ((19,), (18,), (1,))):
        for C, temperature in ((1, 1.0), (21, 0.1), (70, 3.0)):
            N = math.prod(grid)
            x, s = normal(seeded(C), 2, N, C, dtype=dtype, device=device), normal(seeded(N), 2, N, device=device)
            leaves = x.clone().requires_grad_(), s.clone().requires_grad_()
            truth = x.double().requires_grad_(), s.double().requires_grad_()
            got = ts.pool_windows(*leaves, grid, window, stride=stride, temperature=temperature)
            want = reference.pool_windows(*truth, grid, window, stride, temperature)
            what = f"{grid} {window} {stride} C={C}"
            near(got, want, dtype, what, 2.0)
            g = normal(seeded(7), *got.shape, dtype=dtype, device=device)
            for mine, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, truth, g.double()), strict=True):
                near(mine, theirs, dtype, what, 8.0)
            (alone,) = torch.autograd.grad(
                ts.pool_windows(x, leaves[1], grid, window, stride=stride, temperature=temperature), leaves[1], g
            )
            assert_equal(
                alone, torch.autograd.grad(ts.pool_windows(*leaves, grid, window, stride=stride, temperature=temperature), leaves[1], g)[0]
            )


def test_pool_windows_with_scores_that_are_not_finite(device: str) -> None:
    x = torch.arange(8.0, device=device).view(1, 8, 1)
    inf, nan = torch.inf, torch.nan
    scores = torch.tensor([[0.0, -inf, -inf, -inf, nan, 0.0, inf, 0.0]], device=device)
    assert_equal(ts.pool_windows(x, scores, (8,), 2)[0, :, 0], torch.tensor([0.0, nan, nan, nan], device=device))
    assert_equal(ts.pool_windows(x, 1e30 * x[..., 0], (8,), 4)[0, :, 0], torch.tensor([3.0, 7.0], device=device))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_space_to_depth_copies_bits(dtype: torch.dtype, device: str) -> None:
    for grid, block in (((4, 6), (2, 2)), ((4, 6), (4, 3)), ((3, 8), (1, 4)), ((2, 4, 6), (2, 2, 3)), ((6,), (3,)), ((3, 5), (1, 1))):
        for C in (1, 8, 33):
            x = normal(seeded(C), 2, math.prod(grid), C, dtype=dtype, device=device)
            x[0, 0] = torch.nan
            leaf = x.clone().requires_grad_()
            out = ts.space_to_depth(leaf, grid, block)
            assert_equal(out.detach(), reference.space_to_depth(x, grid, block), f"{grid} {block} C={C}")
            (grad,) = torch.autograd.grad(out, leaf, out.detach())
            assert_equal(grad, x)
    assert_equal(ts.space_to_depth(x, (3, 5), 1), x)


def test_pool_grid_strided_and_unaligned_views(device: str) -> None:
    base = normal(seeded(2), 3, 30, 67, device=device)
    dense = base[1:, 4:28:2, 3:50].contiguous()
    for view in (base[1:, 4:28:2, 3:50], dense.transpose(0, 1).contiguous().transpose(0, 1), dense[:1].expand(2, -1, -1)):
        same = view.contiguous()
        for options in ({"window": 2}, {"size": (2, 3), "kind": "max"}, {"size": (5, 2), "kind": "bilinear"}):
            leaf, other = view.clone(memory_format=torch.preserve_format).requires_grad_(), same.clone().requires_grad_()
            got, want = ts.pool_grid(view, (3, 4), **options), ts.pool_grid(same, (3, 4), **options)  # type: ignore[arg-type]
            assert_equal(got, want)
            grads = [torch.autograd.grad(ts.pool_grid(t, (3, 4), **options), t, got)[0] for t in (leaf, other)]  # type: ignore[arg-type]
            assert_equal(grads[0], grads[1])
        s = normal(seeded(3), 12, 2, device=device).t()
        assert_equal(ts.pool_windows(view, s, (3, 4), 2), ts.pool_windows(same, s.contiguous(), (3, 4), 2))
        assert_equal(ts.space_to_depth(view, (3, 4), (3, 2)), ts.space_to_depth(same, (3, 4), (3, 2)))


def test_pool_grid_empty(device: str) -> None:
    for B, C in ((0, 4), (2, 0), (0, 0)):
        x, s = torch.zeros(B, 12, C, device=device).requires_grad_(), torch.zeros(B, 12, device=device).requires_grad_()
        for options in ({"window": 2}, {"size": (2, 3), "kind": "max"}, {"size": (5, 2), "kind": "bilinear"}):
            out = ts.pool_grid(x, (3, 4), **options)  # type: ignore[arg-type]
            assert out.shape[::2] == (B, C)
            assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
        out = ts.pool_windows(x, s, (3, 4), 2)
        assert [g.shape for g in torch.autograd.grad(out.sum(), (x, s))] == [x.shape, s.shape]
        assert not torch.autograd.grad(ts.pool_windows(x, s, (3, 4), 2).sum(), s)[0].any()
        assert ts.space_to_depth(x, (3, 4), (3, 2)).shape == (B, 2, 6 * C)


def test_pool_grid_gradients_of_gradients(device: str) -> None:
    x = normal(seeded(1), 2, 12, 3, device=device).requires_grad_()
    for options in ({"window": 2, "stride": 1}, {"size": (2, 3)}, {"size": (5, 2), "kind": "bilinear"}, None):

        def run(t: Tensor, options: Any = options) -> Tensor:
            return ts.space_to_depth(t, (3, 4), (3, 2)) if options is None else ts.pool_grid(t, (3, 4), **options)

        (once,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        mine = torch.autograd.grad(once.square().sum(), x)[0]
        matrix = torch.autograd.functional.jacobian(lambda t: run(t).flatten(), x.detach()).flatten(1).double()
        product = 2 * matrix.T @ matrix
        torch.testing.assert_close(mine.flatten().double(), 2 * product @ product @ x.detach().flatten().double(), rtol=1e-4, atol=1e-4)
    out = ts.pool_grid(x, (3, 4), window=2, kind="max")
    with pytest.raises(ValueError, match=r"tokensieve\.pool_grid: gradients of gradients"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_pool_grid_same_bits_at_every_level_and_thread_count() -> None:
    def run() -> Iterator[Tensor]:
        for dtype in FLOATS:
            x = normal(seeded(3), 2, 12 * 11, 345, dtype=dtype).requires_grad_()
            s = normal(seeded(4), 2, 12 * 11).requires_grad_()
            outs = [
                ts.pool_grid(x, (12, 11), size=(5, 4)),
                ts.pool_grid(x, (12, 11), window=3, stride=2, kind="max"),
                ts.pool_grid(x, (12, 11), size=(7, 6), kind="bilinear"),
                ts.pool_windows(x, s, (12, 11), 3, stride=2, temperature=0.3),
                ts.space_to_depth(x, (12, 11), (3, 11)),
            ]
            for out in outs:
                yield from (out, torch.autograd.grad(out, x, out.detach().sin(), retain_graph=True)[0])
            yield torch.autograd.grad(outs[3], s, outs[3].detach().sin())[0]

    on_every_level(run)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_halves_are_rounded_as_in_torch(dtype: torch.dtype, device: str) -> None:
    """Means of any two bit patterns, at every level: subnormals, infinities, NaN, ties between two halves."""
    x = torch.randint(-(2**15), 2**15, (1, 2, 2**16 + 7), generator=seeded(1)).to(torch.int16).view(dtype).to(device)
    x[0, 0, : 2**15], x[0, 1, : 2**15] = x[0, 0, : 2**15].abs(), 0  # exact halves of everything
    want = ((x[:, :1].float() + x[:, 1:].float()) / 2).to(dtype)
    level = torch.ops.tokensieve.cpu_level()
    try:
        for lower in range(torch.ops.tokensieve.best_cpu_level() + 1):
            torch.ops.tokensieve.set_cpu_level(lower)
            assert_equal(ts.pool_grid(x, (2,), window=2), want, f"level {lower}")
    finally:
        torch.ops.tokensieve.set_cpu_level(level)


X, S = torch.zeros(2, 12, 4), torch.zeros(2, 12)
ERRORS: dict[str, tuple[Any, type[Exception]]] = {
    r"pool_grid: x must be a torch.Tensor, got list": (lambda: ts.pool_grid([1], (1,), window=1), TypeError),  # type: ignore[arg-type]
    r"pool_grid: x must be float32 or float16 or bfloat16, got float64": (lambda: ts.pool_grid(X.double(), (12,), window=2), TypeError),
    r"pool_grid: x must be \(B, N, C\), got shape \(2, 12\)": (lambda: ts.pool_grid(S, (12,), window=2), ValueError),
    r"pool_grid: x must be contiguous in its last": (lambda: ts.pool_grid(torch.zeros(2, 4, 12).mT, (12,), window=2), ValueError),
    r"pool_grid: grid must have the N=12 tokens of x, got \(3, 5\)": (lambda: ts.pool_grid(X, (3, 5), window=2), ValueError),
    r"pool_grid: grid must be \(n,\), \(h, w\) or \(t, h, w\), got": (lambda: ts.pool_grid(X, (1, 1, 3, 4), window=1), ValueError),
    r"pool_grid: grid must be at least 1, got \(-3, -4\)": (lambda: ts.pool_grid(X, (-3, -4), window=1), ValueError),
    r"pool_grid: grid must be a sequence of ints, got int": (lambda: ts.pool_grid(X, 12, window=1), TypeError),  # type: ignore[arg-type]
    r"pool_grid: grid must be an int, got float": (lambda: ts.pool_grid(X, (3.0, 4), window=1), TypeError),  # type: ignore[arg-type,list-item]
    r"pool_grid: size or window must be given, and not both, got size=None": (lambda: ts.pool_grid(X, (3, 4)), ValueError),
    r"pool_grid: size or window must be given, and not both, got size=\(1, 1\)": (
        lambda: ts.pool_grid(X, (3, 4), size=(1, 1), window=2),
        ValueError,
    ),
    r"pool_grid: size must be at least 1, got \(0, 1\)": (lambda: ts.pool_grid(X, (3, 4), size=(0, 1)), ValueError),
    r"pool_grid: size must have 2 numbers, one for each axis of grid, got \(2,\)": (lambda: ts.pool_grid(X, (3, 4), size=(2,)), ValueError),
    r"pool_grid: size must be given for kind 'bilinear'": (lambda: ts.pool_grid(X, (3, 4), window=2, kind="bilinear"), ValueError),
    r"pool_grid: kind must be one of 'mean', 'max', 'bilinear', got 'avg'": (
        lambda: ts.pool_grid(X, (3, 4), window=2, kind="avg"),  # type: ignore[arg-type]
        ValueError,
    ),
    r"pool_grid: window must be at most grid=\(3, 4\), got \(4, 4\)": (lambda: ts.pool_grid(X, (3, 4), window=4), ValueError),
    r"pool_grid: window must be at least 1, got \(0, 0\)": (lambda: ts.pool_grid(X, (3, 4), window=0), ValueError),
    r"pool_grid: stride must be at least 1, got \(0, 0\)": (lambda: ts.pool_grid(X, (3, 4), window=2, stride=0), ValueError),
    r"pool_grid: stride must be None without window": (lambda: ts.pool_grid(X, (3, 4), size=(1, 1), stride=2), ValueError),
    r"pool_grid: within must be None without size": (lambda: ts.pool_grid(X, (3, 4), window=2, within=(3, 2)), ValueError),
    r"pool_grid: within must be None for kind 'bilinear'": (
        lambda: ts.pool_grid(X, (3, 4), size=(2, 2), within=(3, 2), kind="bilinear"),
        ValueError,
    ),
    r"pool_grid: within must divide grid=\(3, 4\), got \(3, 3\)": (lambda: ts.pool_grid(X, (3, 4), size=(2, 2), within=(3, 3)), ValueError),
    r"pool_grid: size must give every part of \(3, 2\) tokens as many outputs, got \(2, 3\)": (
        lambda: ts.pool_grid(X, (3, 4), size=(2, 3), within=(3, 2)),
        ValueError,
    ),
    r"pool_windows: scores must be float32, got float64": (lambda: ts.pool_windows(X, S.double(), (3, 4), 2), TypeError),
    r"pool_windows: scores must be \(B, N\) = \(2, 12\), got shape \(2, 4\)": (
        lambda: ts.pool_windows(X, S[:, :4], (3, 4), 2),
        ValueError,
    ),
    r"pool_windows: temperature must be above 0, got 0": (lambda: ts.pool_windows(X, S, (3, 4), 2, temperature=0), ValueError),
    r"pool_windows: temperature must be above 0, got nan": (lambda: ts.pool_windows(X, S, (3, 4), 2, temperature=math.nan), ValueError),
    r"pool_windows: window must be at most grid": (lambda: ts.pool_windows(X, S, (3, 4), (1, 5)), ValueError),
    r"space_to_depth: grid must be multiples of block=2, got \(3, 4\)": (lambda: ts.space_to_depth(X, (3, 4)), ValueError),
    r"space_to_depth: block must be at least 1, got \(0, 0\)": (lambda: ts.space_to_depth(X, (3, 4), 0), ValueError),
    r"space_to_depth: block must be a sequence of ints, got str": (lambda: ts.space_to_depth(X, (3, 4), "2"), TypeError),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("message", ERRORS)
def test_pool_grid_refuses(message: str) -> None:
    call, error = ERRORS[message]
    with pytest.raises(error, match=rf"^tokensieve\.{message}"):
        call()
