"""quantiles_cuda under the host SIMT runtime and quantiles_cpu at every level: to the bit against a sort."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits
from kernels.test_topk_cuda import DTYPES, SHAPE_IDS, SHAPES
from reference.quantiles import quantile_row

Q = [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]


def check(run: Any, **p: Any) -> None:
    scores = np.atleast_2d(p["scores"])
    with np.errstate(over="ignore"):  # 3e38 becomes inf in float16
        p = {"B": scores.shape[0], "N": scores.shape[1], "q": Q, **p, "scores": to_bits(scores, p.get("dtype", "float32"))}
    values = from_bits(p["scores"], p.get("dtype", "float32"))
    got = run(p)
    for b in range(p["B"]):
        counted = p["candidates"][b].tolist() if p.get("candidates") is not None else [True] * p["N"]
        want = np.array([quantile_row([float(v) for v in values[b, : p["N"]]], q, counted) for q in p["q"]], dtype=np.float32)
        np.testing.assert_array_equal(got[b], want, err_msg=f"row {b} of { {k: v for k, v in p.items() if k != 'scores'} }")


def rows(seed: int, B: int, N: int, distinct: int = 0, infinities: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, N)) if distinct == 0 else rng.integers(-distinct, distinct, (B, N)) / 8.0
    special = np.array([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38] + [np.inf, -np.inf] * infinities)
    return np.where(rng.random((B, N)) < 0.2, rng.choice(special, (B, N)), x)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_quantiles_every_schedule(scheduled: Any, shape: dict[str, int]) -> None:
    candidates = np.random.default_rng(3).random((2, 300)) < 0.6
    check(scheduled.quantiles_cuda, scores=rows(1, 2, 300), q=[0.05, 0.75], **shape)
    check(scheduled.quantiles_cuda, scores=rows(2, 2, 300, 3, True), q=[0.25, 1.0], candidates=candidates, **shape)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantiles_cuda(kernels: Any, dtype: str, shape: dict[str, int]) -> None:
    for N in (1, 2, 3, 5, 33, 128, 129, 255):
        for distinct in (0, 1, 4):
            check(kernels.quantiles_cuda, scores=rows(N, 2, N, distinct, N % 2 == 0), dtype=dtype, **shape)


@pytest.mark.parametrize("level", range(3), ids=["baseline", "avx2", "avx512"])
def test_quantiles_cpu(kernels: Any, level: int) -> None:
    if level not in kernels.cpu_levels():
        pytest.skip("not on this machine")
    for N in (1, 2, 15, 16, 17, 33, 256, 257, 577, 1300):
        for dtype in DTYPES:
            for distinct in (0, 1, 4):
                check(kernels.quantiles_cpu, scores=rows(N, 2, N, distinct, N % 2 == 0), dtype=dtype, level=level)
            check(
                kernels.quantiles_cpu,
                scores=rows(N, 2, N),
                candidates=np.random.default_rng(N).random((2, N)) < 0.3,
                dtype=dtype,
                level=level,
            )


@pytest.mark.parametrize("N", [4097, 16385])
def test_quantiles_planned_shapes(kernels: Any, N: int) -> None:
    check(kernels.quantiles_cuda, scores=rows(N, 1, N), q=[0.1, 0.9])
    check(kernels.quantiles_cuda, scores=np.full((1, N), -0.25), q=[0.3])


@pytest.mark.parametrize("low_bits", [0, 9, 10, 11, 20, 21, 22])
def test_quantiles_of_scores_that_differ_in_one_bit(kernels: Any, low_bits: int) -> None:
    bits = np.uint32(0x3F9A5A5A) ^ (np.arange(64, dtype=np.uint32) % 2 << np.uint32(low_bits))
    for run in (kernels.quantiles_cuda, kernels.quantiles_cpu):
        check(run, scores=bits.view(np.float32)[None], q=[0.4, 31 / 63, 0.5, 32 / 63, 0.6])


def test_quantiles_nan_and_no_candidates(kernels: Any) -> None:
    scores = rows(1, 3, 40)
    scores[0, 7] = np.nan
    scores[1, 9] = np.nan
    candidates = np.ones((3, 40), dtype=bool)
    candidates[1, 9] = False  # a NaN that does not count
    candidates[2] = False
    for run in (kernels.quantiles_cuda, kernels.quantiles_cpu):
        check(run, scores=scores, candidates=candidates)
        check(run, scores=scores)
        assert np.isnan(run({"B": 2, "N": 0, "scores": np.zeros((2, 0), np.float32), "q": [0.5]})).all()
        assert run({"B": 0, "N": 5, "scores": np.zeros((0, 5), np.float32), "q": [0.5]}).shape == (0, 1)
        assert run({"B": 2, "N": 5, "scores": np.zeros((2, 5), np.float32), "q": []}).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantiles_strided_and_unaligned_rows(kernels: Any, dtype: str) -> None:
    for run in (kernels.quantiles_cuda, kernels.quantiles_cpu):
        check(run, scores=rows(2, 3, 73), N=70, score_stride=73, offset_bytes=4, dtype=dtype)


def test_quantiles_fuzz(kernels: Any) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        B, N = int(rng.integers(1, 4)), int(np.exp(rng.uniform(0, 6)))
        p: dict[str, Any] = {"scores": rows(seed, B, N, int(rng.integers(0, 4)), bool(rng.random() < 0.5)), "q": rng.random(3).tolist()}
        if rng.random() < 0.5:
            p["candidates"] = rng.random((B, N)) < rng.random()
        p["dtype"] = DTYPES[seed % 3]
        check(kernels.quantiles_cuda, **p, **SHAPES[int(rng.integers(0, 4))])
        for level in kernels.cpu_levels():
            check(kernels.quantiles_cpu, **p, level=level)


def test_quantiles_plan(kernels: Any) -> None:
    def plan(N: int) -> dict[str, int]:
        return kernels.quantiles_plan_cuda({"B": 8, "N": N, "q": [0.25, 0.75]})

    assert plan(577) == {"threads": 160, "items_per_thread": 4, "smem_bytes": 0, "bytes_moved": 2 * 8 * 577 * 4 + 8 * 2 * 4}
    assert plan(16384)["items_per_thread"] == 16
    assert plan(50_176)["smem_bytes"] == 13 * 1024 * 16
