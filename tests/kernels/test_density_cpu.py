"""density_cpu and nearest_cpu at every instruction level, on exact-size buffers filled with NaN bits, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits
from kernels.test_cpu_kernels import Cpu, cpu  # noqa: F401  (a fixture)
from kernels.test_density_cuda import DTYPES, alike_and_far, check, labels_of, tokens


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "k"), [(1, 1, 1), (17, 33, 17), (145, 3, 40), (150, 130, 5)])
def test_density_cpu(cpu: Cpu, N: int, C: int, k: int, dtype: str, split: bool) -> None:  # noqa: F811
    cpu.split = split
    rng = np.random.default_rng(N)
    x = tokens(N, 2, N, C)
    mask, noise = rng.random((2, N)) < 0.7, rng.random((2, N)).astype(np.float32)
    offset = 4 if dtype == "float32" else 2
    for strip in ({}, {"strip_rows": 1}):
        check(cpu, x, k, dtype=dtype, offset_bytes=offset, **strip)
        check(cpu, x, k, dtype=dtype, offset_bytes=offset, mask=mask, noise=noise, **strip)


@pytest.mark.parametrize("k", [1, 2, 40])
def test_density_cpu_differences_and_no_numbers(cpu: Cpu, k: int) -> None:  # noqa: F811
    x = alike_and_far(9, 150, 24)
    check(cpu, x, k)
    x[:, 30, 2], x[:, 31, 5] = np.nan, np.inf
    check(cpu, x, k)
    x[:, 40:140] = x[:, 39:40]
    check(cpu, x, k, strip_rows=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "C", "K"), [(1, 3, 1), (150, 20, 150), (130, 9, 5), (40, 0, 3), (20, 8, 0)])
def test_nearest_cpu(cpu: Cpu, N: int, C: int, K: int, dtype: str) -> None:  # noqa: F811
    x = np.random.default_rng(N).standard_normal((2, N, C)).astype(np.float32)
    if K == 5:
        x[:1] = alike_and_far(3, N, C)
    bits = to_bits(x, dtype)
    values = from_bits(bits, dtype)
    centers = np.random.default_rng(K).integers(-1, N, (2, K)).astype(np.int64)
    for split in (False, True):
        cpu.split = split
        got = cpu.nearest_cuda({"B": 2, "N": N, "C": C, "K": K, "x": bits, "dtype": dtype, "offset_bytes": 4, "centers": centers})
        for b in range(2):
            np.testing.assert_array_equal(got[b], labels_of(values[b], centers[b]))
