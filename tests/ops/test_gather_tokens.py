"""gather_tokens copies bits: any width, dtype and layout, several tensors at once, and its gradient."""

from __future__ import annotations

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import normal, seeded
from reference.ops import gather_tokens as reference
from same_bits import on_any_threads
from torch import Tensor

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)
POISON = -77.0


def make(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    x = torch.randint(-100, 100, shape, generator=seeded(seed))
    return (x > 0 if dtype == torch.bool else x.clamp(min=0) if dtype == torch.uint8 else x).to(dtype).to(device)


def unique_index(seed: int, B: int, N: int, K: int, device: str = "cpu", unused: bool = False) -> Tensor:
    """(B, K) distinct positions a row in random order, some -1 if wanted."""
    index = torch.stack([torch.randperm(N, generator=seeded(seed + b))[:K] for b in range(B)])
    if unused:
        index[torch.rand(B, K, generator=seeded(seed)) < 0.3] = -1
    return index.to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_tokens_widths(dtype: torch.dtype, device: str) -> None:
    for C in (1, 2, 3, 7, 8, 16, 17, 33, 64, 100, 257):
        x = make(C, 2, 50, C, dtype=dtype, device=device)
        index = unique_index(C, 2, 50, 19, device, unused=True)
        assert_equal(ts.gather_tokens(x, index), reference([x], index)[0], f"C={C}")


def test_gather_tokens_several_tensors_at_once(device: str) -> None:
    tensors = [
        make(1, 3, 40, 48, dtype=torch.bfloat16, device=device),
        make(2, 3, 40, dtype=torch.int64, device=device),
        make(3, 3, 40, 4, 16, dtype=torch.float16, device=device),
        make(4, 3, 40, dtype=torch.bool, device=device),
        make(5, 3, 40, 5, dtype=torch.float64, device=device),
        make(6, 3, 40, 3, dtype=torch.complex128, device=device),
        make(7, 3, 4, 40, 16, dtype=torch.float32, device=device).transpose(1, 2),
    ]
    index = unique_index(8, 3, 40, 11, device, unused=True)
    got = ts.gather_tokens(tensors, index)
    assert isinstance(got, tuple)
    for i, (g, want) in enumerate(zip(got, reference(tensors, index), strict=True)):
        assert_equal(g, want, f"tensor {i}")
        assert g.is_contiguous()


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 20])
def test_gather_tokens_any_number_of_tensors(count: int, device: str) -> None:
    tensors = [make(i, 2, 30, 1 + i, dtype=DTYPES[i % len(DTYPES)], device=device) for i in range(count)]
    index = unique_index(1, 2, 30, 12, device)
    for i, (g, want) in enumerate(zip(ts.gather_tokens(tensors, index), reference(tensors, index), strict=True)):
        assert_equal(g, want, f"tensor {i} of {count}")


def test_gather_tokens_returns_what_it_was_given(device: str) -> None:
    x, index = make(1, 1, 5, 2, device=device), torch.tensor([[4, 0]], device=device)
    assert isinstance(ts.gather_tokens(x, index), Tensor)
    assert isinstance(ts.gather_tokens([x], index), tuple)
    assert isinstance(ts.gather_tokens((x, x), index), tuple)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_gather_tokens_views(dtype: torch.dtype, device: str) -> None:
    heads = make(1, 3, 6, 30, 20, dtype=dtype, device=device)  # (B, H, N, D) storage
    wide = make(2, 4, 60, 40, dtype=dtype, device=device)
    views = {
        "transposed heads": heads.transpose(1, 2),
        "slice of heads": heads.transpose(1, 2)[:, :, 1:4],
        "slice of channels": heads.transpose(1, 2)[..., 3:14],
        "one head": heads.transpose(1, 2)[:, :, 2:3],
        "every second head": heads.transpose(1, 2)[:, :, ::2],
        "unaligned channels": wide[:3, :30, 1:],
        "every second token": wide[1:, ::2],
        "expanded batch": wide[:1, :30].expand(3, -1, -1),
        "expanded token": wide[:3, :1].expand(-1, 30, -1),
        "one column": wide[:3, :30, 7],
        "reversed axes": wide[:3, :30, :3].permute(2, 1, 0)[:, :, :1],
    }
    for name, view in views.items():
        index = unique_index(3, 3, view.shape[1], 13, device, unused=True)
        assert_equal(ts.gather_tokens(view, index), reference([view], index)[0], f"{name} {view.shape} {view.stride()}")


def test_gather_tokens_index_views(device: str) -> None:
    x = make(1, 4, 30, 8, device=device)
    index = unique_index(2, 1, 30, 9, device)
    assert_equal(ts.gather_tokens(x, index.expand(4, -1)), reference([x], index.expand(4, -1))[0], "one list for all")
    wide = unique_index(3, 8, 30, 20, device)
    assert_equal(ts.gather_tokens(x, wide[::2, 3:12]), reference([x], wide[::2, 3:12])[0], "a view")


def test_gather_tokens_may_name_a_token_twice(device: str) -> None:
    x = make(1, 1, 5, 4, device=device)
    index = torch.tensor([[3, 3, 0, 3, 0, 4, 4]], device=device)  # more than N is fine too
    assert_equal(ts.gather_tokens(x, index), reference([x], index)[0])


@pytest.mark.parametrize(("B", "N", "K"), [(0, 5, 3), (2, 5, 0), (0, 0, 0), (2, 0, 0), (1, 1, 1), (2, 0, 3)])
def test_gather_tokens_empty(B: int, N: int, K: int, device: str) -> None:
    x, ids = torch.ones(B, N, 4, device=device), torch.ones(B, N, dtype=torch.int64, device=device)
    index = torch.full((B, K), -1 if N == 0 else 0, device=device)
    rows, kept = ts.gather_tokens((x, ids), index)
    assert_equal(rows, reference([x], index)[0])
    assert kept.shape == (B, K)
    assert ts.gather_tokens(torch.ones(B, N, 0, device=device), index).shape == (B, K, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_gather_tokens_out_writes_nothing_else(dtype: torch.dtype, device: str) -> None:
    for C in (1, 3, 16, 33, 129):
        for margin in (1, 3, 64):
            x = make(C, 2, 30, C, dtype=dtype, device=device)
            index = unique_index(C, 2, 30, 7, device, unused=True)
            size = 2 * 7 * C
            buffer = torch.full((size + 2 * margin,), 99, dtype=dtype, device=device)
            out = buffer[margin : margin + size].view(2, 7, C)
            assert ts.gather_tokens_out([x], index, [out]) is None
            assert_equal(out, reference([x], index)[0], f"C={C} margin={margin}")
            assert bool((buffer[:margin] == 99).all() and (buffer[margin + size :] == 99).all()), f"C={C} wrote outside, margin {margin}"


def test_gather_tokens_out_again_into_the_same_buffers(device: str) -> None:
    x, ids = make(1, 2, 30, 8, device=device), make(2, 2, 30, dtype=torch.int64, device=device)
    out = [torch.empty(2, 7, 8, device=device), torch.empty(2, 7, dtype=torch.int64, device=device)]
    addresses = [o.data_ptr() for o in out]
    for seed in (1, 2):
        index = unique_index(seed, 2, 30, 7, device)
        ts.gather_tokens_out([x, ids], index, out)
        for o, want in zip(out, reference([x, ids], index), strict=True):
            assert_equal(o, want)
    assert [o.data_ptr() for o in out] == addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gather_tokens_backward_matches_autograd(dtype: torch.dtype, device: str) -> None:
    index = unique_index(3, 3, 40, 13, device, unused=True)
    leaves = [normal(seeded(4), 3, 40, 6, dtype=dtype, device=device), normal(seeded(5), 3, 4, 40, 5, dtype=dtype, device=device)]
    ids = make(6, 3, 40, dtype=torch.int64, device=device)
    mine, theirs = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    weights = [normal(seeded(7), 3, 13, 6, dtype=dtype, device=device), normal(seeded(8), 3, 13, 4, 5, dtype=dtype, device=device)]
    for group, gather in ((mine, ts.gather_tokens), (theirs, reference)):
        a, kept, b = gather([group[0], ids, group[1].transpose(1, 2)], index)
        assert not kept.requires_grad
        ((a * weights[0]).sum() + (b * weights[1]).sum()).backward()
    for i, (m, t) in enumerate(zip(mine, theirs, strict=True)):
        assert_equal(m.grad, t.grad, f"gradient {i}")


def test_gather_tokens_backward_where_one_output_is_unused(device: str) -> None:
    a, b = (normal(seeded(s), 1, 6, 3, device=device).requires_grad_() for s in (1, 2))
    index = torch.tensor([[5, -1, 2]], device=device)
    first, _ = ts.gather_tokens([a, b], index)
    first.sum().backward()
    want = torch.zeros(1, 6, 3, device=device)
    want[:, [2, 5]] = 1
    assert_equal(a.grad, want)
    assert b.grad is None or bool((b.grad == 0).all())


def test_gather_tokens_backward_twice_and_expanded_gradient(device: str) -> None:
    x = normal(seeded(3), 2, 9, 4, device=device).requires_grad_()
    index = unique_index(4, 2, 9, 5, device)
    out = ts.gather_tokens(x, index)
    out.sum().backward(retain_graph=True)  # the incoming gradient is an expanded scalar
    first = x.grad.clone()
    out.sum().backward()
    assert_equal(x.grad, 2 * first)


def test_gather_tokens_gradcheck(device: str) -> None:
    x = normal(seeded(5), 2, 5, 3, dtype=torch.float64, device=device).requires_grad_()
    y = normal(seeded(6), 2, 2, 5, 2, dtype=torch.float64, device=device).requires_grad_()
    index = torch.tensor([[4, -1, 0], [1, 2, 3]], device=device)
    assert torch.autograd.gradcheck(lambda x, y: ts.gather_tokens([x, y.transpose(1, 2)], index), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: ts.gather_tokens([x, y.transpose(1, 2)], index), (x, y))


def test_gather_tokens_backward_of_many_tensors(device: str) -> None:
    leaves = [normal(seeded(i), 2, 12, 1 + i, device=device).requires_grad_() for i in range(11)]
    index = unique_index(6, 2, 12, 5, device)
    sum((i + 1) * g.sum() for i, g in enumerate(ts.gather_tokens(leaves, index))).backward()
    for i, leaf in enumerate(leaves):
        want = torch.zeros_like(leaf).scatter(1, index[..., None].expand(-1, -1, 1 + i), float(i + 1))
        assert_equal(leaf.grad, want, f"tensor {i}")


def test_gather_tokens_without_gradient_keeps_none(device: str) -> None:
    x = normal(seeded(7), 1, 4, 2, device=device).requires_grad_()
    with torch.no_grad():
        assert not ts.gather_tokens(x, torch.tensor([[1]], device=device)).requires_grad
    with torch.inference_mode():
        assert ts.gather_tokens(x, torch.tensor([[1]], device=device)).shape == (1, 1, 2)


def test_gather_tokens_does_not_write_its_inputs(device: str) -> None:
    x, index = make(1, 2, 20, 9, device=device), unique_index(2, 2, 20, 8, device)
    before = x.clone(), index.clone()
    got = ts.gather_tokens(x, index)
    got.fill_(POISON)  # no aliasing
    assert_equal(x, before[0])
    assert_equal(index, before[1])


def test_gather_tokens_large_rows_on_any_thread_count() -> None:
    x, index = make(3, 2, 400, 3584), unique_index(4, 2, 400, 150)
    (got,) = on_any_threads(lambda: ts.gather_tokens(x, index))
    assert_equal(got, reference([x], index)[0])


def test_gather_tokens_out_tells_autograd_that_it_wrote() -> None:
    """A tensor that a backward pass still needs was overwritten: an error, not a wrong gradient."""
    leaf = torch.ones(1, 2, 3, requires_grad=True)
    saved = leaf.exp()
    loss = (saved * saved).sum()
    ts.gather_tokens_out([torch.zeros(1, 4, 3)], torch.tensor([[0, 1]]), [saved.detach()])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # has no version to count
        out = torch.empty(1, 2, 3)
        ts.gather_tokens_out([torch.zeros(1, 4, 3)], torch.tensor([[0, 1]]), [out])
    assert not out.any()


def test_forward_mode_tangents_are_refused() -> None:
    """torch would drop them in silence and give zero derivatives."""
    x, index = torch.randn(1, 4, 3), torch.tensor([[0, 2]])
    with pytest.raises(ValueError, match=r"tokensieve\.gather_tokens: tensors must carry no forward-mode tangent"):
        torch.func.jvp(lambda t: ts.gather_tokens(t, index), (x,), (torch.ones_like(x),))
    query, key = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 4, 4)
    with pytest.raises(ValueError, match=r"tokensieve\.prune_tokens: tensors must carry no forward-mode tangent"):
        torch.func.jvp(lambda t: ts.prune_tokens(query, key, [t], 2).tensors[0], (x,), (torch.ones_like(x),))
    doubled, tangent = torch.func.jvp(lambda t: ts.gather_tokens(x, index) + 2 * t[:, :2], (x,), (torch.ones_like(x),))
    assert doubled.shape == tangent.shape == (1, 2, 3)  # a tensor without a tangent is no problem


def test_gather_tokens_out_refuses_memory_that_it_reads_or_writes_twice() -> None:
    """The rows that it would read might be those that it has just written."""
    room = torch.zeros(400)
    x, index = room[:120].view(2, 10, 6), torch.tensor([[0, 1, 2], [3, 4, 5]])
    for begin, meets in ((0, True), (84, True), (119, True), (120, False)):
        out = room[begin : begin + 36].view(2, 3, 6)
        if meets:
            rule = r"^tokensieve\.gather_tokens_out: out\[0\] must share no memory with tensors\[0\], got one that does"
            with pytest.raises(ValueError, match=rule):
                ts.gather_tokens_out([x], index, [out])
        else:
            ts.gather_tokens_out([x], index, [out])
    rows = room[:320].view(2, 160)[:, :60].unflatten(1, (10, 6))  # 100 elements lie between the two rows
    ts.gather_tokens_out([rows], index, [room[60:96].view(2, 3, 6)])
    with pytest.raises(ValueError, match=r"out\[0\] must share no memory with tensors\[0\]"):
        ts.gather_tokens_out([rows], index, [room[125:161].view(2, 3, 6)])
    first, second = room[200:236].view(2, 3, 6), room[235:271].view(2, 3, 6)
    with pytest.raises(ValueError, match=r"^tokensieve\.gather_tokens_out: out\[1\] must share no memory with out\[0\], got"):
        ts.gather_tokens_out([x, x], index, [first, second])
    ids = torch.arange(100) % 3
    with pytest.raises(ValueError, match=r"^tokensieve\.gather_tokens_out: out\[0\] must share no memory with index, got"):
        ts.gather_tokens_out([ids[:20].view(2, 10)], ids[50:56].view(2, 3), [ids[55:61].view(2, 3)])
    ts.gather_tokens_out([x[:, :, :0]], index, [x[:, :3, :0].contiguous()])  # nothing is written


def test_gather_tokens_out_refuses_gradients() -> None:
    x, index, out = make(1, 1, 4, 3), torch.tensor([[0, 2]]), torch.empty(1, 2, 3)
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"^tokensieve\.gather_tokens_out: tensors\[0\] must require no gradient .*got requires_grad=True"):
        ts.gather_tokens_out([leaf], index, [out])
    with pytest.raises(ValueError, match=r"^tokensieve\.gather_tokens_out: out\[0\] must require no gradient"):
        ts.gather_tokens_out([x], index, [out.clone().requires_grad_()])
    with torch.no_grad():
        ts.gather_tokens_out([leaf], index, [out])
    assert_equal(out, x[:, [0, 2]])
