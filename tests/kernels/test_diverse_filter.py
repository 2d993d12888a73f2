"""Picks by rounded products first (diverse_filter_cpu.h) are those of the float path, which a plan without the matrix takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernels.test_cpu_kernels import Cpu, cpu  # noqa: F401  (a fixture)

N = 200


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def near(step: float, points: int, C: int = 384) -> np.ndarray:
    """Tokens around a few points, apart by `step` times their norm; what int16 products tell apart is about 1e-3."""
    where = np.random.default_rng(points).integers(0, points, N)
    return normal(1, points, C)[where] + np.float32(step) * normal(2, N, C)


def changed(change: Callable[[np.ndarray], None]) -> np.ndarray:
    x = normal(3, N, 300)
    change(x)
    return x


def zero_rows(x: np.ndarray) -> None:
    x[[4, 50]] = 0


def not_finite(x: np.ndarray) -> None:
    x[7, 1], x[100, 299] = np.nan, np.inf


def denormal(x: np.ndarray) -> None:
    x[5] *= 1e-38
    x[9] *= 1e-41


def huge(x: np.ndarray) -> None:
    x *= 1e18


def one_channel(x: np.ndarray) -> None:
    x[:, 1:] *= 1e-3


def grid() -> np.ndarray:
    """Many equal distances, of which the lowest index has to win."""
    x = np.zeros((N, 256), np.float32)
    x[np.arange(N), np.arange(N) % 60] = 1
    x[::3, 100] = 1
    return x


CASES: dict[str, Callable[[], np.ndarray]] = {
    "random": lambda: normal(0, N, 512),
    "256 channels": lambda: normal(0, N, 256),
    "channels left over": lambda: normal(0, N, 1153),
    "more than 2048 channels": lambda: normal(0, N, 2500),
    "few channels left over": lambda: normal(0, N, 4097),
    "near ties": lambda: near(1e-2, 20),
    "closer than rounding": lambda: near(1e-4, 20),
    "copies": lambda: near(0.0, 30),
    "pairs": lambda: near(1e-3, 120),
    "all near one": lambda: near(1e-2, 1),
    "all equal": lambda: np.ones((N, 256), np.float32),
    "equal distances": grid,
    "zero rows": lambda: changed(zero_rows),
    "NaN and infinity": lambda: changed(not_finite),
    "denormal": lambda: changed(denormal),
    "huge": lambda: changed(huge),
    "one channel": lambda: changed(one_channel),
}


def assert_float_picks(cpu: Cpu, x: np.ndarray, K: int, what: str, **options: object) -> None:  # noqa: F811
    call = {"sizes": [*x.shape, K], "x": x, **options}
    filtered, plain = (cpu.diverse_cuda(call | {"store": store}) for store in (True, False))
    assert filtered["workspace_bytes"] > plain["workspace_bytes"]
    np.testing.assert_array_equal(filtered["index"], plain["index"], err_msg=what)


@pytest.mark.parametrize("kind", CASES)
def test_diverse_cpu_rounded_products_first_change_no_pick(cpu: Cpu, kind: str) -> None:  # noqa: F811
    x = CASES[kind]()[None]
    for K in (1, 40, N):
        assert_float_picks(cpu, x, K, f"{kind}, {K} picks")
    mask = np.random.default_rng(5).random((1, N)) < 0.6
    assert_float_picks(cpu, x, 50, f"{kind} with candidates", candidates=mask, order=0)
    assert_float_picks(cpu, x, 30, f"{kind} with a first pick", first=np.array([77]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_diverse_cpu_rounded_products_first_in_half_precision_and_of_a_batch(cpu: Cpu, dtype: str) -> None:  # noqa: F811
    x = np.stack([near(1e-2, 15), normal(7, N, 384), near(1e-3, 100)])
    half = (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else x.astype(np.float16)
    mask = np.ones((3, N), bool)
    mask[1, 1:], mask[2] = False, False  # one candidate, none
    assert_float_picks(cpu, half, 60, dtype, dtype=dtype)
    assert_float_picks(cpu, half, 60, f"{dtype} with candidates", dtype=dtype, candidates=mask)
