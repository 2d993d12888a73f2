"""pack_tokens and unpack_tokens: ragged rows end to end and back, overflow, gradients, and the attention that they are for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tokensieve as ts
import torch
from ops.test_gather_tokens import DTYPES, make, unique_index
from reference.compare import assert_equal
from reference.inputs import integer, log_uniform, normal, seeded
from torch import Tensor


def reference(tensors: list[Tensor], index: Tensor, capacity: int) -> tuple[list[Tensor], list[int], Tensor, int]:
    """(packed, cu_seqlens, slots, total), token by token."""
    places = [(b, k) for b in range(index.shape[0]) for k in range(index.shape[1]) if index[b, k] >= 0]
    slots = torch.full(index.shape, -1, dtype=torch.int64)
    for i, place in enumerate(places[:capacity]):
        slots[place] = i
    lengths = [min(capacity, sum(b < row for b, _ in places)) for row in range(index.shape[0] + 1)]
    out = []
    for t in tensors:
        rows = [t[b, int(index[b, k])] for b, k in places[:capacity]]
        rows += [t.new_zeros(t.shape[2:])] * (capacity - len(rows))
        out.append(torch.stack(rows) if rows else t.new_zeros(0, *t.shape[2:]))
    return out, lengths, slots, len(places)


def check(tensors: list[Tensor], index: Tensor, capacity: int, what: str = "") -> None:
    got = ts.pack_tokens(tensors, index, capacity)
    want, lengths, slots, total = reference(tensors, index, capacity)
    for i, (g, w) in enumerate(zip(got.tensors, want, strict=True)):
        assert_equal(g, w, f"tensor {i} {what}")
    assert_equal(got.cu_seqlens.cpu(), torch.tensor(lengths, dtype=torch.int32), what)
    assert_equal(got.slots.cpu(), slots, what)
    assert (got.total.shape, int(got.total)) == ((), total)
    back = ts.unpack_tokens(got.tensors, got.slots)
    for i, (g, t) in enumerate(zip(back, tensors, strict=True)):
        assert_equal(g, ts.gather_tokens(t, index.where(got.slots >= 0, -1)), f"unpacked tensor {i} {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_tokens_dtypes_and_capacities(dtype: torch.dtype, device: str) -> None:
    index = unique_index(1, 4, 30, 17, device, unused=True)
    used = int((index >= 0).sum())
    tensors = [make(2, 4, 30, 24, dtype=dtype, device=device), make(3, 4, 30, dtype=dtype, device=device)]
    for capacity in (0, 1, used // 2, used - 1, used, used + 1, index.numel()):
        check(tensors, index, capacity, f"capacity {capacity} of {used}")


def test_pack_tokens_layouts(device: str) -> None:
    index = unique_index(4, 3, 20, 9, device, unused=True)
    wide = make(5, 3, 40, 16, device=device)
    check(
        [
            wide[:, 5:25],
            wide[:, ::2],
            wide[:1, :20].expand(3, -1, -1),
            make(6, 3, 4, 20, 8, device=device).transpose(1, 2),
            wide[:, :20, 3:9],
            make(7, 20, 3, 5, device=device).transpose(0, 1),
        ],
        index,
        20,
    )
    check([wide], unique_index(8, 1, 40, 6, device).expand(3, -1), 18)
    check([wide], unique_index(9, 6, 40, 30, device, unused=True)[::2, 4:19], 45)


@pytest.mark.parametrize(("B", "N", "K"), [(0, 5, 3), (2, 5, 0), (0, 0, 0), (2, 0, 3), (1, 1, 1)])
def test_pack_tokens_empty(B: int, N: int, K: int, device: str) -> None:
    x = torch.ones(B, N, 4, device=device)
    index = torch.full((B, K), 0 if N else -1, device=device)
    for capacity in (0, 5):
        check([x], index, capacity)
    check([x], torch.full_like(index, -1), 5)


def test_pack_tokens_returns_what_it_was_given(device: str) -> None:
    x, index = make(1, 2, 5, 3, device=device), torch.tensor([[4, -1], [0, 2]], device=device)
    packed = ts.pack_tokens(x, index, 4)
    assert isinstance(packed.tensors, Tensor)
    assert isinstance(ts.unpack_tokens(packed.tensors, packed.slots), Tensor)
    assert isinstance(ts.pack_tokens([x], index, 4).tensors, tuple)
    assert isinstance(ts.unpack_tokens([packed.tensors], packed.slots), tuple)
    every_second = packed.slots.repeat_interleave(2, 1)[:, ::2]
    assert_equal(ts.unpack_tokens(packed.tensors, every_second), ts.unpack_tokens(packed.tensors, packed.slots))


def test_pack_tokens_and_back_with_scatter(device: str) -> None:
    """The write-back of A-ViT: a block runs on what is alive; the halted tokens keep what they had."""
    x, index = normal(seeded(1), 3, 20, 8, device=device), unique_index(2, 3, 20, 11, device, unused=True)
    packed = ts.pack_tokens(x, index, index.numel())
    got = ts.scatter_tokens(x, index, ts.unpack_tokens(packed.tensors.tanh(), packed.slots))
    alive = torch.zeros(3, 21, dtype=torch.bool, device=device).scatter_(1, index.where(index >= 0, 20), True)[:, :20]
    assert_equal(got, torch.where(alive[..., None], x.tanh(), x))


def test_packed_attention_equals_masked_attention(device: str) -> None:
    """cu_seqlens say which rows belong together: attention inside them is attention over the kept tokens of a sample."""
    q, k, v = (normal(seeded(s), 3, 20, 2, 8, device=device) for s in range(3))
    index = unique_index(4, 3, 20, 12, device, unused=True)
    packed = ts.pack_tokens([q, k, v], index, 40)
    edges = packed.cu_seqlens.tolist()
    out = torch.zeros(40, 2, 8, device=device)
    for begin, end in pairwise(edges):
        rows = [t[begin:end].transpose(0, 1) for t in packed.tensors]
        out[begin:end] = torch.nn.functional.scaled_dot_product_attention(*rows).transpose(0, 1)
    got = ts.unpack_tokens(out, packed.slots)
    rows = [t.transpose(1, 2) for t in ts.gather_tokens([q, k, v], index)]
    mask = (index >= 0)[:, None, None].expand(-1, 2, 12, -1)
    want = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=mask).transpose(1, 2) * (index >= 0)[..., None, None]
    torch.testing.assert_close(got, want)


def test_pack_tokens_gradients(device: str) -> None:
    index = torch.tensor([[4, -1, 0], [1, 2, 3]], device=device)
    x = normal(seeded(5), 2, 5, 3, dtype=torch.float64, device=device).requires_grad_()
    y = normal(seeded(6), 2, 2, 5, 2, dtype=torch.float64, device=device).requires_grad_()

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        packed = ts.pack_tokens([x, y.transpose(1, 2)], index, 4)  # one too few: the last token has no gradient
        return *packed.tensors, *ts.unpack_tokens([t.square() for t in packed.tensors], packed.slots)

    assert torch.autograd.gradcheck(both, (x, y))
    assert torch.autograd.gradgradcheck(both, (x, y))
    ts.pack_tokens(x, index, 4).tensors.sum().backward()
    assert x.grad is not None
    assert x.grad.sum(2).tolist() == [[3, 0, 0, 0, 3], [0, 3, 3, 0, 0]]


def test_pack_tokens_fuzz(device: str) -> None:
    for seed in range(60):
        g = seeded(seed)
        B, N = log_uniform(g, 1, 9), log_uniform(g, 1, 120)
        K = integer(g, 0, N)
        index = unique_index(seed, B, N, K, device, unused=bool(integer(g, 0, 2)))
        tensors = [
            make(seed + i, B, N, log_uniform(g, 1, 40), dtype=DTYPES[integer(g, 0, 9)], device=device) for i in range(integer(g, 1, 3))
        ]
        check(tensors, index, integer(g, 0, B * K + 3), f"seed {seed}")


def test_pack_tokens_opcheck_and_meta(device: str) -> None:
    index = torch.tensor([[9, 0, -1], [4, 5, 6]], device=device)
    for capacity in (0, 4, 9):
        results = torch.library.opcheck(torch.ops.tokensieve.pack_index.default, (index, 10, capacity))
        assert set(results.values()) == {"SUCCESS"}, results
    packed = ts.pack_tokens(torch.empty(2, 10, 4, device="meta"), index.to("meta"), 7)
    assert (packed.tensors.shape, packed.cu_seqlens.dtype, packed.slots.shape) == ((7, 4), torch.int32, (2, 3))
    assert ts.unpack_tokens(packed.tensors, packed.slots).shape == (2, 3, 4)


def test_pack_tokens_compiles_with_dynamic_shapes(device: str) -> None:
    def step(x: Tensor, index: Tensor, capacity: int) -> tuple[Tensor, ...]:
        packed = ts.pack_tokens(x.sin(), index, capacity)
        return ts.unpack_tokens(packed.tensors * 2, packed.slots), packed.cu_seqlens, packed.total

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, N, K, C, capacity in ((2, 20, 7, 6, 12), (3, 33, 9, 10, 25), (4, 50, 21, 5, 60)):
            x, index = normal(seeded(N), B, N, C, device=device), unique_index(N, B, N, K, device, unused=True)
            for got, want in zip(function(x, index, capacity), step(x, index, capacity), strict=True):
                assert_equal(got, want)
    torch._dynamo.reset()


X, I = torch.zeros(2, 10, 6), torch.tensor([[0, 1, 2], [3, 4, 5]])  # noqa: E741
P, S = torch.zeros(4, 6), torch.tensor([[0, 1], [3, -1]])
ERRORS: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "no tensors": (ts.pack_tokens, ([], I, 4), ValueError, r"pack_tokens: tensors must hold at least one tensor, got none"),
    "tensors None": (ts.pack_tokens, (None, I, 4), TypeError, r"pack_tokens: tensors must be a sequence of tensors, got NoneType"),
    "rank": (ts.pack_tokens, (X[0, 0], I, 4), ValueError, r"pack_tokens: tensors\[0\] must be \(B, N, ...\), got shape \(6,\)"),
    "batch": (ts.pack_tokens, (X[:1], I, 4), ValueError, r"pack_tokens: index must be \(B=1, K\), got shape \(2, 3\)"),
    "two lengths": (ts.pack_tokens, ([X, X[:, :9]], I, 4), ValueError, r"pack_tokens: tensors\[1\] must be \(B=2, N=10, ...\), got"),
    "index dtype": (ts.pack_tokens, (X, I.int(), 4), TypeError, r"pack_tokens: index must be int64, got int32"),
    "index high": (ts.pack_tokens, (X, I + 7, 4), ValueError, r"pack_tokens: index must be in \[-1, N=10\), got 10 at \(1, 0\)"),
    "capacity type": (ts.pack_tokens, (X, I, 4.5), TypeError, r"pack_tokens: capacity must be an int, got float"),
    "capacity negative": (ts.pack_tokens, (X, I, -1), ValueError, r"pack_tokens: capacity must be in \[0, 2\^31\), got -1"),
    "capacity huge": (ts.pack_tokens, (X, I, 2**31), ValueError, r"pack_tokens: capacity must be in \[0, 2\^31\), got 2147483648"),
    "slots dtype": (ts.unpack_tokens, (P, S.int()), TypeError, r"unpack_tokens: slots must be int64, got int32"),
    "slots rank": (ts.unpack_tokens, (P, S[0]), ValueError, r"unpack_tokens: slots must be \(B, K\), got shape \(2,\)"),
    "slots high": (ts.unpack_tokens, (P, S + 1), ValueError, r"unpack_tokens: slots must be in \[-1, T=4\), got 4"),
    "no packed": (ts.unpack_tokens, ([], S), ValueError, r"unpack_tokens: packed must hold at least one tensor, got none"),
    "packed lengths": (ts.unpack_tokens, ([P, P[:3]], S), ValueError, r"unpack_tokens: packed\[1\] must be \(T, ...\) with the T of all"),
    "packed list": (ts.unpack_tokens, ([[1.0]], S), TypeError, r"unpack_tokens: packed\[0\] must be a torch.Tensor, got list"),
    "packed None": (ts.unpack_tokens, (None, S), TypeError, r"unpack_tokens: packed must be a sequence of tensors, got NoneType"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_pack_tokens_bad_input(name: str) -> None:
    call, arguments, kind, message = ERRORS[name]
    with pytest.raises(kind, match=rf"^tokensieve\.{message}"):
        call(*arguments)


def test_pack_tokens_debug_checks_find_a_token_named_twice() -> None:
    with ts.debug_checks(), pytest.raises(ValueError, match=r"pack_tokens: index must name a token once per row .* got 4 twice in row 1"):
        ts.pack_tokens(X, torch.tensor([[0, 1, 2], [4, 5, 4]]), 6)
