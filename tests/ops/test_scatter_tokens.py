"""scatter_tokens: replaced rows are copied bits, added rows are one rounding in float32; and the gradients to all three."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tokensieve as ts
import torch
from ops.test_gather_tokens import DTYPES, make, unique_index
from reference.compare import assert_equal
from reference.inputs import FLOATS, integer, log_uniform, normal, seeded
from reference.ops import scatter_tokens as reference
from same_bits import on_every_level
from torch import Tensor


def check(tensors: list[Tensor], index: Tensor, values: list[Tensor], what: str = "", **options: Any) -> None:
    got = ts.scatter_tokens(tensors, index, values, **options)
    for i, (g, w) in enumerate(zip(got, reference(tensors, index, values, **options), strict=True)):
        assert_equal(g, w, f"tensor {i}: {what} {g.dtype} {options.get('mode')}")
        assert g.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scatter_tokens_replaces_bits(dtype: torch.dtype, device: str) -> None:
    for C in (1, 2, 3, 7, 8, 16, 17, 33, 64, 100, 257):
        x, y = make(C, 2, 50, C, dtype=dtype, device=device), make(C + 1, 2, 19, C, dtype=dtype, device=device)
        check([x], unique_index(C, 2, 50, 19, device, unused=True), [y], f"C={C}")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scatter_tokens_adds_with_one_rounding_in_float32(dtype: torch.dtype, weighted: bool, device: str) -> None:
    for C in (1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 100, 257):
        x, y = normal(seeded(C), 2, 30, C, dtype=dtype, device=device), normal(seeded(C + 1), 2, 9, C, dtype=dtype, device=device)
        weights = normal(seeded(C + 2), 2, 9, device=device) if weighted else None
        check([x], unique_index(C, 2, 30, 9, device, unused=True), [y], f"C={C}", mode="add", weights=weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scatter_tokens_rounds_every_float_as_torch_does(dtype: torch.dtype, device: str) -> None:
    """Sums over the whole exponent range, beside halfway cases, infinities, NaN and subnormals."""
    bits = torch.randint(-(2**31), 2**31, (1, 1, 200_003), generator=seeded(1)).to(torch.int32)
    bits[0, 0, :30_000] &= ~0x0FFF  # many exact halves of float16
    bits[0, 0, 30_000:60_000] &= ~0x7FFF  # and of bfloat16
    weights = torch.ones(1, 1, device=device)
    for other in (0.0, 1e-8, 70000.0):
        x = bits.view(torch.float32).to(dtype).to(device)
        y = bits.flip(2).view(torch.float32).mul(2.0**-3).to(dtype).to(device) + other
        got = ts.scatter_tokens(x, torch.zeros(1, 1, dtype=torch.int64, device=device), y.to(dtype), mode="add", weights=weights)
        assert_equal(got, (x.float() + y.to(dtype).float()).to(dtype), f"{dtype} + {other}")


def test_scatter_tokens_several_tensors_and_layouts(device: str) -> None:
    index = unique_index(8, 3, 40, 11, device, unused=True)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((48,), torch.bfloat16),
        ((), torch.int64),
        ((4, 16), torch.float16),
        ((), torch.bool),
        ((5,), torch.float64),
        ((3,), torch.complex128),
        ((4, 16), torch.float32),
        ((7,), torch.uint8),
        ((2,), torch.float32),
    ]
    tensors = [make(i, 3, 40, *s, dtype=d, device=device) for i, (s, d) in enumerate(shapes)]
    values = [make(i + 20, 3, 11, *s, dtype=d, device=device) for i, (s, d) in enumerate(shapes)]
    heads = make(50, 3, 4, 40, 16, device=device).transpose(1, 2), make(51, 3, 4, 11, 16, device=device).transpose(1, 2)
    tensors[6], plain = heads[0], values[6]
    check(tensors, index, values)  # a transposed base with whole values
    values[6] = heads[1]
    check(tensors, index, values)
    tensors[6] = plain.repeat(1, 4, 1, 1)[:, :40]
    check(tensors, index, values)  # and the other way round
    check([heads[0], tensors[6]], index, [plain, heads[1]], mode="add", weights=normal(seeded(1), 3, 11, device=device))
    wide = make(52, 6, 80, 41, device=device)
    views = [wide[::2, ::2, 1:], wide[:3, :40, 3:30], wide[:1, :40].expand(3, -1, -1), wide[:3, :1].expand(-1, 40, -1), wide[:3, :40, 7]]
    for view in views:
        y = make(53, 3, 11, *view.shape[2:], device=device)
        check([view], index, [y], f"{view.stride()}")
        check([view], index, [y], f"{view.stride()}", mode="add", weights=normal(seeded(2), 3, 22, device=device)[:, ::2])
    one = unique_index(3, 1, 40, 9, device)
    check([wide[:3, :40]], one.expand(3, -1), [wide[3:6, 40:49]])


@pytest.mark.parametrize("count", [1, 8, 9, 17])
def test_scatter_tokens_any_number_of_tensors(count: int, device: str) -> None:
    index = unique_index(1, 2, 30, 12, device)
    tensors = [normal(seeded(i), 2, 30, 1 + i, device=device) for i in range(count)]
    values = [normal(seeded(i + 40), 2, 12, 1 + i, device=device) for i in range(count)]
    check(tensors, index, values)
    check(tensors, index, values, mode="add", weights=normal(seeded(99), 2, 12, device=device))


def test_scatter_tokens_inverts_gather(device: str) -> None:
    x, index = make(1, 3, 300, 40, device=device), unique_index(2, 3, 300, 120, device, unused=True)
    assert_equal(ts.scatter_tokens(x, index, ts.gather_tokens(x, index)), x)
    assert_equal(
        ts.gather_tokens(ts.scatter_tokens(x, index, (y := make(3, 3, 120, 40, device=device))), index), y * (index >= 0)[..., None]
    )
    assert isinstance(ts.scatter_tokens([x], index, [y]), tuple)


@pytest.mark.parametrize(("B", "N", "K"), [(0, 5, 3), (2, 5, 0), (0, 0, 0), (2, 0, 0), (1, 1, 1), (2, 0, 3)])
def test_scatter_tokens_empty(B: int, N: int, K: int, device: str) -> None:
    index = torch.arange(K, device=device).repeat(B, 1) if N else torch.full((B, K), -1, device=device)
    for C in (4, 0):
        x, y = torch.ones(B, N, C, device=device), torch.full((B, K, C), 2.0, device=device)
        for options in ({}, {"mode": "add"}, {"mode": "add", "weights": torch.ones(B, K, device=device)}):
            got = ts.scatter_tokens(x, index, y, **options)
            assert got.shape == x.shape
            assert int((got > 1).sum()) == (B * K * C if N else 0)


def test_scatter_tokens_leaves_its_arguments(device: str) -> None:
    x, y, index = make(1, 2, 20, 9, device=device), make(2, 2, 8, 9, device=device), unique_index(2, 2, 20, 8, device)
    before = x.clone(), y.clone(), index.clone()
    ts.scatter_tokens(x, index, y).fill_(-7.0)
    ts.scatter_tokens(x, index, y, mode="add").fill_(-7.0)
    for now, then in zip((x, y, index), before, strict=True):
        assert_equal(now, then)


def test_scatter_tokens_same_bits_at_every_level_and_thread_count() -> None:
    def run() -> Iterator[Tensor]:
        for dtype in FLOATS:
            x, y = normal(seeded(1), 2, 300, 131, dtype=dtype), normal(seeded(2), 2, 90, 131, dtype=dtype)
            w, index = normal(seeded(3), 2, 90), unique_index(4, 2, 300, 90)
            yield ts.scatter_tokens(x, index, y, mode="add", weights=w)
            of_values, of_weights = torch.ops.tokensieve.scatter_tokens_backward([x], index, [y], w, True, True)
            yield from (of_values[0], of_weights)

    on_every_level(run)


# ---- gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["replace", "add", "weighted"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scatter_tokens_gradients_match_autograd(dtype: torch.dtype, mode: str, device: str) -> None:
    index = unique_index(3, 3, 40, 13, device, unused=True)
    x, y = normal(seeded(4), 3, 40, 37, dtype=dtype, device=device), normal(seeded(5), 3, 13, 37, dtype=dtype, device=device)
    h, z = normal(seeded(6), 3, 4, 40, 16, dtype=dtype, device=device), normal(seeded(7), 3, 4, 13, 16, dtype=dtype, device=device)
    w = normal(seeded(8), 3, 13, device=device)
    outer = normal(seeded(9), 3, 40, 37, dtype=dtype, device=device), normal(seeded(10), 3, 40, 4, 16, dtype=dtype, device=device)
    grads = []
    for scatter in (ts.scatter_tokens, reference):
        leaves = [t.clone().requires_grad_() for t in (x, y, h, z, w)]
        options: dict[str, Any] = {} if mode == "replace" else {"mode": "add", "weights": leaves[4] if mode == "weighted" else None}
        a, b = scatter([leaves[0], leaves[2].transpose(1, 2)], index, [leaves[1], leaves[3].transpose(1, 2)], **options)
        ((a * outer[0]).sum() + (b * outer[1]).sum()).backward()
        grads.append([t.grad for t in leaves])
    for i, (mine, theirs) in enumerate(zip(*grads, strict=True)):
        if theirs is None:
            assert mine is None
        elif i == 4:
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 5e-3)
        else:
            assert_equal(mine, theirs, f"leaf {i}")


@pytest.mark.filterwarnings("ignore:Input #")
def test_scatter_tokens_gradcheck(device: str) -> None:
    index = torch.tensor([[4, -1, 0], [1, 2, 3]], device=device)
    x = normal(seeded(1), 2, 5, 3, dtype=torch.float64, device=device).requires_grad_()
    y = normal(seeded(2), 2, 3, 3, dtype=torch.float64, device=device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: ts.scatter_tokens(x, index, y), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: ts.scatter_tokens(x, index, y), (x, y))
    x, y, w = (t.detach().float().requires_grad_() for t in (x, y, normal(seeded(3), 2, 3, device=device)))
    options = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-3}  # linear in each: a large step has no error but float32's
    add = lambda x, y, w: ts.scatter_tokens(x, index, y, mode="add", weights=w)  # noqa: E731
    assert torch.autograd.gradcheck(add, (x, y, w), **options)
    assert torch.autograd.gradgradcheck(add, (x, y, w), **options)
    assert torch.autograd.gradcheck(lambda x, y: ts.scatter_tokens(x, index, y, mode="add"), (x, y), **options)


def test_scatter_tokens_gradients_only_where_asked(device: str) -> None:
    x, y, w = normal(seeded(1), 1, 6, 3, device=device), normal(seeded(2), 1, 2, 3, device=device), torch.ones(1, 2, device=device)
    index = torch.tensor([[5, 1]], device=device)
    for wanted in range(1, 8):
        leaves = [t.clone().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate((x, y, w))]
        ts.scatter_tokens(leaves[0], index, leaves[1], mode="add", weights=leaves[2]).sum().backward()
        assert [t.grad is not None for t in leaves] == [bool(wanted >> i & 1) for i in range(3)]
        for leaf, want in zip(leaves, (torch.ones_like(x), torch.ones_like(y), y.sum(2)), strict=True):
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad, want)
    a, ids = ts.scatter_tokens([x.requires_grad_(), x.long()], index, [y, y.long()])
    assert a.requires_grad
    assert not ids.requires_grad
    with torch.no_grad():
        assert not ts.scatter_tokens(x, index, y).requires_grad


def test_scatter_tokens_gradient_where_one_output_is_unused(device: str) -> None:
    x, z = (normal(seeded(s), 1, 6, 3, device=device).requires_grad_() for s in (1, 2))
    w = torch.full((1, 2), 2.0, device=device).requires_grad_()
    y, index = normal(seeded(3), 1, 2, 3, device=device), torch.tensor([[5, -1]], device=device)
    first, _ = ts.scatter_tokens([x, z], index, [y, y], mode="add", weights=w)
    first.sum().backward()
    assert bool((x.grad == 1).all())
    assert z.grad is None or not z.grad.any()
    torch.testing.assert_close(w.grad, torch.stack([y[0, 0].sum(), torch.zeros((), device=device)])[None])


def test_scatter_tokens_mixture_of_depths_step_learns_the_router(device: str) -> None:
    """Gather, a block, add back with the router's weight: the gradient reaches the router as sum(y * grad)."""
    x, router = normal(seeded(1), 2, 20, 8, device=device), normal(seeded(2), 8, device=device).requires_grad_()
    block = torch.nn.Linear(8, 8).to(device)
    scores = x @ router
    index = ts.select_topk(scores.detach(), 5)
    out = ts.scatter_tokens(x, index, y := block(ts.gather_tokens(x, index)), mode="add", weights=scores.gather(1, index))
    out.square().sum().backward()
    upstream = (2 * out.detach()).gather(1, index[..., None].expand(-1, -1, 8))
    want = (ts.gather_tokens(x, index) * (upstream * y.detach()).sum(2, keepdim=True)).sum((0, 1))
    torch.testing.assert_close(router.grad, want, rtol=1e-4, atol=1e-4)


# ---- the other rules ------------------------------------------------------------------------------------------------------


def test_scatter_tokens_fuzz(device: str) -> None:
    for seed in range(100):
        g = seeded(seed)
        B, N = log_uniform(g, 1, 4), log_uniform(g, 1, 90)
        K = integer(g, 0, N)
        index = unique_index(seed, B, N, K, device, unused=bool(integer(g, 0, 1)))
        mode = ("replace", "add")[integer(g, 0, 1)]
        tensors, values = [], []
        for _ in range(integer(g, 1, 9)):
            H, C = log_uniform(g, 1, 5), log_uniform(g, 1, 70)
            dtype = (FLOATS if mode == "add" else DTYPES)[integer(g, 0, 2 if mode == "add" else 9)]
            pair = [torch.randint(0, 50, (B, H, n, C), generator=g).to(dtype).to(device) for n in (N, K)]
            pair = [t.transpose(1, 2) if integer(g, 0, 1) else t.transpose(1, 2).contiguous() for t in pair]
            tensors.append(pair[0])
            values.append(pair[1])
        weights = torch.randint(-4, 5, (B, K), generator=g).float().to(device) if mode == "add" and integer(g, 0, 1) else None
        check(tensors, index, values, f"seed {seed}", mode=mode, weights=weights)


def test_scatter_tokens_opcheck(device: str) -> None:
    index = torch.tensor([[9, 0, -1], [4, 5, 6]], device=device)
    ids = torch.arange(20, device=device).view(2, 10)
    for dtype in FLOATS:
        x, y = normal(seeded(4), 2, 10, 6, dtype=dtype, device=device), normal(seeded(5), 2, 3, 6, dtype=dtype, device=device)
        w = normal(seeded(6), 2, 3, device=device)
        ops = torch.ops.tokensieve
        for op, arguments in (
            (ops.scatter_tokens, ([x, ids], index, [y, ids[:, :3]], False, None)),
            (ops.scatter_tokens, ([x.clone().requires_grad_()], index, [y.clone().requires_grad_()], False, None)),
            (ops.scatter_tokens, ([x.clone().requires_grad_()], index, [y.clone().requires_grad_()], True, w.clone().requires_grad_())),
            (ops.scatter_tokens_backward, ([x], index, [y], w, True, True)),
            (ops.scatter_tokens_backward, ([x], index, [y], w, False, True)),
        ):
            results = torch.library.opcheck(op.default, arguments)
            assert set(results.values()) == {"SUCCESS"}, results


def test_scatter_tokens_compiles_with_gradients(device: str) -> None:
    def loss(x: Tensor, index: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return ts.scatter_tokens(x * 2, index, y.sin(), mode="add", weights=w).square().sum()

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, N, K, C in ((2, 20, 7, 6), (3, 33, 9, 10), (4, 50, 21, 5)):
            inputs = [normal(seeded(s), *shape, device=device) for s, shape in enumerate(((B, N, C), (B, K, C), (B, K)))]
            index = unique_index(1, B, N, K, device)
            grads = []
            for f in (function, loss):
                x, y, w = (t.clone().requires_grad_() for t in inputs)
                f(x, index, y, w).backward()
                grads.append((x.grad, y.grad, w.grad))
            for mine, theirs in zip(*grads, strict=True):
                torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


X, Y, I = torch.zeros(2, 10, 6), torch.zeros(2, 3, 6), torch.tensor([[0, 1, 2], [3, 4, 5]])  # noqa: E741
ERRORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no tensors": (([], I, []), {}, ValueError, r"tensors must hold at least one tensor, got none"),
    "one for many": (([X], I, Y), {}, TypeError, r"values must be a sequence of tensors, got Tensor"),
    "many for one": ((X, I, [Y]), {}, TypeError, r"values\[0\] must be a torch.Tensor, got list"),
    "count": (([X, X], I, [Y]), {}, ValueError, r"values must hold 2 tensors, got 1"),
    "index dtype": ((X, I.int(), Y), {}, TypeError, r"index must be int64, got int32"),
    "index list": ((X, [[0]], Y), {}, TypeError, r"index must be a torch.Tensor, got list"),
    "index high": ((X, I + 7, Y), {}, ValueError, r"index must be in \[-1, N=10\), got 10 at \(1, 0\)"),
    "index low": ((X, I - 2, Y), {}, ValueError, r"index must be in \[-1, N=10\), got -2 at \(0, 0\)"),
    "batch": ((X[:1], I, Y), {}, ValueError, r"tensors\[0\] must be \(B=2, N=10, ...\), got shape \(1, 10, 6\)"),
    "values shape": ((X, I, Y[:, :2]), {}, ValueError, r"values\[0\] must be \(B, K, ...\) = \(2, 3, 6\), got shape \(2, 2, 6\)"),
    "values dtype": ((X, I, Y.half()), {}, TypeError, r"values\[0\] must be float32, got float16"),
    "values layout": (
        (X[..., :4].unflatten(2, (2, 2)), I, torch.zeros(2, 3, 2, 5)[..., ::3]),
        {},
        ValueError,
        r"values\[0\] must have at most one strided axis .* call \.contiguous\(\)",
    ),
    "values device": ((X, I, Y.to("meta")), {}, ValueError, r"values\[0\] must be on the device of index"),
    "mode": ((X, I, Y), {"mode": "max"}, ValueError, r"mode must be one of 'replace', 'add', got 'max'"),
    "weights of replace": ((X, I, Y), {"weights": torch.ones(2, 3)}, ValueError, r"weights goes with mode 'add', got mode 'replace'"),
    "weights shape": ((X, I, Y), {"mode": "add", "weights": torch.ones(2, 2)}, ValueError, r"weights must be \(B, K\) = \(2, 3\), got"),
    "weights dtype": ((X, I, Y), {"mode": "add", "weights": torch.ones(2, 3).half()}, TypeError, r"weights must be float32, got float16"),
    "add dtype": ((X.long(), I, Y.long()), {"mode": "add"}, TypeError, r"tensors\[0\] must be float32 or float16 or bfloat16, got int64"),
    "add double": ((X.double(), I, Y.double()), {"mode": "add"}, TypeError, r"tensors\[0\] must be .*, got float64"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_scatter_tokens_bad_input(name: str) -> None:
    arguments, options, kind, message = ERRORS[name]
    with pytest.raises(kind, match=rf"^tokensieve\.scatter_tokens: ({message})"):
        ts.scatter_tokens(*arguments, **options)


def test_scatter_tokens_debug_checks_find_a_token_named_twice() -> None:
    with (
        ts.debug_checks(),
        pytest.raises(ValueError, match=r"scatter_tokens: index must name a token once per row .* got 4 twice in row 1"),
    ):
        ts.scatter_tokens(X, torch.tensor([[0, 1, 2], [4, 5, 4]]), Y)


def test_scatter_tokens_meta_and_tangents() -> None:
    assert ts.scatter_tokens(X.to("meta"), I.to("meta"), Y.to("meta"), mode="add").shape == X.shape
    with pytest.raises(ValueError, match=r"tokensieve\.scatter_tokens: tensors must carry no forward-mode tangent"):
        torch.func.jvp(lambda t: ts.scatter_tokens(t, I, Y), (X,), (X,))
