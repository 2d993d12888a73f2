"""pack_cuda under the host SIMT runtime, and pack_cpu at every level, on exact-size buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def packed(index: np.ndarray, N: int, capacity: int) -> tuple[np.ndarray, ...]:
    rows, slots, lengths = [], np.full(index.shape, -1, np.int64), [0]
    total = 0
    for b, row in enumerate(index):
        for k, n in enumerate(row):
            if n >= 0:
                if total < capacity:
                    rows.append(b * N + n)
                    slots[b, k] = total
                total += 1
        lengths.append(min(total, capacity))
    rows += [-1] * (capacity - len(rows))
    return np.array(rows, np.int64), slots, np.array(lengths, np.int32), np.array([total])


def random_index(seed: int, B: int, N: int, K: int, share: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((B, K)) < share, rng.integers(0, max(N, 1), (B, K)), -1) if N else np.full((B, K), -1)


def check(kernels: Any, index: np.ndarray, N: int, capacity: int, **plan: Any) -> None:
    d = {"B": index.shape[0], "N": N, "K": index.shape[1], "index": index, "capacity": capacity, **plan}
    for got, want in zip(kernels.pack(d), packed(index, N, capacity)):
        np.testing.assert_array_equal(got, want, err_msg=f"{index.shape} capacity {capacity} {plan}")


def test_pack_every_schedule(scheduled: Any) -> None:
    for threads in (64, 128):
        check(scheduled, random_index(1, 5, 300, 150, 0.6), 300, 400, threads=threads)
        check(scheduled, random_index(2, 3, 40, 70, 0.9), 40, 90, threads=threads)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_pack_shapes(kernels: Any, share: float) -> None:
    runs = [{}] + [{"level": level} for level in kernels.cpu_levels()]
    for B, N, K in [(0, 5, 3), (1, 1, 1), (3, 0, 4), (2, 9, 0), (4, 40, 31), (4, 40, 32), (70, 40, 33), (2, 900, 600), (1, 2000, 1100)]:
        index = random_index(B + K, B, N, K, share)
        used = int((index >= 0).sum())
        for capacity in {0, 1, used // 2, max(used - 1, 0), used, used + 1, B * K + 7}:
            for run in runs:
                check(kernels, index, N, capacity, **run)


def test_pack_one_list_for_all_rows(kernels: Any) -> None:
    index = np.array([[8, -1, 4]], dtype=np.int64)
    for run in [{}] + [{"level": level} for level in kernels.cpu_levels()]:
        got = kernels.pack({"B": 3, "N": 9, "K": 3, "index": index, "index_stride": 0, "capacity": 9, **run})
        for g, want in zip(got, packed(np.repeat(index, 3, axis=0), 9, 9)):
            np.testing.assert_array_equal(g, want)


def test_pack_out_of_range_index_is_unused_on_the_gpu_and_an_error_on_the_cpu(kernels: Any) -> None:
    index = np.array([[2, 10**12, -(2**62), 1], [4, 3, 0, -1]], dtype=np.int64)
    p = {"B": 2, "N": 4, "K": 4, "index": index, "capacity": 8}
    clean = np.where((index >= 0) & (index < 4), index, -1)
    for got, want in zip(kernels.pack(p), packed(clean, 4, 8)):
        np.testing.assert_array_equal(got, want)
    for level in kernels.cpu_levels():
        with pytest.raises(RuntimeError, match=r"every index must be in \[-1, N\)"):
            kernels.pack(p | {"level": level})


def test_pack_plan(kernels: Any) -> None:
    assert kernels.pack_plan_cuda(64, 197, 64 * 197) == (224, 256, 8 * 4 * 64 * 197 + 260)
    assert kernels.pack_plan_cuda(1, 5, 5)[0] == 64
    assert kernels.pack_plan_cuda(1, 50_000, 5)[0] == 512
