"""cosine_cpu and diverse_cpu at every instruction level, on exact-size buffers filled with NaN bits; what the plans choose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.test_cpu_kernels import Cpu, cpu  # noqa: F401  (a fixture)

MATCH, NONE, MEAN, SUM, MAX = range(5)
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def rows(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Values that all dtypes hold, small integers: every dot product and squared norm is exact."""
    x = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.astype(dtype)


def as_float(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) if x.dtype == np.uint16 else x.astype(np.float64)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y = as_float(a), as_float(b)
    norms = np.linalg.norm(x, axis=-1)[:, :, None] * np.linalg.norm(y, axis=-1)[:, None, :]
    return np.divide(x @ y.transpose(0, 2, 1), norms, out=np.zeros(norms.shape), where=norms > 0)


COSINE = [(1, 1, 1, 1), (2, 3, 37, 5), (1, 145, 17, 33), (1, 9, 300, 130), (2, 150, 160, 129), (1, 20, 0, 8), (1, 20, 30, 0)]


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("sizes", COSINE, ids=str)
def test_cosine_cpu(cpu: Cpu, sizes: tuple[int, ...], dtype: str) -> None:  # noqa: F811
    B, M, N, C = sizes
    a, b = rows(M, B, M, C, dtype=dtype), rows(N, B, N, C, dtype=dtype)
    mask = np.random.default_rng(N).random((B, N)) < 0.6
    pairs = np.where(mask[:, None], cosine(a, b), -np.inf)
    call = {"sizes": list(sizes), "a": a, "b": b, "candidates": mask, "dtype": dtype, "offset_bytes": BYTES[dtype]}
    results = []
    for split in (False, True):
        cpu.split = split
        got = cpu.cosine_cuda(call | {"reduction": MATCH, "T": 4})
        best = -np.sort(-pairs, axis=-1)[..., :4]
        used = best > -np.inf
        value, index = got["value"][..., : best.shape[-1]], got["index"][..., : best.shape[-1]]
        np.testing.assert_allclose(value, np.where(used, best, 0.0), atol=1e-6)
        assert ((index >= 0) == used).all()
        if N:
            np.testing.assert_allclose(np.take_along_axis(pairs, index.clip(0), -1)[used], best[used], atol=1e-6)
        outputs = [got["value"], got["index"]]
        for reduction in (NONE, MEAN, SUM, MAX):
            outputs.append(cpu.cosine_cuda(call | {"reduction": reduction})["value"])
        results.append(outputs)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other, err_msg="the order of the tasks changed a result")


def loop(x: np.ndarray, picks: int) -> list[int]:
    """The published loop on exact squared distances."""
    d = np.square(x[:, None] - x[None]).sum(-1)
    others = d + np.where(np.eye(len(x), dtype=bool), np.inf, 0.0)
    chosen = [int(others.min(0).argmax())]
    while len(chosen) < picks:
        near = d[chosen].min(0)
        near[chosen] = -1.0
        chosen.append(int(near.argmax()))
    return chosen


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 17, 5, 17), (1, 145, 3, 60), (1, 300, 130, 40), (1, 33, 0, 33)], ids=str)
def test_diverse_cpu_stored_and_recomputed_distances_give_the_picks_of_the_loop(cpu: Cpu, sizes: tuple[int, ...], dtype: str) -> None:  # noqa: F811
    B, N, C, K = sizes
    x = rows(N, B, N, C, dtype=dtype)
    want = np.array([loop(as_float(x[b]), K) for b in range(B)])
    call = {"sizes": list(sizes), "x": x, "dtype": dtype, "offset_bytes": BYTES[dtype]}
    for store in (True, False):
        for split in (False, True):
            cpu.split = split
            np.testing.assert_array_equal(cpu.diverse_cuda(call | {"metric": 1, "store": store})["index"], want)
            first = cpu.diverse_cuda(call | {"metric": 1, "store": store, "first": want[:, 0]})["index"]
            np.testing.assert_array_equal(first, want)
    cosines = [cpu.diverse_cuda(call | {"metric": 0, "store": store})["index"] for store in (True, False)]
    np.testing.assert_array_equal(*cosines)


def landscapes() -> dict[str, np.ndarray]:
    """1000 points of small integers, whose squares are exact in float32: seven blocks."""
    random, N = np.random.default_rng(0), 1000
    one_hot = np.eye(N, 40, dtype=np.float32)  # all but 40 are the same point
    line = np.stack([np.arange(N) % 250, np.arange(N) // 250 * 700], 1)
    twins = random.integers(-30, 31, (N // 2, 3))
    return {
        "normal": random.normal(0, 20, (N, 4)).round(),
        "clusters": (random.integers(-9, 10, (8, 5)) * 50)[random.integers(0, 8, N)] + random.integers(-2, 3, (N, 5)),
        "line": line,
        "shuffled line": random.permutation(line),
        "twins": np.concatenate([twins, twins + np.array([0, 0, 1])]),
        "one far point": np.concatenate([random.integers(-2, 3, (N - 1, 3)), [[90, 0, 0]]]),
        "alike": np.ones((N, 2)),
        "one hot": one_hot,
        "spreading": np.arange(N)[:, None] ** 2 // 350,
    }


@pytest.mark.parametrize("kind", landscapes())
def test_diverse_cpu_picks_of_the_loop_on_integer_landscapes(cpu: Cpu, kind: str) -> None:  # noqa: F811
    x = landscapes()[kind].astype(np.float32)[None]
    sizes = [1, *x.shape[1:], 40]
    want = np.array([loop(x[0].astype(np.float64), 40)])
    for split in (False, True):
        cpu.split = split
        np.testing.assert_array_equal(cpu.diverse_cuda({"sizes": sizes, "x": x, "metric": 1})["index"], want)
    mask = np.random.default_rng(1).random((1, 1000)) < 0.7
    kept = np.flatnonzero(mask[0])
    got = cpu.diverse_cuda({"sizes": sizes, "x": x, "metric": 1, "candidates": mask})["index"]
    np.testing.assert_array_equal(got, kept[loop(x[0, kept].astype(np.float64), 40)][None])


def test_diverse_cpu_plan_stores_the_matrix_unless_few_rows_do(kernels: Any) -> None:
    x = np.ones((1, 400, 4), np.float32)
    for K, first, stores in ((22, None, True), (22, [0], False), (23, [0], True), (400, [0], True)):
        given = None if first is None else np.array(first)
        assert kernels.diverse_cpu({"sizes": [1, 400, 4, K], "x": x, "first": given})["store"] is stores
    assert kernels.diverse_cpu({"sizes": [1, 400, 4, 9], "x": x})["flops"] == 400 * 399 * 4


def test_cosine_cpu_plan_splits_columns_only_where_rows_are_few(kernels: Any) -> None:
    b = np.ones((1, 2000, 2), np.float32)
    for M, splits in ((1, 14), (144, 14), (145, 14), (1000, 5)):
        assert kernels.cosine_cpu({"sizes": [1, M, 2000, 2], "a": b[:, :M], "b": b})["splits"] == splits
