"""scatter_cuda and its gradient under the host SIMT runtime, and the CPU kernels at every level, on exact-size buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.test_gather_cuda import MIXED, Tokens, unique_index

FLOATS = {"float32": np.float32, "float16": np.float16}


def pair(rng: np.random.Generator, t: Tokens, B: int, N: int, K: int, floats: str = "") -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The binding's dict of a base and its values in one layout, and the two views (bytes, or elements of the dtype `floats`)."""
    views, made = [], []
    for rows in (N, K):
        d, view = t.make(rng, B, rows)
        if floats:  # small whole numbers and halves, so that no sum of float32 or float16 is rounded
            numbers = (rng.integers(-8, 8, d["data"].size // np.dtype(floats).itemsize) / 2).astype(floats)
            d["data"] = numbers.view(np.uint8).reshape(d["data"].shape)
            strides = (d["stride_b"], d["stride_n"], d["stride_m"], np.dtype(floats).itemsize)
            shape = (B, rows, t.M, t.W // np.dtype(floats).itemsize)
            view = np.lib.stride_tricks.as_strided(numbers, shape, strides) if numbers.size else np.zeros(shape, floats)
        views.append(view)
        made.append(d)
    joint = {
        "base": made[0]["data"],
        "value": made[1]["data"],
        "base_strides": [made[0][s] for s in ("stride_b", "stride_n", "stride_m")],
        "value_strides": [made[1][s] for s in ("stride_b", "stride_n", "stride_m")],
        "segments": t.M,
        "segment_bytes": t.W,
        "dtype": floats or "float32",
        "offset_bytes": t.offset,
    }
    return joint, views[0], views[1]


def scattered(base: np.ndarray, value: np.ndarray, index: np.ndarray, weights: np.ndarray | None, add: bool) -> np.ndarray:
    out = base.copy()
    for b, k in zip(*np.nonzero(index >= 0)):
        n = index[b, k]
        out[b, n] = base[b, n] + (1 if weights is None else weights[b, k]) * value[b, k] if add else value[b, k]
    return out


def check(
    kernels: Any, tensors: list[Tokens], B: int, N: int, index: np.ndarray, floats: str = "", weighted: bool = False, **plan: Any
) -> None:
    rng = np.random.default_rng(N + index.shape[1])
    made = [pair(rng, t, B, N, index.shape[1], floats) for t in tensors]
    weights = rng.integers(-3, 4, index.shape).astype(np.float32) if weighted else None
    p = {"B": B, "N": N, "K": index.shape[1], "index": index, "add": bool(floats), "weights": weights, **plan}
    for t, got, (_, base, value) in zip(tensors, kernels.scatter(p | {"tensors": [d for d, _, _ in made]}), made):
        want = scattered(base, value, index, weights, bool(floats))
        np.testing.assert_array_equal(got, np.ascontiguousarray(want).view(np.uint8).ravel(), err_msg=f"{t} {floats} {plan}")


def check_grad(kernels: Any, tensors: list[Tokens], B: int, N: int, index: np.ndarray, floats: str, **options: Any) -> None:
    rng = np.random.default_rng(N)
    K = index.shape[1]
    kind = FLOATS[floats]
    weights = rng.integers(-3, 4, index.shape).astype(np.float32)
    made, total = [], np.zeros(index.shape, np.float32)
    used = index[..., None, None] >= 0
    for t in tensors:
        d, _, value = pair(rng, t, B, N, K, floats)
        grad = (rng.integers(-8, 8, (B, N, t.M, t.W // np.dtype(kind).itemsize)) / 2).astype(kind)
        d["base"] = grad.view(np.uint8) if grad.size else np.zeros(0, np.uint8)
        rows = np.where(used, np.take_along_axis(grad, np.maximum(index, 0)[..., None, None], 1), 0) if N else np.zeros_like(value)
        total += (rows.astype(np.float32) * value).sum((2, 3))
        made.append((d, (weights[..., None, None] * rows).astype(kind)))
    p = {"B": B, "N": N, "K": K, "index": index, "weights": weights, "tensors": [d for d, _ in made], **options}
    of_values, of_weights = kernels.scatter_grad(p)
    for got, (_, want) in zip(of_values, made):
        np.testing.assert_array_equal(got.view(kind), want.ravel())
    if options.get("weights_wanted", True):
        np.testing.assert_array_equal(of_weights, total)


def runs(kernels: Any) -> list[dict[str, int]]:
    """The emulated GPU, then every CPU level."""
    return [{}] + [{"level": level} for level in kernels.cpu_levels()]


ADDED = [Tokens(64), Tokens(32, M=3, heads_first=True), Tokens(36), Tokens(4), Tokens(48, pad=4)]


def test_scatter_every_schedule(scheduled: Any) -> None:
    index = unique_index(np.random.default_rng(0), 2, 40, 17, holes=2)
    check(scheduled, MIXED, 2, 40, index, blocks_per_row=3, threads=64)
    check(scheduled, ADDED, 2, 40, index, "float32", True, blocks_per_row=2, threads=96)
    check_grad(scheduled, ADDED, 2, 40, index, "float32")


@pytest.mark.parametrize("W", [1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 80, 100, 512, 1040])
def test_scatter_widths(kernels: Any, W: int) -> None:
    index = unique_index(np.random.default_rng(W), 2, 20, 7)
    for run in runs(kernels):
        check(kernels, [Tokens(W), Tokens(W, M=2, heads_first=True), Tokens(W, M=3), Tokens(W, M=2, pad=4)], 2, 20, index, **run)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("floats", FLOATS)
def test_scatter_add(kernels: Any, floats: str, weighted: bool) -> None:
    size = np.dtype(floats).itemsize
    for C in (1, 2, 7, 8, 15, 16, 17, 31, 32, 100):
        tokens = [Tokens(C * size), Tokens(C * size, M=2, heads_first=True), Tokens(C * size, pad=size), Tokens(C * size, offset=size)]
        for run in runs(kernels):
            check(kernels, tokens, 2, 20, unique_index(np.random.default_rng(C), 2, 20, 7, holes=1), floats, weighted, **run)
            check_grad(kernels, tokens, 2, 20, unique_index(np.random.default_rng(C), 2, 20, 7, holes=1), floats, **run)


@pytest.mark.parametrize("K", [0, 1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("blocks", [1, 2, 5, 100])
def test_scatter_slices(kernels: Any, K: int, blocks: int) -> None:
    index = unique_index(np.random.default_rng(K), 3, 33, K)
    check(kernels, MIXED, 3, 33, index, blocks_per_row=blocks, threads=96)
    check(kernels, ADDED, 3, 33, index, "float32", blocks_per_row=blocks)


def test_scatter_empty(kernels: Any) -> None:
    for run in runs(kernels):
        check(kernels, MIXED, 0, 5, np.zeros((0, 3), dtype=np.int64), **run)
        check(kernels, MIXED, 2, 0, np.full((2, 3), -1, dtype=np.int64), **run)
        check(kernels, [Tokens(0), Tokens(4)], 2, 5, np.array([[0, 1], [4, -1]]), **run)
        check_grad(kernels, [Tokens(0)], 2, 5, np.array([[0, 1], [4, -1]]), "float32", **run)
        check_grad(kernels, [Tokens(4)], 2, 5, np.full((2, 3), -1, dtype=np.int64), "float32", **run)


def test_scatter_grad_writes_only_what_is_wanted(kernels: Any) -> None:
    index = unique_index(np.random.default_rng(3), 2, 9, 4)
    for run in runs(kernels):
        check_grad(kernels, ADDED, 2, 9, index, "float32", weights_wanted=False, **run)
        check_grad(kernels, ADDED, 2, 9, index, "float32", values_wanted=False, **run)


def test_scatter_out_of_range_index_is_skipped_on_the_gpu_and_an_error_on_the_cpu(kernels: Any) -> None:
    index = np.array([[2, 10**12, -(2**62), 4]], dtype=np.int64)
    d, base, value = pair(np.random.default_rng(0), Tokens(16), 1, 4, 4)
    p = {"B": 1, "N": 4, "K": 4, "index": index, "tensors": [d]}
    want = base.copy()
    want[0, 2] = value[0, 0]
    np.testing.assert_array_equal(kernels.scatter(p)[0], want.ravel())
    for level in kernels.cpu_levels():
        with pytest.raises(RuntimeError, match=r"every index must be in \[-1, N\)"):
            kernels.scatter(p | {"level": level})


def test_scatter_one_list_for_all_rows(kernels: Any) -> None:
    index = np.array([[8, 0, 4]], dtype=np.int64)
    d, base, value = pair(np.random.default_rng(2), Tokens(24), 3, 9, 3)
    for run in runs(kernels):
        got = kernels.scatter({"B": 3, "N": 9, "K": 3, "index": index, "index_stride": 0, "tensors": [d], **run})[0]
        np.testing.assert_array_equal(got, scattered(base, value, np.repeat(index, 3, axis=0), None, False).ravel())


def test_scatter_plan(kernels: Any) -> None:
    assert kernels.scatter_plan_cuda(1, 2944, 704, 8192, True) == (256, 528, 2944 * 2 * 8192 + 704 * 8200)  # four blocks an SM
    assert kernels.scatter_plan_cuda(64, 577, 100, 2048, False) == (256, 8, 64 * (577 * 2 * 2048 + 800))
    assert kernels.scatter_plan_cuda(1, 577, 144, 8, False)[1] == 1
