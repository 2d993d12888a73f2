"""topk_cuda under the host SIMT runtime, exactly against a sort in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits

DTYPES = ["float32", "float16", "bfloat16"]
# Scores in registers, 4 and 16 a thread; read again by every pass; in shared memory (16 bytes for 4 tokens; 3 KB hold 768, more re-read).
REREAD = {"items_per_thread": 0, "threads": 64}
SHAPES = [{}, {"items_per_thread": 16}, REREAD, REREAD | {"hold": 3 * 1024}]
SHAPE_IDS = ["registers4", "registers16", "reread", "shared"]


def expected(p: dict[str, Any]) -> np.ndarray:
    """Sorts (always_keep, score with NaN last, lowest index) and cuts."""
    B, N, K = p["B"], p["N"], p["K"]
    values = from_bits(p["scores"], p.get("dtype", "float32"))[:, :N]
    prefix, suffix, offset = p.get("prefix", 0), p.get("suffix", 0), p.get("offset", 0)
    out = np.full((B, prefix + K + suffix), -1, dtype=np.int64)
    for b in range(B):
        always = p["always_keep"][b].astype(bool) if p.get("always_keep") is not None else np.zeros(N, dtype=bool)
        candidate = p["candidates"][b].astype(bool) if p.get("candidates") is not None else np.ones(N, dtype=bool)
        rank = np.where(np.isnan(values[b]), -np.inf, values[b])
        order = np.lexsort((np.arange(N), -rank, np.isnan(values[b]), ~always))
        order = order[(always | candidate)[order]]
        k = K if p.get("k_rows") is None else int(p["k_rows"][b])
        kept = order[:k]
        if p.get("order", "position") == "position":
            kept = np.sort(kept)
        row = [*range(offset - prefix, offset), *(kept + offset), *range(offset + N, offset + N + suffix)]
        out[b, : len(row)] = row
    return out


def check(kernels: Any, **p: Any) -> None:
    scores = np.atleast_2d(p["scores"])
    p = {"B": scores.shape[0], "N": scores.shape[1], **p, "scores": to_bits(scores, p.get("dtype", "float32"))}
    if "hold" in p:  # beside the keys of order = score
        p["smem_bytes"] = p.pop("hold") + kernels.topk_plan_cuda(p)["smem_bytes"]
    got = kernels.topk_cuda(p)
    np.testing.assert_array_equal(got, expected(p), err_msg=f"{ {k: v for k, v in p.items() if k != 'scores'} }")


def random_scores(seed: int, B: int, N: int, distinct: int = 0) -> np.ndarray:
    """Scores with ties when `distinct` is small, plus every special value."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((B, N)) if distinct == 0 else rng.integers(-distinct, distinct, (B, N)) / 8.0
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40])
    where = rng.random((B, N)) < 0.1
    return np.where(where, rng.choice(special, (B, N)), x)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("order", ["position", "score"])
def test_topk_every_schedule(scheduled: Any, order: str, shape: dict[str, int]) -> None:
    rng = np.random.default_rng(3)
    masks = {name: rng.random((2, 300)) < 0.4 for name in ("candidates", "always_keep")}
    check(scheduled, scores=random_scores(1, 2, 300, 3), K=70, order=order, **shape)
    check(scheduled, scores=random_scores(2, 2, 300), K=150, order=order, **masks, **shape)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [0, 1, 4])
def test_topk_every_k(kernels: Any, dtype: str, distinct: int, shape: dict[str, int]) -> None:
    N = 67
    for K in (0, 1, 2, 31, 32, 33, 66, 67):
        check(kernels, scores=random_scores(K, 3, N, distinct), K=K, dtype=dtype, **shape)


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257, 513, 1025])
def test_topk_row_lengths(kernels: Any, N: int) -> None:
    for shape in SHAPES:
        check(kernels, scores=random_scores(N, 2, N), K=(N + 1) // 2, **shape)
        check(kernels, scores=random_scores(N, 2, N, 2), K=(N + 2) // 3, order="score", **shape)


@pytest.mark.parametrize("N", [4097, 16385])
def test_topk_planned_shapes(kernels: Any, N: int) -> None:
    """16 a thread and re-read, as the plan chooses them, with 1024 threads."""
    plan = kernels.topk_plan_cuda({"B": 1, "N": N, "K": 100})
    assert plan["items_per_thread"] == (16 if N <= 16384 else 0)
    assert plan["smem_bytes"] == (0 if N <= 16384 else 5 * 1024 * 16)
    check(kernels, scores=random_scores(N, 1, N), K=N // 4)
    check(kernels, scores=random_scores(N, 1, N, 2), K=N // 4)
    check(kernels, scores=random_scores(N, 1, N, 2), K=N // 4, order="score")


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("value", [0.25, 0.0, np.nan, np.inf, -np.inf, -1e-45])
def test_topk_all_equal_takes_the_lowest_indices(kernels: Any, value: float, shape: dict[str, int]) -> None:
    for order in ("position", "score"):
        check(kernels, scores=np.full((2, 200), value), K=77, order=order, **shape)


def test_topk_zero_signs_are_equal(kernels: Any) -> None:
    check(kernels, scores=np.array([[-0.0, 0.0, -0.0, 0.0, 1.0, -1.0]]), K=3)
    check(kernels, scores=np.array([[-0.0, 0.0, -0.0, 0.0, 1.0, -1.0]]), K=3, order="score")


def test_topk_nan_ranks_below_minus_infinity(kernels: Any) -> None:
    check(kernels, scores=np.array([[np.nan, -np.inf, np.nan, -np.inf, 2.0]]), K=3)
    check(kernels, scores=np.array([[np.nan, -np.inf, np.nan, -np.inf, 2.0]]), K=4, order="score")


@pytest.mark.parametrize("low_bits", [0, 9, 10, 11, 20, 21, 22])
def test_topk_scores_that_differ_in_one_bit(kernels: Any, low_bits: int) -> None:
    """Neighbours on both sides of every digit of the radix."""
    base = np.uint32(0x3F9A5A5A)
    bits = base ^ (np.arange(64, dtype=np.uint32) % 2 << np.uint32(low_bits))
    for K in (5, 32, 33):
        check(kernels, scores=np.broadcast_to(bits.view(np.float32), (1, 64)).astype(np.float64), K=K)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_topk_candidates_and_always_keep(kernels: Any, shape: dict[str, int]) -> None:
    rng = np.random.default_rng(5)
    for density in (0.0, 0.05, 0.5, 1.0):
        candidates, always = rng.random((3, 90)) < density, rng.random((3, 90)) < 0.2
        for K in (0, 1, 15, 40, 90):
            scores = random_scores(K, 3, 90, 2)
            check(kernels, scores=scores, K=K, candidates=candidates, **shape)
            check(kernels, scores=scores, K=K, always_keep=always, **shape)
            check(kernels, scores=scores, K=K, candidates=candidates, always_keep=always, order="score", **shape)


def test_topk_k_per_row(kernels: Any) -> None:
    k_rows = np.array([0, 1, 20, 64, 40], dtype=np.int64)
    for order in ("position", "score"):
        check(kernels, scores=random_scores(1, 5, 64), K=64, k_rows=k_rows, order=order)
    check(kernels, scores=random_scores(1, 5, 64), K=64, k_rows=k_rows, prefix=3, suffix=5, offset=7)


@pytest.mark.parametrize(("prefix", "suffix", "offset"), [(0, 0, 35), (35, 0, 35), (0, 9, 0), (12, 9, 12), (700, 300, 700)])
def test_topk_prefix_and_suffix(kernels: Any, prefix: int, suffix: int, offset: int) -> None:
    for K in (0, 10, 50):
        check(kernels, scores=random_scores(K, 2, 50), K=K, prefix=prefix, suffix=suffix, offset=offset)
    candidates = np.arange(50) % 3 == 0
    check(kernels, scores=random_scores(1, 1, 50), K=40, candidates=candidates[None], prefix=prefix, suffix=suffix, offset=offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_strided_and_unaligned_rows(kernels: Any, dtype: str) -> None:
    """Rows of 70 in storage of 73, from 4 bytes off alignment."""
    storage = random_scores(2, 3, 73)
    p = {"B": 3, "N": 70, "K": 21, "score_stride": 73, "offset_bytes": 4, "dtype": dtype, "scores": to_bits(storage, dtype)}
    np.testing.assert_array_equal(kernels.topk_cuda(p), expected(p))


def test_topk_sort_in_the_workspace(kernels: Any) -> None:
    """More keys than shared memory holds: the same sort on global memory."""
    p = {"smem_per_block": 9 * 1024 + 512}
    plan = kernels.topk_plan_cuda({"B": 2, "N": 200, "K": 65, "order": "score", **p})
    assert (plan["workspace_bytes"], plan["smem_bytes"]) == (2 * 128 * 8, 0)
    check(kernels, scores=random_scores(4, 2, 200), K=65, order="score", **p)


def test_topk_empty(kernels: Any) -> None:
    check(kernels, B=0, N=5, scores=np.zeros((0, 5)), K=3)
    check(kernels, B=2, N=0, scores=np.zeros((2, 0)), K=0)
    check(kernels, B=2, N=0, scores=np.zeros((2, 0)), K=0, prefix=4, suffix=2, offset=4)


def test_topk_fuzz(kernels: Any) -> None:
    """Seeded sizes, densities and ties; a failing seed is in the message."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        B, N = int(rng.integers(1, 4)), int(np.exp(rng.uniform(0, 6)))
        p: dict[str, Any] = {"scores": random_scores(seed, B, N, int(rng.integers(0, 4))), "K": int(rng.integers(0, N + 1))}
        if rng.random() < 0.5:
            p["candidates"] = rng.random((B, N)) < rng.random()
        if rng.random() < 0.5:
            p["always_keep"] = rng.random((B, N)) < rng.random() ** 2
        if rng.random() < 0.5:
            p["k_rows"] = rng.integers(0, p["K"] + 1, B)
        p["order"] = "score" if rng.random() < 0.3 else "position"
        check(kernels, dtype=DTYPES[seed % 3], **p, **SHAPES[int(rng.integers(0, 4))])


def test_topk_refuses_what_it_cannot_do(kernels: Any) -> None:
    scores = np.zeros((1, 8), dtype=np.float32)
    p = {"B": 1, "N": 8, "K": 2, "scores": scores}
    with pytest.raises(RuntimeError, match="prefix and suffix need order position"):
        kernels.topk_cuda(p | {"order": "score", "prefix": 1})
    with pytest.raises(RuntimeError, match="K must be in"):
        kernels.topk_cuda(p | {"K": 9})
    with pytest.raises(RuntimeError, match="does not hold the row"):
        kernels.topk_cuda(p | {"N": 300, "scores": np.zeros((1, 300), np.float32), "items_per_thread": 4, "threads": 64})


def test_topk_plan(kernels: Any) -> None:
    def plan(N: int) -> tuple[int, int]:
        p = kernels.topk_plan_cuda({"B": 8, "N": N, "K": 1})
        return p["items_per_thread"], p["threads"]

    assert plan(1) == (4, 64)
    assert plan(577) == (4, 160)
    assert plan(2944) == (4, 736)
    assert plan(4096) == (4, 1024)
    assert plan(16384) == (16, 1024)
    assert plan(65536) == (0, 1024)
    assert kernels.topk_plan_cuda({"B": 8, "N": 50176, "K": 5017})["smem_bytes"] == 13 * 1024 * 16  # held
    assert kernels.topk_plan_cuda({"B": 8, "N": 65536, "K": 5017})["smem_bytes"] == 0  # read again
    assert kernels.topk_plan_cuda({"B": 8, "N": 2880, "K": 640})["bytes_moved"] == 8 * (2880 * 4 + 640 * 8)
