"""complement_index gives exactly the set difference, ascending."""

from __future__ import annotations

from typing import Any

import pytest
import tokensieve as ts
import torch
from reference.compare import assert_equal
from reference.inputs import integer, log_uniform, seeded
from reference.ops import complement_index as reference
from same_bits import on_every_level
from torch import Tensor

I = torch.tensor([[4, 1], [0, 3]])  # noqa: E741


def random_index(generator: torch.Generator, B: int, K: int, N: int) -> Tensor:
    return torch.rand(B, N, generator=generator).argsort(dim=1)[:, :K]


def test_complement_index_of_selections(device: str) -> None:
    for N, k in ((1, 0), (1, 1), (15, 4), (16, 4), (17, 16), (577, 144), (2880, 640), (50_000, 5000)):
        scores = torch.rand(3, N, generator=seeded(N)).to(device)
        for order in ("position", "score"):
            index = ts.select_topk(scores, k, order=order)
            rest = ts.complement_index(index, N)
            assert_equal(rest, reference(index, N, N - k), f"N={N} k={k}")
            assert_equal(torch.cat([index, rest], 1).sort(dim=1).values, torch.arange(N, device=device).expand(3, N))


def test_complement_index_padding_and_duplicates(device: str) -> None:
    index = torch.tensor([[-1, 2, -1, 2], [0, 1, 2, 3], [-1, -1, -1, -1]], device=device)
    assert ts.complement_index(index, 5, capacity=5).tolist() == [[0, 1, 3, 4, -1], [4, -1, -1, -1, -1], [0, 1, 2, 3, 4]]
    assert ts.complement_index(index[:2], 5, capacity=7).tolist() == [[0, 1, 3, 4, -1, -1, -1], [4, -1, -1, -1, -1, -1, -1]]


@pytest.mark.parametrize(("B", "K", "N"), [(0, 3, 9), (2, 0, 0), (2, 0, 5), (2, 5, 5)])
def test_complement_index_empty(B: int, K: int, N: int, device: str) -> None:
    index = torch.arange(K, device=device).repeat(B, 1)
    got = ts.complement_index(index, N)
    assert (got.shape, got.dtype, got.device.type) == ((B, N - K), torch.int64, device)
    assert_equal(got, torch.arange(K, N, device=device).repeat(B, 1))


def test_complement_index_strided_and_unaligned_rows(device: str) -> None:
    wide = random_index(seeded(1), 6, 90, 300).to(device)
    for view in (wide[:, 1:], wide[::2, 3:50], wide[1:2].expand(4, -1), wide[:, 7:8]):
        assert_equal(ts.complement_index(view, 300), reference(view, 300, 300 - view.shape[1]))


def test_complement_index_levels_and_threads_agree() -> None:
    for B, K, N in ((700, 30, 400), (5, 100, 1003)):
        index = random_index(seeded(N), B, K, N)
        (got,) = on_every_level(lambda index=index, N=N: ts.complement_index(index, N))  # type: ignore[misc]
        assert_equal(got, reference(index, N, N - K))


def test_complement_index_fuzz(device: str) -> None:
    for seed in range(150):
        g = seeded(seed)
        B, N = log_uniform(g, 1, 70), log_uniform(g, 1, 3000)
        K = integer(g, 0, 2 * N)
        index = torch.randint(-1, N, (B, K), generator=g).to(device)
        assert_equal(ts.complement_index(index, N, capacity=N), reference(index, N, N), f"seed {seed}: B={B} K={K} N={N}")


def test_complement_index_opcheck(device: str) -> None:
    for arguments in ((I.to(device), 5, 3), (I.to(device), 9, 12)):
        results = torch.library.opcheck(torch.ops.tokensieve.complement_index.default, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


def test_complement_index_compiles_with_dynamic_shapes(device: str) -> None:
    def step(scores: Tensor, k: int) -> Tensor:
        return ts.complement_index(ts.select_topk(scores * 2, k), scores.shape[1]) + 1

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, N, k in ((2, 30, 7), (3, 77, 40), (5, 200, 11)):
            scores = torch.rand(B, N, generator=seeded(N)).to(device)
            assert_equal(function(scores, k), step(scores, k))
    torch._dynamo.reset()


ERRORS: dict[str, tuple[tuple[Any, Any, Any], type[Exception], str]] = {
    "index list": (([[1]], 5, None), TypeError, r"index must be a torch.Tensor, got list"),
    "index dtype": ((I.int(), 5, None), TypeError, r"index must be int64, got int32"),
    "index rank": ((I[0], 5, None), ValueError, r"index must be \(B, K\), got shape \(2,\)"),
    "index stride": ((torch.zeros(3, 2).long().t(), 5, None), ValueError, r"index must be contiguous .* got stride 2"),
    "index large": ((I + 1, 5, None), ValueError, r"index must be in \[-1, N=5\), got 5 at \(0, 0\)"),
    "index small": ((I - 2, 5, None), ValueError, r"index must be in \[-1, N=5\), got -2 at \(1, 0\)"),
    "too many": ((I * 0, 5, None), ValueError, r"index must leave at most capacity=3 positions, got 4 in row 0"),
    "too many of a capacity": ((I, 9, 6), ValueError, r"index must leave at most capacity=6 positions, got 7 in row 0"),
    "N float": ((I, 5.0, None), TypeError, r"N must be an int, got float"),
    "N negative": ((I[:, :0], -1, 0), ValueError, r"N must be at least 0, got -1"),
    "capacity missing": ((I, 1, None), ValueError, r"capacity must be given where K > N=1, got K=2"),
    "capacity negative": ((I, 5, -3), ValueError, r"capacity must be at least 0, got -3"),
    "capacity bool": ((I, 5, True), TypeError, r"capacity must be an int, got bool"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_complement_index_bad_input(name: str) -> None:
    (index, N, capacity), kind, message = ERRORS[name]
    with pytest.raises(kind, match=rf"^tokensieve\.complement_index: {message}"):
        ts.complement_index(index, N, capacity=capacity)


def test_complement_index_meta() -> None:
    assert ts.complement_index(I.to("meta"), 9).shape == (2, 7)
    with pytest.raises(ValueError, match="capacity must be given where K > N=1"):
        ts.complement_index(I.to("meta"), 1)
