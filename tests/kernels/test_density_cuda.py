"""density_cuda and nearest_cuda under the host SIMT runtime, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits

DTYPES = ["float32", "float16", "bfloat16"]


def tokens(seed: int, B: int, N: int, C: int) -> np.ndarray:
    """Eighths, so that every dtype holds them; groups of tokens that are alike."""
    rng = np.random.default_rng(seed)
    near = rng.integers(-2, 3, (B, max(N // 4, 1), C)).repeat(4, axis=1)
    x = np.zeros((B, N, C))
    x[:, : near.shape[1]] = near[:, :N]
    return (x + rng.integers(-2, 3, (B, N, C)) / 8).astype(np.float32)


def distances(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        d = np.sqrt(((x[:, None].astype(np.float64) - x[None]) ** 2).sum(-1) / max(x.shape[1], 1))
    d[~np.isfinite(d)] = np.inf
    np.fill_diagonal(d, 0)
    return d


def check(kernels: Any, x: np.ndarray, k: int, **p: Any) -> None:
    B, N, C = x.shape
    dtype = p.get("dtype", "float32")
    values = from_bits(to_bits(x, dtype), dtype)
    density, distance = kernels.density_cuda({"B": B, "N": N, "C": C, "k": k, **p, "x": to_bits(x, dtype)})
    all_d = [distances(values[b]) for b in range(B)]
    far = max(float(d[np.isfinite(d)].max()) for d in all_d) + 1
    for b in range(B):
        real = p["mask"][b] if "mask" in p else np.ones(N, dtype=bool)
        d = np.where(real[None], all_d[b], far)
        want = np.exp(-(np.sort(d, axis=1)[:, :k] ** 2).mean(1))
        if "noise" in p:
            want = want + 1e-6 * p["noise"][b]
        np.testing.assert_allclose(density[b], np.where(real, want, 0), rtol=2e-5, atol=1e-30)
        own = density[b]
        denser = own[None] > own[:, None]
        if "noise" not in p:
            denser |= (own[None] == own[:, None]) & np.tri(N, k=-1, dtype=bool)
        denser &= real[None]
        most = d[np.isfinite(d)].max()
        nearest = np.minimum(np.where(denser, all_d[b], np.inf).min(1), most)
        np.testing.assert_allclose(distance[b], nearest, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("strip", [{}, {"strip_rows": 64}], ids=["matrix", "strips"])
def test_density_every_schedule(scheduled: Any, strip: dict[str, int]) -> None:
    check(scheduled, tokens(1, 2, 70, 20), 5, **strip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 32, 33, 130])
def test_density_neighbours(kernels: Any, dtype: str, k: int) -> None:
    check(kernels, tokens(2, 1, 130, 33), k, dtype=dtype)


@pytest.mark.parametrize("N", [1, 2, 31, 33, 64, 65, 129])
def test_density_row_lengths(kernels: Any, N: int) -> None:
    for strip in ({}, {"strip_rows": 64}):
        check(kernels, tokens(N, 2, N, 8), min(3, N), **strip)


@pytest.mark.parametrize("C", [1, 3, 4, 32, 33, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_density_channels(kernels: Any, C: int, dtype: str) -> None:
    check(kernels, tokens(C, 1, 40, C), 4, dtype=dtype)


@pytest.mark.parametrize("k", [4, 40])
def test_density_mask_and_noise(kernels: Any, k: int) -> None:
    rng = np.random.default_rng(3)
    x = tokens(4, 3, 50, 12)
    x[1] *= 3
    mask = rng.random((3, 50)) < 0.6
    mask[2] = True
    check(kernels, x, k, mask=mask)
    check(kernels, x, k, mask=mask, noise=rng.random((3, 50)).astype(np.float32), strip_rows=64)
    check(kernels, x, k, noise=rng.random((3, 50)).astype(np.float32))


def test_density_equal_tokens_and_no_numbers(kernels: Any) -> None:
    x = tokens(5, 1, 45, 16)
    x[:, 10:20] = x[:, 3:4]
    x[:, 30, 2], x[:, 31, 5] = np.nan, np.inf
    check(kernels, x, 4)
    check(kernels, x, 40)
    check(kernels, np.ones((1, 40, 8), dtype=np.float32), 7)


def test_density_float32_far_from_0_and_unaligned(kernels: Any) -> None:
    x = tokens(6, 2, 40, 7)
    check(kernels, x + 4096, 3)
    B, N, C = x.shape
    rows = np.zeros((B, N, 9), dtype=np.float32)
    rows[:, :, :C] = x
    got = kernels.density_cuda({"B": B, "N": N, "C": C, "k": 3, "row_stride": 9, "batch_stride": 9 * N, "x": rows})
    want = kernels.density_cuda({"B": B, "N": N, "C": C, "k": 3, "x": x})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def alike_and_far(seed: int, N: int, C: int) -> np.ndarray:
    """Three groups of tokens, 0.001 within and some 20 between: products lose the former."""
    rng = np.random.default_rng(seed)
    x = 20 * rng.standard_normal((1, 3, C)).repeat((N + 2) // 3, axis=1)[:, :N]
    return (x + 1e-3 * rng.standard_normal((1, N, C))).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 12])
def test_density_far_from_the_mean_decides_by_differences(kernels: Any, k: int) -> None:
    x = alike_and_far(9, 60, 24)
    check(kernels, x, k)
    density, _ = kernels.density_cuda({"B": 1, "N": 60, "C": 24, "k": k, "x": x})
    want = (np.sort(distances(x[0]), axis=1)[:, :k] ** 2).mean(1)
    np.testing.assert_allclose(1 - density[0].astype(np.float64), want, rtol=0, atol=1.3e-7)  # a density near 1 has 6e-8 steps
    if k == 1:
        assert (density == 1).all()


def test_nearest_far_from_the_mean_decides_by_differences(scheduled: Any) -> None:
    x = alike_and_far(10, 70, 24)
    lanes = np.array([1, 5, 30, 40, 50, 60])  # two of a group in every thread
    for row in (np.random.default_rng(9).permutation(70)[:9], np.random.default_rng(66).permutation(70)[:66], lanes):
        centers = row[None].astype(np.int64)
        got = scheduled.nearest_cuda({"B": 1, "N": 70, "C": 24, "K": len(row), "x": x, "centers": centers})
        np.testing.assert_array_equal(got[0], labels_of(x[0], centers[0]))


def labels_of(x: np.ndarray, centers: np.ndarray) -> np.ndarray:
    d, out = distances(x), np.full(len(x), -1)
    places = [place for place, token in enumerate(centers) if token >= 0]
    for i in range(len(x)):
        own = [place for place in places if centers[place] == i]
        out[i] = own[0] if own else min(places, key=lambda place: d[i, centers[place]], default=-1)
    return out


@pytest.mark.parametrize(("N", "C", "K"), [(1, 3, 1), (70, 20, 70), (130, 9, 5), (65, 33, 64)])
def test_nearest_every_schedule(scheduled: Any, N: int, C: int, K: int) -> None:
    x = np.random.default_rng(N).standard_normal((2, N, C)).astype(np.float32)
    centers = np.random.default_rng(K).integers(-1, N, (2, K)).astype(np.int64)
    got = scheduled.nearest_cuda({"B": 2, "N": N, "C": C, "K": K, "x": x, "centers": centers})
    for b in range(2):
        np.testing.assert_array_equal(got[b], labels_of(x[b], centers[b]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_ties_and_doubles(kernels: Any, dtype: str) -> None:
    x = tokens(7, 1, 30, 12)
    x[:, 20:25] = x[:, 4:5]
    values = from_bits(to_bits(x, dtype), dtype)
    for row in ([3, 4, 20, 3], [24, 20, 4], [-1, 4, -1, 7], [-1, -1]):
        centers = np.array([row], dtype=np.int64)
        got = kernels.nearest_cuda({"B": 1, "N": 30, "C": 12, "K": len(row), "dtype": dtype, "x": to_bits(x, dtype), "centers": centers})
        np.testing.assert_array_equal(got[0], labels_of(values[0], centers[0]))


def test_nearest_no_centres_and_no_numbers(kernels: Any) -> None:
    x = tokens(8, 1, 20, 4)
    empty = {"B": 1, "N": 20, "C": 4, "K": 0, "x": x, "centers": np.zeros((1, 0), dtype=np.int64)}
    assert (kernels.nearest_cuda(empty) == -1).all()
    x[:, 5] = np.nan
    got = kernels.nearest_cuda({"B": 1, "N": 20, "C": 4, "K": 2, "x": x, "centers": np.array([[3, 9]])})
    assert got[0, 5] == 0
    assert sorted(set(got[0].tolist())) == [0, 1]
