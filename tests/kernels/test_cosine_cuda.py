"""cosine_cuda under the host SIMT runtime: exact matches, ties and all, where cosines are exact; up to rounding elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits

MATCH, NONE, MEAN, SUM, MAX = range(5)
DTYPES = ["float32", "float16", "bfloat16"]
# (B, M, N, C): one and several tiles of 64 rows, of 64 columns, of 128 bytes of channels.
SIZES = [(1, 1, 1, 1), (2, 3, 37, 5), (1, 64, 64, 64), (1, 65, 129, 33), (2, 70, 200, 16), (1, 20, 0, 8), (1, 20, 30, 0), (1, 5, 64, 130)]


def exact(seed: int, *shape: int) -> np.ndarray:
    """Rows of 4 or 16 ones and minus ones (norm 2 or 4) times a power of two: every cosine is exact, with many ties."""
    rng = np.random.default_rng(seed)
    C = shape[-1]
    ones = 16 if C >= 16 else 4 if C >= 4 else min(C, 1)
    x = np.zeros((int(np.prod(shape[:-1])), C), dtype=np.float32)
    for row in x:
        row[rng.permutation(C)[:ones]] = rng.choice([-1.0, 1.0], ones) * rng.choice([0.5, 1.0, 4.0])
    return x.reshape(shape)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(B, M, N) float64; NaN where a row holds one, else 0 where a norm is 0."""
    norms = np.linalg.norm(a, axis=-1)[:, :, None] * np.linalg.norm(b, axis=-1)[:, None, :]
    dots = np.einsum("bmc,bnc->bmn", a, b)
    return np.where(norms == 0, 0.0, dots / np.where(norms == 0, 1.0, norms))


def allowed(p: dict[str, Any]) -> np.ndarray:
    B, M, N, _ = p["sizes"]
    mask = np.ones((B, M, N), dtype=bool) if p.get("candidates") is None else np.repeat(p["candidates"][:, None], M, axis=1)
    return mask & ~np.eye(M, N, dtype=bool) if p.get("exclude_self") else mask


def best(pairs: np.ndarray, mask: np.ndarray, T: int, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """(value, index) by a stable sort: NaN behind all numbers, then the lowest index; 0 and -1 behind the candidates."""
    key = np.where(np.isnan(pairs), 100.0, -pairs if largest else pairs)
    order = np.argsort(np.where(mask, key, np.inf), axis=-1, kind="stable")[..., :T]
    there = np.take_along_axis(mask, order, -1)
    value, index = np.zeros((*pairs.shape[:2], T)), np.full((*pairs.shape[:2], T), -1)
    value[..., : order.shape[-1]] = np.where(there, np.take_along_axis(pairs, order, -1), 0.0)
    index[..., : order.shape[-1]] = np.where(there, order, -1)
    return value, index


def reference(p: dict[str, Any], a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    pairs, mask, reduction = cosines(a, b), allowed(p), p.get("reduction", MATCH)
    if reduction == MATCH:
        return best(pairs, mask, p.get("T", 1), p.get("largest", True))
    if reduction == MAX:
        return best(pairs, mask, 1, True)[0], None
    if reduction == NONE:
        return np.where(mask, pairs, 0.0), None
    total = np.where(mask, pairs, 0.0).sum(-1, keepdims=True)
    return (total if reduction == SUM else total / np.maximum(mask.sum(-1, keepdims=True), 1)), None


def check(kernels: Any, a: np.ndarray, b: np.ndarray, **p: Any) -> dict[str, Any]:
    dtype = p.get("dtype", "float32")
    p = {"sizes": [a.shape[0], a.shape[1], b.shape[1], a.shape[2]], **p}
    given = {**p, "a": to_bits(a, dtype), "b": to_bits(b, dtype)}
    got = kernels.cosine_cuda(given)
    value, index = reference(p, from_bits(given["a"], dtype), from_bits(given["b"], dtype))
    what = f"{ {name: v for name, v in p.items() if name != 'candidates'} }"
    if index is not None:
        np.testing.assert_array_equal(got["index"], index, err_msg=what)
    if p.get("reduction", MATCH) in (MEAN, SUM):
        np.testing.assert_allclose(got["value"], value, atol=1e-6 * max(1, b.shape[1] if p["reduction"] == SUM else 1), err_msg=what)
    else:
        np.testing.assert_array_equal(got["value"], value, err_msg=what)
    return got


MODES: list[dict[str, Any]] = [
    {},
    {"largest": False, "splits": 3},
    {"T": 5, "splits": 1},
    {"T": 7, "splits": 2, "largest": False},
    {"reduction": MAX, "splits": 2},
    {"reduction": NONE},
    {"reduction": MEAN, "splits": 3},
    {"reduction": SUM, "splits": 1},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_cosine_every_schedule(scheduled: Any, mode: dict[str, Any]) -> None:
    candidates = np.random.default_rng(3).random((2, 130)) < 0.7
    check(scheduled, exact(1, 2, 66, 24), exact(2, 2, 130, 24), candidates=candidates, dtype="float16", **mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cosine_sizes(kernels: Any, sizes: tuple[int, ...], dtype: str) -> None:
    B, M, N, C = sizes
    a, b = exact(M, B, M, C), exact(N + 1, B, N, C)
    for mode in ({}, {"T": 2}, {"T": 32, "largest": False}, *({"reduction": reduction} for reduction in (NONE, MEAN, SUM, MAX))):
        check(kernels, a, b, dtype=dtype, **mode)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, 9])
def test_cosine_splits_are_the_same_answer(kernels: Any, splits: int) -> None:
    """Also more splits than column tiles (5): the empty ones have no match to offer."""
    a, b = exact(5, 1, 65, 16), exact(6, 1, 290, 16)
    for T in (1, 3, 32):
        for largest in (True, False):
            check(kernels, a, b, T=T, largest=largest, splits=splits)
    for reduction in (NONE, MEAN, SUM, MAX):
        check(kernels, a, b, reduction=reduction, splits=splits)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_cosine_candidates_and_self(kernels: Any, mode: dict[str, Any]) -> None:
    x = exact(7, 3, 80, 16)
    candidates = np.random.default_rng(8).random((3, 80)) < 0.1
    candidates[2] = False
    candidates[2, 40] = True  # for itself, no candidate at all
    check(kernels, x, x, exclude_self=True, **mode)
    check(kernels, x, x, exclude_self=True, candidates=candidates, **mode)
    check(kernels, x, x, candidates=np.zeros((3, 80), dtype=bool), **mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_cosine_all_equal_zero_and_nan_rows(kernels: Any, mode: dict[str, Any]) -> None:
    x = exact(9, 1, 70, 16)
    x[:, 10:40] = x[:, 3:4]
    x[:, 50:55] = 0
    check(kernels, x, x, **mode)
    check(kernels, np.ones((1, 70, 16), dtype=np.float32), np.ones((1, 70, 16), dtype=np.float32), **mode)
    x[0, 4] = np.nan  # as a candidate NaN comes last; as a row of a it has nothing else, zero rows included
    x[0, 66, 2] = np.nan
    check(kernels, x, x, **mode)
    if mode.get("reduction") in (MEAN, SUM):
        candidates = ~np.isnan(x).any(-1)  # what is no candidate does not count, NaN or not
        got = check(kernels, x, x, candidates=candidates, **mode)
        assert (np.isnan(got["value"][..., 0]) == ~candidates).all()


def test_cosine_only_nan_candidates(kernels: Any) -> None:
    a, b = exact(1, 1, 3, 16), np.full((1, 5, 16), np.nan, dtype=np.float32)
    for T in (1, 3, 8):
        for splits in (1, 2):
            got = check(kernels, a, b, T=T, splits=splits)
            assert got["index"][0, 0].tolist() == [*range(min(T, 5)), *[-1] * (T - 5)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cosine_random_floats(kernels: Any, dtype: str) -> None:
    """Values up to rounding, and matches as good as the best."""
    rng = np.random.default_rng(11)
    a, b = to_bits(rng.standard_normal((1, 40, 96)), dtype), to_bits(rng.standard_normal((1, 150, 96)) * 30, dtype)
    pairs = cosines(from_bits(a, dtype), from_bits(b, dtype))
    call = {"sizes": [1, 40, 150, 96], "a": a, "b": b, "dtype": dtype}
    np.testing.assert_allclose(kernels.cosine_cuda(call | {"reduction": NONE})["value"], pairs, atol=2e-6)
    np.testing.assert_allclose(kernels.cosine_cuda(call | {"reduction": MEAN})["value"][..., 0], pairs.mean(-1), atol=1e-6)
    for T in (1, 9, 32):
        got = kernels.cosine_cuda(call | {"T": T})
        want = -np.sort(-pairs, axis=-1)[..., :T]
        np.testing.assert_allclose(got["value"], want, atol=2e-6)
        np.testing.assert_allclose(np.take_along_axis(pairs, got["index"], -1), want, atol=2e-6)
        assert (np.diff(np.sort(got["index"], axis=-1), axis=-1) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_cosine_strides_and_alignment_change_no_bit(kernels: Any, mode: dict[str, Any], dtype: str) -> None:
    rng = np.random.default_rng(12)
    wide_a, wide_b = rng.standard_normal((1, 30, 75)), rng.standard_normal((1, 100, 76))
    call = {"sizes": [1, 30, 100, 72], "dtype": dtype, **mode}
    tight = kernels.cosine_cuda(call | {"a": to_bits(wide_a[..., :72], dtype), "b": to_bits(wide_b[..., :72], dtype)})
    offset = 4 if dtype == "float32" else 2
    views = {"a": to_bits(wide_a, dtype), "b": to_bits(wide_b, dtype), "a_row": 75, "b_row": 76, "offset_bytes": offset}
    loose = kernels.cosine_cuda(call | views)
    for name in tight:
        np.testing.assert_array_equal(tight[name], loose[name])


def test_cosine_refusals(kernels: Any) -> None:
    x = exact(1, 1, 4, 4)
    wrongs = [({"T": 0}, "k must"), ({"T": 33}, "k must"), ({"splits": 0}, "splits"), ({"reduction": MAX, "largest": False}, "only kMatch")]
    for wrong, why in wrongs:
        with pytest.raises(RuntimeError, match=why):
            kernels.cosine_cuda({"sizes": [1, 4, 4, 4], "a": x, "b": x, **wrong})


def test_cosine_plan(kernels: Any) -> None:
    def plan(*sizes: int, **p: Any) -> dict[str, Any]:
        return kernels.cosine_plan_cuda({"sizes": list(sizes), "dtype": "bfloat16", **p})

    tome = plan(1, 289, 288, 64)  # CLIP, even against odd: 5 x 5 tiles, a block each
    assert (tome["tile"], tome["threads"], tome["smem_bytes"]) == ((64, 64), 128, 36864)
    assert (tome["splits"], tome["num_semaphores"]) == (5, 5)
    assert plan(64, 289, 288, 64)["splits"] == 2  # 320 row tiles
    assert plan(256, 289, 288, 64)["splits"] == 1
    assert plan(256, 289, 288, 64)["num_semaphores"] == 0
    large = plan(1, 2880, 2880, 4096)
    assert (large["splits"], large["flops"]) == (12, 2 * 2880 * 2880 * 4096)  # 4 tiles a block
    assert plan(1, 2880, 2880, 4096, T=5)["splits"] == 6
    assert plan(1, 2880, 2880, 4096, T=5)["smem_bytes"] == 36864 + 64 * 5 * 8
    assert plan(1, 16, 2880, 4096)["splits"] == 45
    assert plan(1, 2880, 2880, 4096, reduction=NONE)["num_semaphores"] == 0
    mean = plan(1, 2880, 2880, 4096, reduction=MEAN)  # 4 blocks of channels: 66 chunks of rows
    assert (mean["splits"], mean["num_semaphores"], mean["smem_bytes"]) == (66, 4, 0)
    assert mean["flops"] == 2 * 4096 * 3 * 2880
    assert plan(0, 0, 0, 0)["splits"] == 1
