"""pagerank_cuda under the host SIMT runtime, against float64 numpy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits

DTYPES = ["float32", "float16", "bfloat16"]
SPLIT = {"row_splits": 2, "col_splits": 2}


@dataclass
class Case:
    """One call; `plan` forces the splits."""

    B: int = 1
    H: int = 2
    Hkv: int = 2
    N: int = 70
    D: int = 16
    dtype: str = "float16"
    causal: bool = False
    mask: bool = False
    start: bool = False
    iterations: int = 5
    tokens_first: bool = False
    plan: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.N)
        self.query = to_bits(rng.standard_normal((self.B, self.H, self.N, self.D)) * 2, self.dtype)
        self.key = to_bits(rng.standard_normal((self.B, self.Hkv, self.N, self.D)) * 2, self.dtype)
        self.visible = rng.random((self.B, self.N)) < 0.7 if self.mask else None
        self.first = rng.uniform(0.0, 1.0, (self.B, self.N)).astype(np.float32) if self.start else None

    def arguments(self) -> dict[str, Any]:
        axes = (0, 2, 1, 3) if self.tokens_first else (0, 1, 2, 3)
        return {
            "sizes": [self.B, self.H, self.Hkv, self.N, self.D],
            "query": np.ascontiguousarray(self.query.transpose(axes)),
            "key": np.ascontiguousarray(self.key.transpose(axes)),
            "tokens_first": self.tokens_first,
            "mask": self.visible,
            "start": self.first,
            "scale": self.D**-0.5,
            "causal": self.causal,
            "iterations": self.iterations,
            "dtype": self.dtype,
            **self.plan,
        }

    def expected(self) -> np.ndarray:
        q, k = from_bits(self.query, self.dtype), np.repeat(from_bits(self.key, self.dtype), self.H // self.Hkv, axis=1)
        s = np.einsum("bhld,bhnd->bhln", q, k) * np.float64(np.float32(self.D**-0.5))
        if self.causal:
            s = np.where(np.tril(np.ones((self.N, self.N), dtype=bool)), s, -np.inf)
        if self.visible is not None:
            s = np.where(self.visible[:, None, None], s, -np.inf)
        with np.errstate(all="ignore"):
            p = np.exp(s - s.max(axis=-1, keepdims=True, initial=-np.inf))
            p = np.nan_to_num(p / p.sum(axis=-1, keepdims=True))
        first = np.full((self.B, self.N), 1 / self.N) if self.first is None else self.first.astype(np.float64)
        v = np.repeat(first[:, None], self.H, axis=1)
        for _ in range(self.iterations):
            v = np.einsum("bhl,bhln->bhn", v, p)
        return v


def check(kernels: Any, case: Case) -> np.ndarray:
    """Within 1e-4 relative of float64: each iteration adds its rounding (2e-5, score_reference.py) to the last one's."""
    result: np.ndarray = kernels.pagerank_cuda(case.arguments())
    np.testing.assert_allclose(result, case.expected(), rtol=1e-4, atol=1e-12, err_msg=str(case))
    return result


WGMMA = {"device_wgmma": True}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_pagerank_on_warpgroups(kernels: Any, dtype: str) -> None:
    """Row weights of every head, ranks of every head, hidden tokens, several tiles and splits."""
    case = Case(B=2, H=4, Hkv=2, N=300, D=72, dtype=dtype, causal=True, mask=True, plan=WGMMA)
    assert kernels.pagerank_plan_cuda(case.arguments())["wgmma"]
    check(kernels, case)
    check(kernels, replace(case, mask=False, start=True, plan=WGMMA | SPLIT))


@pytest.mark.parametrize("case", [Case(B=2, H=4, Hkv=2, causal=True, mask=True, plan=SPLIT), Case(dtype="float32", plan=SPLIT)], ids=[0, 1])
def test_pagerank_every_schedule(scheduled: Any, case: Case) -> None:
    check(scheduled, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 2, 63, 64, 65, 257])
def test_pagerank_sizes(kernels: Any, N: int, dtype: str) -> None:
    check(kernels, Case(N=N, dtype=dtype))
    check(kernels, Case(N=N, dtype=dtype, H=4, Hkv=1, causal=True, plan=SPLIT))


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("start", [False, True])
def test_pagerank_iterations(kernels: Any, iterations: int, start: bool) -> None:
    """Odd and even: the vectors end in `rank`."""
    check(kernels, Case(B=2, H=3, Hkv=3, iterations=iterations, start=start))
    check(kernels, Case(B=2, H=2, Hkv=1, iterations=iterations, start=start, mask=True, plan=SPLIT))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pagerank_mask(kernels: Any, dtype: str, causal: bool) -> None:
    """Masked tokens get nothing and spread their own mass; a row that sees nothing spreads nothing."""
    case = Case(B=3, N=80, D=72, dtype=dtype, causal=causal, mask=True, start=True, iterations=3)
    assert case.visible is not None
    case.visible[1] = False
    case.visible[2, :5] = False
    result = check(kernels, case)
    assert (result[1] == 0).all()
    assert (result[0, :, ~case.visible[0]] == 0).all()


def test_pagerank_conserves_mass(kernels: Any) -> None:
    result = check(kernels, Case(B=2, N=150, D=40, tokens_first=True, dtype="bfloat16"))
    np.testing.assert_allclose(result.sum(axis=-1), 1.0, rtol=1e-5)


def test_pagerank_nan_stays_in_its_head(kernels: Any) -> None:
    case = Case(H=2, iterations=2)
    case.query[0, 1, 3] = np.nan
    result = kernels.pagerank_cuda(case.arguments())
    assert np.isnan(result[0, 1]).all()
    assert np.isfinite(result[0, 0]).all()


def test_pagerank_repeats_bit_for_bit(kernels: Any) -> None:
    case = Case(B=2, H=4, Hkv=2, N=150, causal=True, plan=SPLIT)
    results = []
    for order, seed, blocks in [("ascending", 0, 1), ("descending", 0, 4), ("random", 1, 3)]:
        kernels.configure(order, seed, blocks)
        results.append(kernels.pagerank_cuda(case.arguments()).view(np.uint32))
    assert (results[1] == results[0]).all()
    assert (results[2] == results[0]).all()


@pytest.mark.parametrize("case", [Case(B=0), Case(H=0, Hkv=1), Case(N=0)], ids=["B", "H", "N"])
def test_pagerank_empty(kernels: Any, case: Case) -> None:
    assert kernels.pagerank_cuda(case.arguments()).size == 0


def test_pagerank_refuses_what_it_cannot_do(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="D must be in"):
        kernels.pagerank_cuda(Case(D=257).arguments())
    with pytest.raises(RuntimeError, match="shared memory"):
        kernels.pagerank_cuda(Case(D=256, dtype="float32").arguments() | {"smem_per_block": 99 << 10})
    check(kernels, replace(Case(D=257), iterations=0))  # nothing to compute


def test_pagerank_plan_of_named_shape(kernels: Any) -> None:
    """AIM's 7B: 28 query heads of 128, 4 key heads; memory is linear in N."""
    p = kernels.pagerank_plan_cuda({"sizes": [1, 28, 4, 1024, 128], "dtype": "bfloat16"})
    assert (p["tile_rows"], p["tile_keys"], p["row_splits"], p["col_splits"]) == (64, 256, 4, 16)
    assert (p["threads"], p["smem_bytes"]) == (128, 40960)
    assert p["workspace_bytes"] == 4 * 28 * 1024 * (2 + 16 + 1)
    assert p["flops"] == 6 * 2 * 28 * 1024 * 1024 * 128
