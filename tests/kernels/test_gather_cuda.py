"""gather_cuda, scatter_rows_cuda and topk_gather_cuda under the host SIMT runtime: bytes compared exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass
class Tokens:
    """A [B, N, M, W bytes] view. heads_first stores [B, M, N, W] (the keys of a cache); pad adds bytes to every token."""

    W: int
    M: int = 1
    heads_first: bool = False
    pad: int = 0
    offset: int = 0

    def make(self, rng: np.random.Generator, B: int, N: int) -> tuple[dict[str, Any], np.ndarray]:
        """The binding's dict, and the view."""
        if self.heads_first:
            storage = rng.integers(0, 255, (B, self.M, N, self.W + self.pad), dtype=np.uint8)
            view = storage[..., : self.W].transpose(0, 2, 1, 3)
        else:
            storage = rng.integers(0, 255, (B, N, self.M * self.W + self.pad), dtype=np.uint8)
            view = storage[..., : self.M * self.W].reshape(B, N, self.M, self.W)
            if self.pad:
                view = np.lib.stride_tricks.as_strided(storage, (B, N, self.M, self.W), (storage.strides[0], storage.strides[1], self.W, 1))
        stride_b, stride_n, stride_m, _ = view.strides
        return {
            "data": storage,
            "stride_b": stride_b,
            "stride_n": stride_n,
            "stride_m": stride_m,
            "segments": self.M,
            "segment_bytes": self.W,
            "offset_bytes": self.offset,
        }, view

    def compact(self, rng: np.random.Generator, B: int, K: int) -> tuple[dict[str, Any], np.ndarray]:
        data = rng.integers(0, 255, (B, K, self.M, self.W), dtype=np.uint8)
        return {"data": data, "segments": self.M, "segment_bytes": self.W, "offset_bytes": self.offset}, data


def gathered(view: np.ndarray, index: np.ndarray) -> np.ndarray:
    out = np.zeros((view.shape[0], index.shape[1], *view.shape[2:]), dtype=np.uint8)
    for b in range(view.shape[0]):
        kept = index[b] >= 0
        out[b, kept] = view[b, index[b][kept]]
    return out


def scattered(data: np.ndarray, index: np.ndarray, N: int) -> np.ndarray:
    out = np.zeros((data.shape[0], N, *data.shape[2:]), dtype=np.uint8)
    for b in range(data.shape[0]):
        kept = index[b] >= 0
        out[b, index[b][kept]] = data[b, kept]
    return out


def unique_index(rng: np.random.Generator, B: int, N: int, K: int, holes: int = 0) -> np.ndarray:
    index = np.stack([rng.permutation(N)[:K] for _ in range(B)]) if B else np.zeros((0, K), dtype=np.int64)
    index = index.astype(np.int64).reshape(B, K)
    if holes and K:
        index[:, rng.integers(0, K, holes)] = -1
    return index


def check_gather(kernels: Any, tensors: list[Tokens], B: int, N: int, index: np.ndarray, **plan: int) -> None:
    rng = np.random.default_rng(N + index.shape[1])
    made = [t.make(rng, B, N) for t in tensors]
    p = {"B": B, "N": N, "K": index.shape[1], "index": index, "tensors": [d for d, _ in made], **plan}
    for t, got, (_, view) in zip(tensors, kernels.gather_cuda(p), made):
        np.testing.assert_array_equal(got, gathered(view, index).ravel(), err_msg=f"{t} B={B} N={N} {plan}")


def check_scatter(kernels: Any, tensors: list[Tokens], B: int, N: int, index: np.ndarray, **plan: int) -> None:
    rng = np.random.default_rng(N)
    made = [t.compact(rng, B, index.shape[1]) for t in tensors]
    p = {"B": B, "N": N, "K": index.shape[1], "index": index, "tensors": [d for d, _ in made], **plan}
    for t, got, (_, data) in zip(tensors, kernels.scatter_rows_cuda(p), made):
        np.testing.assert_array_equal(got, scattered(data, index, N).ravel(), err_msg=f"{t} B={B} N={N} {plan}")


# A hidden state, keys of a cache (heads first), int64 positions, a bool mask: four vector widths in one launch.
MIXED = [Tokens(64), Tokens(32, M=3, heads_first=True), Tokens(8), Tokens(1)]


def test_gather_every_schedule(scheduled: Any) -> None:
    index = unique_index(np.random.default_rng(0), 2, 40, 17, holes=2)
    check_gather(scheduled, MIXED, 2, 40, index, blocks_per_row=3, threads=64)
    check_scatter(scheduled, MIXED, 2, 40, index, blocks_per_row=2, threads=64)


@pytest.mark.parametrize("W", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 80, 100, 512, 1040])
def test_gather_widths(kernels: Any, W: int) -> None:
    index = unique_index(np.random.default_rng(W), 2, 20, 7)
    check_gather(kernels, [Tokens(W), Tokens(W, M=2, heads_first=True), Tokens(W, M=3), Tokens(W, M=2, pad=4)], 2, 20, index)
    check_scatter(kernels, [Tokens(W), Tokens(W, M=2)], 2, 20, index)


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("pad", [0, 1, 2, 8])
def test_gather_alignment(kernels: Any, offset: int, pad: int) -> None:
    """The widest vector that pointers, strides and segments allow, per tensor."""
    index = unique_index(np.random.default_rng(1), 2, 16, 5)
    check_gather(kernels, [Tokens(32, offset=offset, pad=pad), Tokens(48, M=2, heads_first=True, offset=offset, pad=pad)], 2, 16, index)
    check_scatter(kernels, [Tokens(32, offset=offset)], 2, 16, index)


@pytest.mark.parametrize("vector_bytes", [1, 2, 4, 8, 16])
def test_gather_narrower_vectors_when_forced(kernels: Any, vector_bytes: int) -> None:
    check_gather(kernels, MIXED, 1, 16, unique_index(np.random.default_rng(1), 1, 16, 5), vector_bytes=vector_bytes)


@pytest.mark.parametrize("K", [0, 1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("blocks", [1, 2, 5, 100])
def test_gather_slices(kernels: Any, K: int, blocks: int) -> None:
    """More blocks than tokens, uneven last slices, none at all."""
    index = unique_index(np.random.default_rng(K), 3, 33, K)
    check_gather(kernels, MIXED, 3, 33, index, blocks_per_row=blocks, threads=96)
    check_scatter(kernels, MIXED, 3, 33, index, blocks_per_row=blocks, threads=96)


def test_gather_repeated_and_missing_tokens(kernels: Any) -> None:
    index = np.array([[3, 3, -1, 0], [-1, -1, -1, -1]], dtype=np.int64)
    check_gather(kernels, MIXED, 2, 4, index)
    check_scatter(kernels, MIXED, 2, 4, np.array([[3, 1, -1, 0], [-1, -1, -1, -1]], dtype=np.int64))


def test_gather_out_of_range_index_reads_nothing(kernels: Any) -> None:
    """Undefined by contract; here a row of zeros, never a foreign address."""
    index = np.array([[2, 10**12, -(2**62), 4]], dtype=np.int64)
    rng = np.random.default_rng(0)
    made, view = Tokens(16).make(rng, 1, 4)
    got = kernels.gather_cuda({"B": 1, "N": 4, "K": 4, "index": index, "tensors": [made]})[0].reshape(4, 16)
    np.testing.assert_array_equal(got[0], view[0, 2, 0])
    assert (got[1:] == 0).all()


def test_gather_one_list_for_all_rows(kernels: Any) -> None:
    rng = np.random.default_rng(2)
    made, view = Tokens(24).make(rng, 3, 9)
    index = np.array([[8, 0, 4]], dtype=np.int64)
    got = kernels.gather_cuda({"B": 3, "N": 9, "K": 3, "index": index, "index_stride": 0, "tensors": [made]})[0]
    np.testing.assert_array_equal(got, gathered(view, np.repeat(index, 3, axis=0)).ravel())


def test_gather_empty(kernels: Any) -> None:
    check_gather(kernels, MIXED, 0, 5, np.zeros((0, 3), dtype=np.int64))
    check_gather(kernels, MIXED, 2, 0, np.full((2, 3), -1, dtype=np.int64))
    check_gather(kernels, [Tokens(0), Tokens(4)], 2, 5, np.zeros((2, 3), dtype=np.int64))
    check_scatter(kernels, MIXED, 2, 5, np.zeros((2, 0), dtype=np.int64))


def test_scatter_inverts_gather(kernels: Any) -> None:
    rng = np.random.default_rng(7)
    for N, K in [(1, 1), (30, 30), (100, 9)]:
        check_scatter(kernels, MIXED, 2, N, unique_index(rng, 2, N, K))
        check_scatter(kernels, MIXED, 2, N, np.sort(unique_index(rng, 2, N, K)))


# ---- select + gather in one launch ----------------------------------------------------------------------------------------


def check_topk_gather(kernels: Any, B: int, R: int, K: int, prefix: int, suffix: int, **plan: Any) -> None:
    rng = np.random.default_rng(R + K)
    N = prefix + R + suffix
    scores = rng.integers(0, 6, (B, R)).astype(np.float32)
    topk = {"B": B, "N": R, "K": K, "scores": scores, "offset": prefix, "prefix": prefix, "suffix": suffix, **plan.pop("topk", {})}
    made = [t.make(rng, B, N) for t in MIXED]
    index, outputs = kernels.topk_gather_cuda(topk | {"gather": {"N": N, "tensors": [d for d, _ in made], **plan}})
    np.testing.assert_array_equal(index, kernels.topk_cuda(topk))
    for got, (_, view) in zip(outputs, made):
        np.testing.assert_array_equal(got, gathered(view, index).ravel())


@pytest.mark.parametrize("items", [{}, {"items_per_thread": 16}, {"items_per_thread": 0, "threads": 64}], ids=["4", "16", "reread"])
def test_topk_gather_every_schedule(scheduled: Any, items: dict[str, int]) -> None:
    check_topk_gather(scheduled, 2, 300, 41, 5, 3, blocks_per_row=3, topk=items)


@pytest.mark.parametrize("blocks", [1, 2, 7, 64])
@pytest.mark.parametrize(("R", "K", "prefix", "suffix"), [(1, 0, 0, 0), (1, 1, 0, 0), (50, 12, 0, 0), (50, 50, 3, 4), (576, 20, 35, 30)])
def test_topk_gather_slices(kernels: Any, R: int, K: int, prefix: int, suffix: int, blocks: int) -> None:
    check_topk_gather(kernels, 2, R, K, prefix, suffix, blocks_per_row=blocks)


def test_topk_gather_pads_rows_with_zeros(kernels: Any) -> None:
    """Fewer tokens than K in a row: index -1 and zero rows at the end, after the suffix."""
    check_topk_gather(kernels, 3, 40, 30, 2, 3, topk={"k_rows": np.array([0, 7, 30], dtype=np.int64)})


def test_topk_gather_by_score_takes_two_launches(kernels: Any) -> None:
    check_topk_gather(kernels, 2, 40, 11, 0, 0, topk={"order": "score"})


def test_topk_gather_with_scores_in_shared_memory(kernels: Any) -> None:
    """A longer list than fits beside held scores is split over more blocks."""
    held = {"items_per_thread": 0, "threads": 64, "smem_bytes": 2 * 64 * 16}
    check_topk_gather(kernels, 2, 300, 41, 5, 3, blocks_per_row=1, topk=held)
    check_topk_gather(kernels, 1, 300, 41, 3000, 3, blocks_per_row=1, topk=held)


def plan_of(kernels: Any, B: int, N: int, K: int, W: int, topk: bool = False) -> dict[str, Any]:
    tensor = {"data": np.zeros(0, np.uint8), "segment_bytes": W, "stride_b": N * W, "stride_n": W}
    p = {"B": B, "N": N, "K": K, "index": np.zeros((B, K), np.int64), "tensors": [tensor]}
    plan: dict[str, Any] = kernels.topk_gather_plan_cuda(p | {"gather": p}) if topk else kernels.gather_plan_cuda(p)
    return plan


def test_gather_plan(kernels: Any) -> None:
    next_hidden = plan_of(kernels, 1, 2944, 704, 8192)
    assert next_hidden["vector_bytes"] == 16
    assert next_hidden["blocks_per_row"] == 176  # 32 KB each
    assert next_hidden["bytes_moved"] == 704 * (2 * 8192 + 8)
    assert plan_of(kernels, 64, 577, 192, 2048)["blocks_per_row"] == 8  # four blocks an SM
    assert plan_of(kernels, 1, 577, 144, 8)["blocks_per_row"] == 1
    assert plan_of(kernels, 1, 577, 144, 6)["vector_bytes"] == 2


def test_topk_gather_plan_is_one_wave(kernels: Any) -> None:
    assert plan_of(kernels, 1, 2944, 704, 8192, topk=True)["blocks_per_row"] == 132  # 736 threads: one block an SM
    assert plan_of(kernels, 64, 577, 192, 2048, topk=True)["blocks_per_row"] == 8  # 160 threads: six
    assert plan_of(kernels, 1, 50176, 5017, 7168, topk=True)["blocks_per_row"] == 132
