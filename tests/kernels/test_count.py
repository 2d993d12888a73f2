"""count_cuda under the host SIMT runtime and count_cpu at every level: exactly the counts of the integers that count.h documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits
from kernels.test_topk_cuda import DTYPES, REREAD, random_scores
from reference.counts import mass_row, threshold_row

REACH, BELOW, ABOVE, FROM = range(4)
RULES = ["reach", "below", "above", "from"]
# As select_topk's, but for 16 scores a thread, which need more than 64 registers here.
SHAPES = [{}, REREAD, REREAD | {"hold": 3 * 1024}]
SHAPE_IDS = ["registers", "reread", "shared"]


def expected(p: dict[str, Any]) -> tuple[list[int], list[int], list[bool]]:
    B, N, rule = p["B"], p["N"], p["rule"]
    values = from_bits(p["scores"], p.get("dtype", "float32"))[:, :N]
    limits = {"min_k": p.get("min_k", 0), "max_k": p.get("max_k", N)}
    counts = []
    for b in range(B):
        masks = {
            name: p[key][b].astype(bool).tolist() if p.get(key) is not None else [name == "candidates"] * N
            for name, key in (("candidates", "candidates"), ("always", "always_keep"))
        }
        level = float(p["levels"][b]) if p.get("levels") is not None else p["level"]
        row = [float(v) for v in values[b]]
        if rule in (REACH, BELOW):
            tokens = mass_row(row, level, below=rule == BELOW, extra=p.get("extra", 0), **limits, **masks)
        else:
            tokens = threshold_row(row, float(np.float32(level)), strict=rule == ABOVE, **limits, **masks)
        counts.append(len(tokens))
    capacity = p.get("capacity", N)
    return counts, [min(c, capacity) for c in counts], [c > capacity for c in counts]


def check(run: Any, **p: Any) -> None:
    scores = np.atleast_2d(p["scores"])
    p = {"B": scores.shape[0], "N": scores.shape[1], **p, "scores": to_bits(scores, p.get("dtype", "float32"))}
    got = tuple(part.tolist() for part in run(p))
    assert got == expected(p), f"{ {k: v for k, v in p.items() if k != 'scores'} }"


def attention(seed: int, B: int, N: int) -> np.ndarray:
    x = np.exp(3 * np.random.default_rng(seed).standard_normal((B, N)))
    return (x / x.sum(1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("rule", range(4), ids=RULES)
def test_count_every_schedule(scheduled: Any, rule: int, shape: dict[str, int]) -> None:
    rng = np.random.default_rng(3)
    masks = {name: rng.random((2, 300)) < share for name, share in (("candidates", 0.6), ("always_keep", 0.1))}
    level = 0.7 if rule in (REACH, BELOW) else 0.01
    check(scheduled.count_cuda, scores=attention(1, 2, 300), rule=rule, level=level, **shape)
    check(scheduled.count_cuda, scores=random_scores(2, 2, 300, 3), rule=rule, level=level, capacity=20, **masks, **shape)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_count_mass_shares(kernels: Any, dtype: str, shape: dict[str, int]) -> None:
    for seed, (rule, share) in enumerate((r, s) for r in (REACH, BELOW) for s in (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0)):
        check(kernels.count_cuda, scores=attention(seed, 2, 131), rule=rule, level=share, dtype=dtype, **shape)
        check(kernels.count_cuda, scores=random_scores(seed, 2, 131, seed % 4), rule=rule, level=share, dtype=dtype, **shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [-np.inf, -0.5, -0.0, 0.0, 0.125, 0.1, np.inf, np.nan])
def test_count_thresholds(kernels: Any, tau: float, dtype: str) -> None:
    for rule in (ABOVE, FROM):
        for distinct in (0, 2):
            check(kernels.count_cuda, scores=random_scores(1, 2, 133, distinct), rule=rule, level=tau, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_count_of_the_smallest_scores(kernels: Any, shape: dict[str, int]) -> None:
    """Subnormal rows, whose exponent is 0: even and odd bit patterns, on both sides of every digit of the radix."""
    for top in (3, 1 << 10, 1 << 20, 1 << 22, 1 << 24):
        bits = np.random.default_rng(top).integers(0, top, (2, 90), dtype=np.uint32)
        for rule in (REACH, BELOW):
            for share in (0.2, 0.5, 0.9, 1.0):
                check(kernels.count_cuda, scores=bits.view(np.float32), rule=rule, level=share, **shape)


def test_count_limits_and_levels_per_row(kernels: Any) -> None:
    levels = np.array([0.1, 0.5, 0.9, 1.0], dtype=np.float32)
    always = np.random.default_rng(1).random((4, 80)) < 0.1
    for rule in range(4):
        for extra, min_k, max_k in ((0, 0, 80), (1, 0, 80), (3, 5, 20), (0, 30, 30)):
            options = {"min_k": min_k, "max_k": max_k, "capacity": 17, **({"extra": extra} if rule < ABOVE else {})}
            check(kernels.count_cuda, scores=attention(rule, 4, 80), rule=rule, levels=levels, **options)
            check(kernels.count_cuda, scores=attention(rule, 4, 80), rule=rule, levels=levels, always_keep=always, **options)


def test_count_refuses_sixteen_scores_a_thread(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="a count takes 4 items a thread, or 0"):
        kernels.count_cuda({"B": 1, "N": 40, "scores": attention(1, 1, 40), "rule": REACH, "level": 0.5, "items_per_thread": 16})


def test_count_levels_outside_a_share_are_read_as_0_or_1(kernels: Any) -> None:
    scores = attention(1, 5, 40)
    levels = np.array([0.0, -1.0, np.nan, 2.0, np.inf], dtype=np.float32)
    p = {"B": 5, "N": 40, "scores": scores, "rule": REACH, "levels": levels}
    for run in (kernels.count_cuda, kernels.count_cpu):
        assert run(p)[0].tolist() == [0, 0, 0, 40, 40]


@pytest.mark.parametrize("N", [4097, 16385])
def test_count_planned_shapes(kernels: Any, N: int) -> None:
    plan = kernels.count_plan_cuda({"B": 1, "N": N})
    assert plan == {"threads": 1024, "items_per_thread": 0, "smem_bytes": (2 if N <= 16384 else 5) * 1024 * 16}
    for rule, level in ((REACH, 0.9), (BELOW, 0.5), (ABOVE, 1e-4)):
        check(kernels.count_cuda, scores=attention(N, 1, N), rule=rule, level=level)
        check(kernels.count_cuda, scores=np.full((1, N), 0.25, np.float32), rule=rule, level=level)


def test_count_plan(kernels: Any) -> None:
    def plan(N: int, **device: int) -> tuple[int, int, int]:
        p = kernels.count_plan_cuda({"B": 8, "N": N, **device})
        return p["items_per_thread"], p["threads"], p["smem_bytes"]

    assert plan(577) == (4, 160, 0)
    assert plan(2944) == (4, 736, 0)
    assert plan(45_000) == (0, 1024, 11 * 1024 * 16)  # 176 KB beside 25 KB of histograms
    assert plan(50_176) == (0, 1024, 0)  # 208 KB do not fit: read again
    assert plan(20_000, smem_per_block=99 * 1024) == (0, 1024, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_count_strided_and_unaligned_rows(kernels: Any, dtype: str) -> None:
    storage = random_scores(2, 3, 73)
    for run in (kernels.count_cuda, kernels.count_cpu):
        for rule, level in ((REACH, 0.8), (FROM, 0.25)):
            p = {"B": 3, "N": 70, "rule": rule, "level": level, "score_stride": 73, "offset_bytes": 4, "dtype": dtype}
            p["scores"] = to_bits(storage, dtype)
            assert tuple(part.tolist() for part in run(p)) == expected(p)


def test_count_empty(kernels: Any) -> None:
    for run in (kernels.count_cuda, kernels.count_cpu):
        for rule in range(4):
            check(run, B=0, N=5, scores=np.zeros((0, 5)), rule=rule, level=0.5)
            check(run, B=2, N=0, scores=np.zeros((2, 0)), rule=rule, level=0.5)


def test_count_fuzz(kernels: Any) -> None:
    for seed in range(80):
        rng = np.random.default_rng(seed)
        B, N = int(rng.integers(1, 4)), int(np.exp(rng.uniform(0, 6)))
        scores = attention(seed, B, N) if seed % 2 else random_scores(seed, B, N, int(rng.integers(0, 4)))
        p: dict[str, Any] = {"scores": scores, "rule": int(rng.integers(0, 4)), "capacity": int(rng.integers(0, N + 1))}
        for name in ("candidates", "always_keep"):
            if rng.random() < 0.4:
                p[name] = rng.random((B, N)) < rng.random() ** 2
        p["max_k"] = int(rng.integers(0, N + 1))
        p["min_k"] = int(rng.integers(0, p["max_k"] + 1))
        p["level"] = float(rng.random()) if p["rule"] < ABOVE else float(rng.standard_normal())
        p["dtype"] = DTYPES[seed % 3]
        check(kernels.count_cuda, **p, **SHAPES[int(rng.integers(0, 3))])
        for level in kernels.cpu_levels():
            check(kernels.count_cpu, **p, cpu_level=level)


@pytest.mark.parametrize("level", range(3), ids=["baseline", "avx2", "avx512"])
def test_count_cpu(kernels: Any, level: int) -> None:
    if level not in kernels.cpu_levels():
        pytest.skip("not on this machine")
    for N in (1, 5, 16, 17, 33, 256, 257, 577, 1300):
        for rule, share in ((REACH, 0.9), (REACH, 1.0), (BELOW, 0.5), (ABOVE, 0.01), (FROM, 0.25)):
            for dtype in DTYPES:
                check(kernels.count_cpu, scores=attention(N, 2, N), rule=rule, level=share, dtype=dtype, cpu_level=level)
                check(kernels.count_cpu, scores=random_scores(N, 2, N, 3), rule=rule, level=share, dtype=dtype, cpu_level=level)
    for top in (3, 1 << 10, 1 << 22, 1 << 24):
        bits = np.random.default_rng(top).integers(0, top, (2, 300), dtype=np.uint32)
        check(kernels.count_cpu, scores=bits.view(np.float32), rule=REACH, level=0.6, cpu_level=level)
