"""samples_cuda under the host SIMT runtime and samples_cpu at every level: exactly the picks of a search over all distances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits
from kernels.test_topk_cuda import DTYPES, random_scores
from reference.samples import sample_row


def check(run: Any, **p: Any) -> None:
    scores = np.atleast_2d(p["scores"])
    p = {"B": scores.shape[0], "N": scores.shape[1], **p, "scores": to_bits(scores, p.get("dtype", "float32"))}
    values = from_bits(p["scores"], p.get("dtype", "float32"))
    index, counts, overflow = run(p)
    capacity = p.get("capacity", p["R"])
    for b in range(p["B"]):
        counted = p["candidates"][b].tolist() if p.get("candidates") is not None else [True] * p["N"]
        points = p["points"][b] if p.get("points") is not None else p["R"]
        want = sample_row([float(v) for v in values[b, : p["N"]]], points, counted)
        message = f"row {b} of { {k: v for k, v in p.items() if k != 'scores'} }"
        assert (int(counts[b]), bool(overflow[b])) == (len(want), len(want) > capacity), message
        kept = want[len(want) - capacity :] if len(want) > capacity else want
        assert index[b].tolist() == kept + [-1] * (capacity - len(kept)), message


def attention(seed: int, B: int, N: int) -> np.ndarray:
    x = np.exp(2 * np.random.default_rng(seed).standard_normal((B, N)))
    return (x / x.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("limit", [{}, {"smem_per_block": 1024}], ids=["shared", "workspace"])
def test_samples_every_schedule(scheduled: Any, limit: dict[str, int]) -> None:
    rng = np.random.default_rng(3)
    check(scheduled.samples_cuda, scores=attention(1, 2, 196), R=60, **limit)
    scores, candidates = random_scores(2, 2, 200, 3), rng.random((2, 200)) < 0.6
    points = rng.uniform(-0.1, 1.1, (2, 40)).astype(np.float32)
    check(scheduled.samples_cuda, scores=scores, R=40, points=points, candidates=candidates, capacity=9, threads=64, **limit)


@pytest.mark.parametrize("limit", [{}, {"smem_per_block": 1024}], ids=["shared", "workspace"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_cuda_sizes(kernels: Any, dtype: str, limit: dict[str, int]) -> None:
    for N in (1, 2, 3, 31, 33, 64, 130, 257):
        for R in (0, 1, 2, N, 3 * N):
            check(kernels.samples_cuda, scores=attention(N, 2, N), R=R, dtype=dtype, **limit)
            check(kernels.samples_cuda, scores=random_scores(N, 2, N, R % 4), R=R, capacity=R // 2, dtype=dtype, **limit)


@pytest.mark.parametrize("level", range(3), ids=["baseline", "avx2", "avx512"])
def test_samples_cpu(kernels: Any, level: int) -> None:
    if level not in kernels.cpu_levels():
        pytest.skip("not on this machine")
    for N in (1, 2, 15, 16, 17, 40, 41, 196, 600):
        for dtype in DTYPES:
            for R in (0, 1, 2, N, 2 * N):
                check(kernels.samples_cpu, scores=attention(N, 2, N), R=R, dtype=dtype, level=level)
                check(kernels.samples_cpu, scores=random_scores(N, 2, N, R % 4), R=R, capacity=R // 2, dtype=dtype, level=level)


def test_samples_equal_scores_and_equal_values(kernels: Any) -> None:
    """Distances that tie: equal scores, masses below the last bit of a float32 sum, points between two values and on them."""
    tiny = np.array([[1.0, 1.0, 1e-9, 1e-9, 1e-9, 1e-12, 0.0, 0.0]], dtype=np.float32)
    points = np.array([[0.0, 0.25, 0.5, 0.75, 1.0, 2.0, -1.0, np.nan, np.inf, -np.inf, 1e-9, 5e-10, 0.49999997]], dtype=np.float32)
    for run in (kernels.samples_cuda, kernels.samples_cpu):
        for scores in (np.full((1, 5), 0.25, np.float32), tiny, -tiny, np.zeros((1, 6), np.float32)):
            check(run, scores=scores, R=points.shape[1], points=points)
            check(run, scores=scores, R=7)


def test_samples_larger_rows(kernels: Any) -> None:
    check(kernels.samples_cuda, scores=attention(5, 1, 3000), R=300)
    check(kernels.samples_cpu, scores=attention(5, 1, 3000), R=300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_strided_and_unaligned_rows(kernels: Any, dtype: str) -> None:
    for run in (kernels.samples_cuda, kernels.samples_cpu):
        check(run, scores=random_scores(2, 3, 73), N=70, score_stride=73, offset_bytes=4, R=20, dtype=dtype)


def test_samples_empty(kernels: Any) -> None:
    for run in (kernels.samples_cuda, kernels.samples_cpu):
        check(run, B=0, N=5, scores=np.zeros((0, 5)), R=3)
        check(run, B=2, N=0, scores=np.zeros((2, 0)), R=3)
        check(run, scores=attention(1, 2, 9), R=4, candidates=np.zeros((2, 9), dtype=bool))


def test_samples_fuzz(kernels: Any) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        B, N = int(rng.integers(1, 4)), int(np.exp(rng.uniform(0, 6)))
        p: dict[str, Any] = {"scores": attention(seed, B, N) if seed % 2 else random_scores(seed, B, N, int(rng.integers(0, 4)))}
        p["R"] = int(rng.integers(0, 2 * N + 1))
        if rng.random() < 0.5:
            p["candidates"] = rng.random((B, N)) < rng.random()
        if rng.random() < 0.5:
            p["points"] = rng.uniform(-0.2, 1.2, (B, p["R"])).astype(np.float32)
        if rng.random() < 0.3:
            p["capacity"] = int(rng.integers(0, p["R"] + 1))
        p["dtype"] = DTYPES[seed % 3]
        check(kernels.samples_cuda, **p)
        for level in kernels.cpu_levels():
            check(kernels.samples_cpu, **p, level=level)


def test_samples_plan(kernels: Any) -> None:
    def plan(N: int, **device: int) -> dict[str, int]:
        return kernels.samples_plan_cuda({"B": 3, "N": N, "R": 196, **device})

    assert plan(196) == {"threads": 128, "smem_bytes": 256 * 8 + 64, "workspace_bytes": 0, "bytes_moved": 3 * (196 * 4 + 196 * 8)}
    assert plan(16_384)["smem_bytes"] == 16_384 * 8 + 512 * 8
    assert plan(16_385) == {
        "threads": 1024,
        "smem_bytes": 0,
        "workspace_bytes": 3 * 32_768 * 8 + 3 * 1024 * 8,
        "bytes_moved": 3 * (16_385 * 4 + 1568),
    }
    assert plan(9000, smem_per_block=99 * 1024)["smem_bytes"] == 0
