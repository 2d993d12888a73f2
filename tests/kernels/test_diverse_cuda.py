"""diverse_cuda under the host SIMT runtime: exact picks, ties and all, where the arithmetic is exact; valid greedy picks elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits

DTYPES = ["float32", "float16", "bfloat16"]
VARIANTS = [{}, {"lazy": False}, {"threads": 64}, {"store": False}]
IDS = ["lazy", "one_by_one", "two_warps", "no_matrix"]


def exact(seed: int, B: int, N: int, C: int, metric: str) -> np.ndarray:
    """Small integers (squared distances are exact), or rows of -1, 0 and 1 with 16 ones (norm 4, so cosines are exact)."""
    rng = np.random.default_rng(seed)
    if metric == "euclidean":
        return rng.integers(-2, 3, (B, N, C)).astype(np.float32)
    x = np.zeros((B, N, C), dtype=np.float32)
    for b in range(B):
        for n in range(N):
            x[b, n, rng.permutation(C)[:16]] = rng.choice([-1.0, 1.0], 16)
    return x


def distances(x: np.ndarray, metric: str) -> np.ndarray:
    x = x.astype(np.float64)
    if metric == "euclidean":
        return ((x[:, None] - x[None]) ** 2).sum(-1)
    norm = np.sqrt((x**2).sum(-1))
    norm[norm == 0] = np.inf
    return np.maximum(1 - (x @ x.T) / (norm[:, None] * norm[None]), 0)


def greedy(d: np.ndarray, K: int, exists: np.ndarray, first: int) -> list[int]:
    """The published loop: the minimum over all picks anew for every pick; ties to the lowest index."""
    tokens, picks = np.flatnonzero(exists), []
    while len(picks) < min(K, len(tokens)):
        if not picks and first in tokens:
            picks.append(first)
            continue
        if not picks:
            other = d[np.ix_(tokens, tokens)].copy()
            np.fill_diagonal(other, np.inf)
            value = other.min(1)
        else:
            value = d[np.ix_(picks, tokens)].min(0)
            value[np.isin(tokens, picks)] = -1
        picks.append(int(tokens[np.argmax(value)]))
    return picks


def check(kernels: Any, x: np.ndarray, **p: Any) -> None:
    B, N, C = x.shape
    dtype, metric, order = p.get("dtype", "float32"), p.get("metric", "cosine"), p.get("order", "pick")
    arguments = {"B": B, "N": N, "C": C, **p, "x": to_bits(x, dtype)}
    if p.get("store") is False:
        arguments["workspace_bytes"] = 1 << 20
    got = kernels.diverse_cuda(arguments)
    values = from_bits(to_bits(x, dtype), dtype)
    for b in range(B):
        exists = p["candidates"][b] if p.get("candidates") is not None else np.ones(N, dtype=bool)
        first = int(p["first"][b]) if p.get("first") is not None else -1
        want = greedy(distances(values[b], metric), p["K"], exists, first)
        want = sorted(want) if order == "position" else want
        assert got[b].tolist() == want + [-1] * (p["K"] - len(want)), (
            f"{ {k: v for k, v in p.items() if k not in ('candidates',)} } image {b}"
        )


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_diverse_every_schedule(scheduled: Any, metric: str, variant: dict[str, Any]) -> None:
    check(scheduled, exact(1, 2, 70, 32, metric), K=20, metric=metric, **variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_diverse_counts_and_orders(kernels: Any, metric: str, dtype: str, variant: dict[str, Any]) -> None:
    x = exact(2, 2, 67, 40, metric)
    for K in (1, 2, 33, 67):
        check(kernels, x, K=K, metric=metric, dtype=dtype, order="position" if K % 2 else "pick", **variant)


@pytest.mark.parametrize("N", [1, 2, 3, 31, 32, 33, 63, 64, 65, 129, 257])
def test_diverse_row_lengths(kernels: Any, N: int) -> None:
    for variant in ({}, {"threads": 64}, {"store": False}):
        check(kernels, exact(N, 1, N, 24, "euclidean"), K=(N + 1) // 2, metric="euclidean", order="position", **variant)


@pytest.mark.parametrize("C", [1, 7, 8, 33, 64, 65, 129])
@pytest.mark.parametrize("dtype", DTYPES)
def test_diverse_channels(kernels: Any, C: int, dtype: str) -> None:
    check(kernels, exact(C, 1, 40, C, "euclidean"), K=12, metric="euclidean", dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_diverse_candidates_and_first(kernels: Any, variant: dict[str, Any]) -> None:
    rng = np.random.default_rng(5)
    candidates = rng.random((3, 50)) < 0.4
    candidates[2] = False
    candidates[2, 7] = True
    first = np.array([int(np.flatnonzero(candidates[0])[3]), -1, 3], dtype=np.int64)  # the last one is no candidate
    x = exact(4, 3, 50, 16, "euclidean")
    for order in ("pick", "position"):
        check(kernels, x, K=25, metric="euclidean", candidates=candidates, first=first, order=order, **variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_diverse_first_is_the_first_token_the_last_or_none(kernels: Any, variant: dict[str, Any]) -> None:
    first = np.array([0, 33, 34, 2**40], dtype=np.int64)  # the last two name no token: the published start
    check(kernels, exact(5, 4, 34, 16, "euclidean"), K=9, metric="euclidean", first=first, **variant)


def test_diverse_more_tokens_than_a_block_has_registers_for(kernels: Any) -> None:
    """More than 8 tokens a thread: their distances live in the workspace. Duplicates are picked too, last, by index."""
    x = exact(3, 1, 530, 2, "euclidean")  # 25 different rows
    candidates = np.random.default_rng(3).random((1, 530)) < 0.1
    for order in ("pick", "position"):
        check(kernels, x, K=60, metric="euclidean", candidates=candidates, order=order, threads=64)
    check(kernels, exact(4, 1, 530, 16, "euclidean"), K=12, metric="euclidean", threads=64)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_diverse_duplicates_and_zero_rows(kernels: Any, variant: dict[str, Any]) -> None:
    x = exact(6, 1, 45, 32, "cosine")
    x[:, 10:20] = x[:, 3:4]  # distance exactly 0
    x[:, 30:33] = 0
    check(kernels, x, K=45, **variant)
    check(kernels, np.ones((1, 40, 8), dtype=np.float32), K=40, **variant)  # all equal: by index
    check(kernels, np.ones((1, 40, 8), dtype=np.float32), K=9, metric="euclidean", **variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_diverse_of_random_floats_is_greedy(kernels: Any, variant: dict[str, Any]) -> None:
    """Every pick is, up to rounding, the farthest token from the picks before it."""
    x = np.random.default_rng(8).standard_normal((1, 90, 48)).astype(np.float32)
    for metric in ("cosine", "euclidean"):
        arguments = {"B": 1, "N": 90, "C": 48, "K": 40, "metric": metric, "x": x, **variant}
        if variant.get("store") is False:
            arguments["workspace_bytes"] = 1 << 20
        picks = kernels.diverse_cuda(arguments)[0]
        d = distances(x[0], metric)
        assert len(set(picks.tolist())) == 40
        for i in range(1, 40):
            nearest = d[picks[:i]].min(0)
            assert nearest[picks[i]] >= nearest.max() * (1 - 1e-5) - 1e-6


def test_diverse_nan_rows_come_last_but_are_picked_once(kernels: Any) -> None:
    x = exact(9, 1, 20, 16, "euclidean")
    x[0, 4, 3] = np.nan
    got = kernels.diverse_cuda({"B": 1, "N": 20, "C": 16, "K": 20, "metric": "euclidean", "x": x})[0]
    assert sorted(got.tolist()) == list(range(20))


def test_diverse_strides_and_alignment(kernels: Any) -> None:
    wide = exact(3, 2, 40, 37, "euclidean")
    for dtype in DTYPES:
        narrow = wide[:, :, :32]
        bits = to_bits(wide, dtype)
        got = kernels.diverse_cuda(
            {"B": 2, "N": 40, "C": 32, "K": 15, "metric": "euclidean", "x": bits, "row_stride": 37, "dtype": dtype, "offset_bytes": 4}
        )
        for b in range(2):
            assert got[b].tolist() == greedy(distances(narrow[b], "euclidean"), 15, np.ones(40, dtype=bool), -1)


def test_diverse_plan(kernels: Any) -> None:
    plan = kernels.diverse_plan_cuda({"B": 1, "N": 2880, "C": 4096, "K": 320, "dtype": "bfloat16"})
    assert (plan["store_distances"], plan["threads"], plan["smem_bytes"]) == (True, 1024, 36864)
    assert plan["flops"] == 2880 * 2880 * 4096
    assert kernels.diverse_plan_cuda({"B": 1, "N": 576, "C": 4096, "K": 64})["threads"] == 576
    large = kernels.diverse_plan_cuda({"B": 1, "N": 50176, "C": 3584, "K": 5000, "dtype": "bfloat16"})
    assert not large["store_distances"]
    assert large["workspace_bytes"] < 1 << 20
