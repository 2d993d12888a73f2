"""merge_tokens against sums row by row in float64, copies bit for bit, and the gradients of all modes."""

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
from reference.merge import Plan, random_plan
from same_bits import on_every_level
from torch import Tensor

MODES = ("mean", "weighted", "sum", "amax", "mlerp")
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def check(tensors: list[Tensor], plan: Plan, size: Tensor | None = None, mode: str = "mean", what: str = "") -> None:
    got = ts.merge_tokens(tensors, plan, size=size, mode=mode)
    want, total = reference.merge_tokens([t.cpu() for t in tensors], Plan(plan.index.cpu(), plan.inverse.cpu()), size, mode)
    what = f"{what} {mode}"
    for i, (g, w, t) in enumerate(zip(got.tensors, want, tensors, strict=True)):
        assert g.dtype == t.dtype
        assert g.is_contiguous()
        if t.is_floating_point():
            near = ROUNDING[t.dtype] * max(1.0, float(w.abs().max()) if w.numel() else 0.0) * (1 if mode != "mlerp" else 2)
            torch.testing.assert_close(g.double().cpu(), w, rtol=ROUNDING[t.dtype], atol=near, msg=lambda m, i=i: f"tensor {i} {what}: {m}")
        else:
            assert_equal(g.cpu(), w, f"tensor {i} {what}")
    assert got.size.dtype == got.log_size.dtype == torch.float32
    torch.testing.assert_close(got.size.double().cpu(), total, rtol=1e-6, atol=1e-6, msg=lambda m: f"size {what}: {m}")
    torch.testing.assert_close(
        got.log_size.double().cpu(), total.clamp(min=0).log(), rtol=1e-5, atol=1e-6, msg=lambda m: f"log {what}: {m}"
    )


def sizes(seed: int, B: int, N: int, device: str) -> Tensor:
    return torch.randint(1, 5, (B, N), generator=seeded(seed)).float().to(device)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_tokens_widths(dtype: torch.dtype, mode: str, device: str) -> None:
    for C in (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 100, 1023, 1040):
        plan = random_plan(seeded(C), 2, 23, 9, 0.1, device)
        check([normal(seeded(C), 2, 23, C, dtype=dtype, device=device)], plan, sizes(C, 2, 23, device), mode, f"C={C} {dtype}")


@pytest.mark.parametrize("mode", MODES)
def test_merge_tokens_several_tensors_and_layouts(mode: str, device: str) -> None:
    plan, size = random_plan(seeded(3), 3, 20, 8, 0.1, device), sizes(4, 3, 20, device)
    heads = normal(seeded(5), 3, 4, 20, 16, device=device).transpose(1, 2)
    wide = normal(seeded(6), 6, 40, 41, device=device)
    tensors = [heads, wide[::2, ::2, 1:], wide[:1, :20].expand(3, -1, -1), wide[:3, :1].expand(-1, 20, -1), wide[:3, :20, 7]]
    tensors += [heads.half(), normal(seeded(7), 3, 20, 5, dtype=torch.bfloat16, device=device), heads.contiguous()[..., 3:], heads[..., 0]]
    if mode in ("sum", "amax"):
        tensors += [torch.randint(-9, 9, (3, 20, *shape), device=device) for shape in ((), (3,), (2, 5))]
        tensors.append(torch.randint(-(2**31), 2**31 - 1, (3, 20, 3), device=device, dtype=torch.int32))
    check(tensors, plan, size, mode)
    check(tensors[:1], plan, size[..., None].expand(3, 20, 2)[..., :1], mode, "a strided (B, N, 1) size")
    assert isinstance(ts.merge_tokens(heads, plan).tensors, Tensor)
    assert isinstance(ts.merge_tokens([heads], plan).tensors, tuple)


def test_merge_tokens_rows_of_one_token_are_copies(device: str) -> None:
    x = normal(seeded(1), 2, 9, 33, device=device)
    x[0, 3, :3] = torch.tensor([torch.nan, -torch.inf, -0.0])
    order = torch.stack([torch.randperm(9, generator=seeded(b)) for b in range(2)]).to(device)
    plan = Plan(order, order.argsort(1))
    for mode in MODES:
        for size in (None, torch.full((2, 9), 0.3, device=device), torch.zeros(2, 9, device=device)):
            got = ts.merge_tokens(x, plan, size=size, mode=mode).tensors
            assert_equal(got.view(torch.int32), ts.gather_tokens(x, order).view(torch.int32), mode)


def test_merge_tokens_fixed_order_own_token_first(device: str) -> None:
    """1e8 + 1 - 1e8 in float32 depends on the order: own token, then ascending."""
    x = torch.tensor([[[1.0], [1e8], [-1e8], [7.0]]], device=device)
    inverse = torch.tensor([[0, 0, 0, 1]], device=device)
    for own, want in ((0, 0.0), (1, 0.0), (2, 1.0)):  # (1 + 1e8) - 1e8, (1e8 + 1) - 1e8, (-1e8 + 1) + 1e8 = -1e8 + 1e8 ... in order
        tokens = [own, *(n for n in range(3) if n != own)]
        total = torch.zeros((), device=device)
        for n in tokens:
            total = total + x[0, n, 0]
        got = ts.merge_tokens(x, Plan(torch.tensor([[own, 3]], device=device), inverse), mode="sum").tensors
        assert float(got[0, 0, 0]) == float(total), (own, want)


def test_merge_tokens_nothing_merged_everything_merged_and_empty_rows(device: str) -> None:
    x = normal(seeded(1), 2, 6, 5, device=device)
    one = Plan(torch.full((2, 1), 5, device=device), torch.zeros(2, 6, dtype=torch.int64, device=device))
    for mode in MODES:
        check([x], one, sizes(1, 2, 6, device), mode, "one row")
        check(
            [x],
            Plan(torch.tensor([[-1, 2, -1]] * 2, device=device), torch.tensor([[-1, -1, 1, 1, 2, 2]] * 2, device=device)),
            None,
            mode,
            "no own",
        )
    got = ts.merge_tokens(
        x,
        Plan(
            torch.tensor([[-1, 2, -1]] * 2, device=device),
            torch.full((2, 6), -1, device=device).index_fill_(1, torch.tensor(2, device=device), 1),
        ),
    )
    assert_equal(got.tensors[:, [0, 2]], torch.zeros(2, 2, 5, device=device))
    assert_equal(got.log_size[:, [0, 2]], torch.full((2, 2), -torch.inf, device=device))


@pytest.mark.parametrize(("B", "N", "M"), [(0, 5, 3), (2, 5, 0), (0, 0, 0), (2, 0, 0), (1, 1, 1)])
def test_merge_tokens_empty(B: int, N: int, M: int, device: str) -> None:
    plan = Plan(
        torch.arange(M, device=device).repeat(B, 1),
        torch.where(torch.arange(N, device=device) < M, torch.arange(N, device=device), -1).repeat(B, 1),
    )
    for C in (4, 0):
        for mode in MODES:
            x = torch.ones(B, N, C, device=device).requires_grad_()
            got = ts.merge_tokens(x, plan, mode=mode)
            assert got.tensors.shape == (B, M, C)
            assert got.size.shape == got.log_size.shape == (B, M)
            got.tensors.sum().backward()
            assert x.grad is not None
            assert x.grad.shape == x.shape
            assert int(x.grad.count_nonzero()) == B * M * C
            assert ts.unmerge_tokens(got.tensors, plan).shape == (B, N, C)


def test_merge_tokens_special_values(device: str) -> None:
    x = torch.tensor([[[torch.nan, torch.inf, -0.0, 1.0], [1.0, -torch.inf, 0.0, 2.0], [3.0, 1.0, 0.0, 4.0]]], device=device)
    plan = Plan(torch.tensor([[1]], device=device), torch.zeros(1, 3, dtype=torch.int64, device=device))
    assert_equal(ts.merge_tokens(x, plan, mode="amax").tensors, torch.tensor([[[torch.nan, torch.inf, 0.0, 4.0]]], device=device))
    assert_equal(ts.merge_tokens(x, plan).tensors, torch.tensor([[[torch.nan, torch.nan, 0.0, 7 / 3]]], device=device))
    zero = torch.zeros(1, 3, 4, device=device)
    zero[0, 0] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    assert_equal(ts.merge_tokens(zero, plan, mode="mlerp").tensors, zero[:, :1] / 3)  # a destination of norm 0: the plain mean
    size = torch.tensor([[2.0, -1.0, -1.0]], device=device)
    got = ts.merge_tokens(torch.ones(1, 3, 4, device=device), plan, size=size, mode="weighted")
    assert_equal(got.tensors, torch.zeros(1, 1, 4, device=device))  # sizes that add up to 0
    assert_equal(got.size, torch.zeros(1, 1, device=device))
    assert_equal(got.log_size, torch.full((1, 1), -torch.inf, device=device))
    got = ts.merge_tokens(x, plan, size=torch.tensor([[-5.0, 1.0, 1.0]], device=device))
    assert float(got.log_size) == -torch.inf  # a negative size: no NaN


def test_merge_tokens_half_precision_overflows_only_when_stored(device: str) -> None:
    x = torch.full((1, 4, 3), 40000.0, dtype=torch.float16, device=device)
    plan = Plan(torch.tensor([[0]], device=device), torch.zeros(1, 4, dtype=torch.int64, device=device))
    assert_equal(ts.merge_tokens(x, plan).tensors, x[:, :1])
    assert_equal(ts.merge_tokens(x, plan, size=torch.full((1, 4), 1000.0, device=device), mode="weighted").tensors, x[:, :1])
    assert_equal(ts.merge_tokens(x, plan, mode="sum").tensors, torch.full_like(x[:, :1], torch.inf))


def test_merge_tokens_same_bits_at_every_level_and_thread_count() -> None:
    plan, size = random_plan(seeded(1), 2, 200, 60, 0.1), sizes(2, 2, 200, "cpu")
    few = random_plan(seeded(1), 1, 400, 1)

    def run() -> Iterator[Tensor]:
        for dtype in FLOATS:
            x = normal(seeded(1), 2, 200, 131, dtype=dtype).requires_grad_()
            long = normal(seeded(2), 1, 400, 1500, dtype=dtype)
            for mode in MODES:
                got = ts.merge_tokens(x, plan, size=size, mode=mode)
                (grad,) = torch.autograd.grad(got.tensors, x, normal(seeded(3), 2, 60, 131, dtype=dtype))
                yield from (got.tensors, got.size, got.log_size, grad, ts.merge_tokens(long, few, mode=mode).tensors)

    on_every_level(run)


# ---- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_merge_tokens_gradients_match_autograd(dtype: torch.dtype, mode: str, device: str) -> None:
    plan, size = random_plan(seeded(3), 2, 30, 11, 0.1, device), sizes(4, 2, 30, device)
    x, h = normal(seeded(5), 2, 30, 37, dtype=dtype, device=device), normal(seeded(6), 2, 4, 30, 16, dtype=dtype, device=device)
    outer = normal(seeded(7), 2, 11, 37, dtype=dtype, device=device), normal(seeded(8), 2, 11, 4, 16, dtype=dtype, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, h)]
    got = ts.merge_tokens([leaves[0], leaves[1].transpose(1, 2)], plan, size=size, mode=mode).tensors
    mine = torch.autograd.grad(got, leaves, outer)
    truth = [t.double().cpu().requires_grad_() for t in (x, h)]
    cpu = Plan(plan.index.cpu(), plan.inverse.cpu())
    want, _ = reference.merge_tokens([truth[0], truth[1].transpose(1, 2)], cpu, size, mode)
    theirs = torch.autograd.grad(want, truth, [o.double().cpu() for o in outer])
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double().cpu(), b, rtol=4 * ROUNDING[dtype], atol=4 * ROUNDING[dtype])


def test_merge_tokens_amax_gradient_goes_to_the_lowest_token(device: str) -> None:
    x = torch.tensor([[[1.0, torch.nan], [2.0, torch.nan], [2.0, 5.0], [2.0, 0.0]]], device=device).requires_grad_()
    plan = Plan(torch.tensor([[3]], device=device), torch.zeros(1, 4, dtype=torch.int64, device=device))  # the own token is the last
    ts.merge_tokens(x, plan, mode="amax").tensors.sum().backward()
    assert_equal(x.grad, torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], device=device))


def test_merge_tokens_mlerp_gradient_at_zero_norms(device: str) -> None:
    plan = Plan(torch.tensor([[1]], device=device), torch.zeros(1, 2, dtype=torch.int64, device=device))
    for x in (torch.zeros(1, 2, 3, device=device), torch.tensor([[[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]], device=device)):
        x.requires_grad_()
        ts.merge_tokens(x, plan, mode="mlerp").tensors.sum().backward()
        assert_equal(x.grad, torch.full((1, 2, 3), 0.5, device=device))


@pytest.mark.filterwarnings("ignore:Input #")
def test_merge_tokens_gradcheck(device: str) -> None:
    plan, size = random_plan(seeded(1), 2, 6, 3, 0.2, device), sizes(2, 2, 6, device)
    x = normal(seeded(3), 2, 6, 3, device=device).requires_grad_()
    options = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-3}  # linear: a large step has no error but float32's
    for mode in ("mean", "weighted", "sum"):
        merge = lambda x, mode=mode: ts.merge_tokens(x, plan, size=size, mode=mode).tensors  # noqa: E731
        assert torch.autograd.gradcheck(merge, (x,), **options)
        assert torch.autograd.gradgradcheck(merge, (x,), **options)
    apart = torch.randperm(36, generator=seeded(4)).view(2, 6, 3).float().to(device).requires_grad_()  # no two values close: amax is smooth
    amax = lambda x: ts.merge_tokens(x, plan, mode="amax").tensors  # noqa: E731
    assert torch.autograd.gradcheck(amax, (apart,), **options)
    assert torch.autograd.gradgradcheck(amax, (apart,), **options)
    rows = normal(seeded(5), 2, 3, 4, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ts.unmerge_tokens(x, plan), (rows,), **options)
    assert torch.autograd.gradgradcheck(lambda x: ts.unmerge_tokens(x, plan), (rows,), **options)
    mlerp = ts.merge_tokens(x, plan, mode="mlerp").tensors.sum()
    with pytest.raises(ValueError, match="merge_tokens: mode must not be 'mlerp' where gradients of gradients"):
        torch.autograd.grad(mlerp, x, create_graph=True)


def test_merge_tokens_gradients_only_where_asked(device: str) -> None:
    plan = random_plan(seeded(1), 1, 6, 3, 0.0, device)
    x, y = (normal(seeded(s), 1, 6, 3, device=device) for s in (1, 2))
    got = ts.merge_tokens([x.requires_grad_(), y, torch.arange(6, device=device)[None]], plan, mode="amax")
    assert got.tensors[0].requires_grad
    assert not got.tensors[2].requires_grad
    assert not got.size.requires_grad
    got.tensors[0].sum().backward()
    assert y.grad is None
    z = y.clone().requires_grad_()
    first, _ = ts.merge_tokens([x, z], plan).tensors
    first.sum().backward()
    assert z.grad is None or not z.grad.any()
    with torch.no_grad():
        assert not ts.merge_tokens(x, plan).tensors.requires_grad


# ---- the other rules ------------------------------------------------------------------------------------------------------


def test_merge_tokens_fuzz(device: str) -> None:
    for seed in range(60):
        g = seeded(seed)
        B, N = log_uniform(g, 1, 4), log_uniform(g, 1, 60)
        M = integer(g, 1, N)
        plan = random_plan(g, B, N, M, 0.3 if integer(g, 0, 1) else 0.0, device)
        mode = MODES[integer(g, 0, 4)]
        size = sizes(seed, B, N, device) if integer(g, 0, 1) else None
        tensors = []
        for _ in range(integer(g, 1, 9)):
            H, C = log_uniform(g, 1, 5), log_uniform(g, 1, 70)
            t = torch.randn(B, H, N, C, generator=g).to(FLOATS[integer(g, 0, 2)]).to(device).transpose(1, 2)
            tensors.append(t if integer(g, 0, 1) else t.contiguous())
        check(tensors, plan, size, mode, f"seed {seed}")


def test_merge_tokens_opcheck(device: str) -> None:
    plan, size = random_plan(seeded(1), 2, 8, 5, 0.2, device), sizes(1, 2, 8, device)
    ids = torch.arange(16, device=device).view(2, 8)
    ops = torch.ops.tokensieve
    for dtype in FLOATS:
        x, y = normal(seeded(4), 2, 8, 6, dtype=dtype, device=device), normal(seeded(5), 2, 5, 6, dtype=dtype, device=device)
        for mode in range(5):
            torch.library.opcheck(ops.merge_tokens, ([x.clone().requires_grad_()], *plan, size, mode))
            torch.library.opcheck(ops.merge_tokens_backward, ([y], [x], [y] if mode == 3 else [], *plan, size, mode))
        torch.library.opcheck(ops.merge_tokens, ([x, ids], *plan, None, 3))
        torch.library.opcheck(ops.unmerge_tokens, ([y.clone().requires_grad_(), ids[:, :5]], plan.inverse))
        torch.library.opcheck(ops.unmerge_tokens_backward, ([x.clone().requires_grad_()], plan.inverse, 5))


def test_merge_tokens_compiles_with_gradients(device: str) -> None:
    def layer(x: Tensor, index: Tensor, inverse: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        plan = Plan(index, inverse)
        merged = ts.merge_tokens(x * 2, plan, size=size, mode="weighted")
        return (ts.unmerge_tokens(merged.tensors.sin(), plan) + merged.log_size.sum()).sum(), ts.trace_tokens(inverse * 0, plan)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, N, M in ((2, 12, 7), (3, 17, 9), (4, 30, 11)):
        plan, size = random_plan(seeded(N), B, N, M, 0.1, device), sizes(N, B, N, device)
        grads = []
        for run in (layer, compiled):
            x = normal(seeded(B), B, N, 5, device=device).requires_grad_()
            loss, _ = run(x, *plan, size)
            loss.backward()
            grads.append((loss.detach(), x.grad))
        torch.testing.assert_close(*grads)


X = torch.zeros(2, 6, 4)
PLAN = Plan(torch.tensor([[1, 3, 5]] * 2), torch.tensor([[0, 0, 1, 1, -1, 2]] * 2))
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "mode": (lambda: ts.merge_tokens(X, PLAN, mode="prune"), ValueError, r"mode must be one of 'mean', 'weighted', .* got 'prune'"),
    "plan": (lambda: ts.merge_tokens(X, None), TypeError, r"plan must be a MergePlan \(with index and inverse\), got NoneType"),
    "plan N": (lambda: ts.merge_tokens(X[:, :5], PLAN), ValueError, r"plan must be of the N=5 tokens of tensors, got one of 6 tokens"),
    "plan M": (
        lambda: ts.merge_tokens(X, Plan(PLAN.index[:, :2], PLAN.inverse)),
        ValueError,
        r"plan.inverse must be in \[-1, M=2\), got 2 at \(0, 5\)",
    ),
    "index range": (
        lambda: ts.merge_tokens(X, Plan(PLAN.index + 1, PLAN.inverse)),
        ValueError,
        r"index must be in \[-1, N=6\), got 6 at \(0, 2\)",
    ),
    "index inverse": (
        lambda: ts.merge_tokens(X, Plan(PLAN.index - 1, PLAN.inverse)),
        ValueError,
        r"plan must have inverse\[index\[row\]\] == row, got token 4 of row 2 in -1",
    ),
    "inverse low": (
        lambda: ts.merge_tokens(X, Plan(PLAN.index, PLAN.inverse - 1)),
        ValueError,
        r"plan.inverse must be in \[-1, M=3\), got -2 at \(0, 4\)",
    ),
    "inverse dtype": (
        lambda: ts.merge_tokens(X, Plan(PLAN.index, PLAN.inverse.int())),
        TypeError,
        r"plan.inverse must be int64, got int32",
    ),
    "index batch": (
        lambda: ts.merge_tokens(X, Plan(PLAN.index[:1], PLAN.inverse)),
        ValueError,
        r"plan.index must be \(B=2, M\), got shape \(1, 3\)",
    ),
    "batch": (lambda: ts.merge_tokens(X[:1], PLAN), ValueError, r"tensors\[0\] must be \(B=2, N=6, ...\), got shape \(1, 6, 4\)"),
    "numpy": (lambda: ts.merge_tokens([X, np.zeros((2, 6))], PLAN), TypeError, r"tensors\[1\] must be a torch.Tensor, got ndarray"),
    "none": (lambda: ts.merge_tokens([], PLAN), ValueError, r"tensors must hold at least one tensor, got none"),
    "double": (lambda: ts.merge_tokens(X.double(), PLAN), TypeError, r"tensors\[0\] must be float32 or float16 or bfloat16, got float64"),
    "ids": (
        lambda: ts.merge_tokens([X, X[..., 0].long()], PLAN),
        TypeError,
        r"tensors\[1\] must be float32 .* in mode 'mean', got .*; take their rows",
    ),
    "bool": (lambda: ts.merge_tokens(X > 0, PLAN, mode="amax"), TypeError, r"tensors\[0\] must be .* or int32 or int64, got bool"),
    "size shape": (
        lambda: ts.merge_tokens(X, PLAN, size=torch.ones(2, 3)),
        ValueError,
        r"size must be \(B, N\) = \(2, 6\) or \(2, 6, 1\), got shape \(2, 3\)",
    ),
    "size dtype": (lambda: ts.merge_tokens(X, PLAN, size=torch.ones(2, 6).half()), TypeError, r"size must be float32, got float16"),
    "size type": (lambda: ts.merge_tokens(X, PLAN, size=1.0), TypeError, r"size must be a torch.Tensor, got float"),
    "strides": (
        lambda: ts.merge_tokens(torch.zeros(2, 6, 4, 4, 4)[..., ::2, ::2], PLAN),
        ValueError,
        r"tensors\[0\] must have at most one strided axis",
    ),
    "device": (
        lambda: ts.merge_tokens(X.to("meta"), PLAN),
        ValueError,
        r"tensors\[0\] must be on the device of plan.inverse \(cpu\), got meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_merge_tokens_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=rf"^tokensieve\.merge_tokens: ({message})"):
        call()


def test_merge_tokens_debug_checks() -> None:
    with ts.debug_checks():
        with pytest.raises(ValueError, match=r"merge_tokens: size must be greater than 0 \(debug check\), got 0"):
            ts.merge_tokens(X, PLAN, size=torch.tensor([[1.0] * 6, [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]]))
        with pytest.raises(ValueError, match=r"merge_tokens: plan must have inverse\[index\[row\]\] == row, got token 4 of row 2 in -1"):
            ts.merge_tokens(X, Plan(PLAN.index - 1, PLAN.inverse))
        ts.merge_tokens(X, PLAN)


def test_merge_tokens_meta_and_tangents() -> None:
    got = ts.merge_tokens(X.to("meta"), Plan(PLAN.index.to("meta"), PLAN.inverse.to("meta")))
    assert got.tensors.shape == (2, 3, 4)
    assert got.size.shape == (2, 3)
    with pytest.raises(ValueError, match=r"tokensieve\.merge_tokens: tensors must carry no forward-mode tangent"):
        torch.func.jvp(lambda t: ts.merge_tokens(t, PLAN).tensors, (X,), (X,))
