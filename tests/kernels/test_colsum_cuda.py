"""score_cuda of all query rows (two sweeps, strips) under the host SIMT runtime, against float64 numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernels.score_reference import LOGIT, MAX, MEAN, NONE, RANGE, SIGMOID, SUM, VISIBLE, Case, check

TWO = {"algo": "two_pass"}
STRIP = {"algo": "strip"}
SPLIT = TWO | {"row_splits": 2, "col_splits": 2}
DTYPES = ["float32", "float16", "bfloat16"]

# Small shapes with everything in them: run once per schedule, and under the sanitizers.
SCHEDULED = [
    Case(L=70, N=90, D=24, dtype="float16", causal=True, plan=SPLIT),
    Case(B=2, H=4, Hkv=2, L=66, N=70, D=72, dtype="bfloat16", plan=SPLIT, row_weights=True),
    Case(H=2, Hkv=1, L=70, N=70, D=20, causal=True, query_reduction=VISIBLE, plan=SPLIT),
    Case(H=2, Hkv=1, L=33, N=140, D=40, bias="bool", query_reduction=MAX, head_reduction=NONE, dtype="float16", plan=SPLIT),
    Case(H=2, Hkv=1, L=90, N=130, D=24, dtype="float16", bias="bool", plan=STRIP | {"rows_per_pass": 48}),
    Case(B=2, H=2, Hkv=2, L=70, N=70, D=72, dtype="bfloat16", causal=True, head_reduction=MAX, plan=STRIP),
    Case(H=2, Hkv=2, L=40, N=70, lse=True, key_range=(3, 69), head_reduction=MAX, plan=TWO | {"col_splits": 1}),
]


@pytest.mark.parametrize("case", SCHEDULED, ids=range(len(SCHEDULED)))
def test_colsum_every_schedule(scheduled: Any, case: Case) -> None:
    check(scheduled, case)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("L", "N"), [(1, 1), (63, 64), (64, 65), (65, 257), (129, 129), (300, 260), (90, 31)])
def test_colsum_boundaries(kernels: Any, L: int, N: int, dtype: str, causal: bool) -> None:
    """Tiles of 64 streamed and of 64, 128 or 256 stationary rows, full and not; more rows than keys: the first see nothing."""
    case = Case(H=2, Hkv=1, L=L, N=N, D=16, dtype=dtype, causal=causal)
    check(kernels, replace(case, plan=TWO))
    check(kernels, replace(case, plan=TWO | {"row_splits": 3, "col_splits": 3}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 8, 15, 33, 64, 65, 72, 80, 81, 88, 128, 129, 200, 256])
def test_colsum_head_dims(kernels: Any, D: int, dtype: str) -> None:
    check(kernels, Case(H=1, Hkv=1, N=70, L=66, D=D, dtype=dtype, plan=TWO))


@pytest.mark.parametrize("dtype", DTYPES)
def test_colsum_views(kernels: Any, dtype: str) -> None:
    """Transposed storage, and rows that are not 16-byte aligned."""
    check(kernels, Case(B=2, H=4, Hkv=2, L=37, N=67, D=32, dtype=dtype, layout="bnhd", plan=TWO))
    check(kernels, Case(B=2, H=3, Hkv=3, L=35, N=37, D=20, dtype=dtype, layout="bnhd", plan=TWO))
    check(kernels, Case(L=35, N=37, D=72, dtype=dtype, offset_bytes=4, plan=TWO))


@pytest.mark.parametrize("plan", [TWO, SPLIT], ids=["one", "split"])
@pytest.mark.parametrize("heads", [NONE, MEAN, SUM, MAX])
@pytest.mark.parametrize("rows", [MEAN, SUM, MAX, VISIBLE])
def test_colsum_reductions(kernels: Any, rows: int, heads: int, plan: dict[str, Any]) -> None:
    case = Case(B=2, H=4, Hkv=2, L=70, N=80, D=16, dtype="float16", query_reduction=rows, head_reduction=heads, plan=plan)
    check(kernels, case)
    check(kernels, replace(case, causal=True, accumulate=True))
    if rows != MAX:
        check(kernels, replace(case, causal=True, row_weights=True))
    if heads in (MEAN, SUM):
        check(kernels, replace(case, head_weights=[0.5, 0.0, 2.0, -1.0], accumulate=True))
        check(kernels, replace(case, head_weights=[0.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("activation", [LOGIT, SIGMOID])
@pytest.mark.parametrize("rows", [MEAN, SUM, MAX, VISIBLE])
@pytest.mark.parametrize("heads", [NONE, MEAN, MAX])
def test_colsum_activations(kernels: Any, activation: int, rows: int, heads: int) -> None:
    case = Case(B=2, H=4, Hkv=2, L=66, N=70, D=16, dtype="float16", query_reduction=rows, head_reduction=heads, activation=activation)
    check(kernels, replace(case, plan=SPLIT))
    check(kernels, replace(case, plan=TWO, causal=True, bias="bool", normalize=RANGE, key_range=(5, 61)))
    check(kernels, replace(case, plan=TWO, bias="float"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", ["float", "float16", "bool"])
def test_colsum_bias(kernels: Any, bias: str, causal: bool) -> None:
    for rows in (MEAN, VISIBLE):
        check(kernels, Case(B=2, H=4, Hkv=2, L=70, N=75, D=16, bias=bias, causal=causal, dtype="float16", query_reduction=rows, plan=SPLIT))
        check(kernels, Case(B=2, H=4, Hkv=2, L=70, N=75, D=16, bias=bias, causal=causal, query_reduction=rows, plan=TWO))


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("normalize", [0, RANGE])
@pytest.mark.parametrize("key_range", [(0, 100), (7, 91), (64, 65), (30, 100)])
def test_colsum_key_range(kernels: Any, key_range: tuple[int, int], normalize: int, lse: bool) -> None:
    case = Case(L=66, N=100, D=16, dtype="bfloat16", key_range=key_range, normalize=normalize, lse=lse, plan=SPLIT)
    check(kernels, case)
    check(kernels, replace(case, causal=True, head_reduction=NONE))


@pytest.mark.parametrize("rows", [MEAN, SUM, MAX, VISIBLE])
def test_colsum_query_positions(kernels: Any, rows: int) -> None:
    """Unused slots (-1) give nothing and do not count; a batch whose slots are all unused gives zeros."""
    some = [int(x) for x in np.random.default_rng(1).integers(-1, 75, 70)]
    case = Case(B=3, H=2, L=70, N=75, D=16, positions=[some, [-1] * 69 + [74], [-1] * 70], query_reduction=rows, dtype="float16")
    check(kernels, replace(case, plan=TWO))
    check(kernels, replace(case, plan=SPLIT, row_weights=rows != MAX))
    check(kernels, replace(case, plan=SPLIT, activation=SIGMOID))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [SUM, MAX])
def test_colsum_not_finite_logits(kernels: Any, rows: int, bad: float) -> None:
    """NaN and +inf make their whole row NaN, as in torch; -inf hides a key; a row of NaN alone is no row that sees nothing."""
    bias = np.zeros((1, 2, 40, 70), dtype=np.float32)
    bias[0, 0, 3, 65] = bad
    bias[0, 1, 4] = bad
    for plan in (TWO, SPLIT):
        case = Case(L=40, N=70, D=16, bias_values=bias, query_reduction=rows, head_reduction=NONE, plan=plan)
        check(kernels, case)
        check(kernels, replace(case, dtype="float16"))


def test_colsum_nan_query(kernels: Any) -> None:
    """The lean kernel too: a NaN query row makes every score of its head NaN, and head weight 0 takes it away."""
    query = np.random.default_rng(0).standard_normal((1, 2, 70, 16))
    query[0, 1, 5] = np.nan
    case = Case(L=70, N=70, D=16, query=query, dtype="float16", head_reduction=NONE, plan=SPLIT)
    assert np.isnan(check(kernels, case)["scores"][:, 1]).all()
    check(kernels, replace(case, head_reduction=SUM, head_weights=[1.0, 0.0]))
    check(kernels, replace(case, head_reduction=SUM, head_weights=[1.0, 0.0], query_reduction=MAX))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 20.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_colsum_scales(kernels: Any, dtype: str, scale: float) -> None:
    """A negative scale turns the maximum over; 0 is uniform; logits of +-500 need the maximum at all."""
    rng = np.random.default_rng(0)  # small integers: their dot products are exact in float32
    query, key = rng.integers(-3, 4, (1, 1, 70, 16)), rng.integers(-3, 4, (1, 1, 90, 16))
    case = Case(H=1, Hkv=1, L=70, N=90, D=16, dtype=dtype, scale=scale, query=query, key=key, plan=SPLIT)
    scores, lse = case.expected()
    result = kernels.score_cuda(case.arguments())
    np.testing.assert_allclose(result["lse"], lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result["scores"], scores, rtol=2e-5 if abs(scale) < 1 else 1e-3, atol=1e-9)


def test_colsum_rescales(kernels: Any) -> None:
    """Later keys beat the running maximum by more than 2^64, forwards and backwards."""
    bias = np.linspace(0.0, 900.0, 200, dtype=np.float32).reshape(1, 1, 1, 200)
    for values in (bias, bias[..., ::-1].copy()):
        case = Case(H=1, Hkv=1, L=34, N=200, D=16, bias_values=values, plan=TWO)
        scores, _ = case.expected()
        np.testing.assert_allclose(kernels.score_cuda(case.arguments())["scores"], scores, rtol=2e-4, atol=1e-9)


def test_colsum_repeats_bit_for_bit(kernels: Any) -> None:
    """Fixed summation order: any schedule, any interleaving of blocks gives the same bits."""
    case = Case(B=2, H=4, Hkv=2, L=70, N=150, D=24, dtype="float16", causal=True, plan=TWO | {"row_splits": 3, "col_splits": 2})
    results = []
    for order, seed, blocks in [("ascending", 0, 1), ("descending", 0, 4), ("random", 1, 2), ("random", 2, 8)]:
        kernels.configure(order, seed, blocks)
        results.append(kernels.score_cuda(case.arguments()))
    for other in results[1:]:
        assert (other["scores"].view(np.uint32) == results[0]["scores"].view(np.uint32)).all()
        assert (other["lse"].view(np.uint32) == results[0]["lse"].view(np.uint32)).all()


def test_colsum_as_planned(kernels: Any) -> None:
    """The plan's own launch at a size where several tiles of everything are full."""
    result = check(kernels, Case(H=2, Hkv=1, L=600, N=1100, D=64, dtype="bfloat16", causal=True))
    assert result["plan"]["algo"] == "two_pass"


@pytest.mark.parametrize("rows", [NONE, MEAN])
def test_colsum_no_keys_to_score(kernels: Any, rows: int) -> None:
    """The normalisers alone: one launch, no scores."""
    result = check(kernels, Case(L=200, N=150, D=16, key_range=(7, 7), causal=True, query_reduction=rows))
    assert result["plan"]["algo"] == "two_pass"
    assert result["plan"]["workspace_bytes"] == 0


def test_colsum_refuses_what_it_cannot_do(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="needs D <= 256"):
        kernels.score_cuda(Case(D=257, plan=TWO).arguments())
    with pytest.raises(RuntimeError, match="reduces query rows"):
        kernels.score_cuda(Case(query_reduction=NONE, plan=TWO).arguments())
    with pytest.raises(RuntimeError, match="splits must be positive"):
        kernels.score_cuda(Case(plan=TWO | {"row_splits": 0}).arguments())


# ---- both sweeps on warpgroups --------------------------------------------------------------------------------------------------

WGMMA = TWO | {"wgmma": True}
HALF = ["float16", "bfloat16"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [16, 72, 128])
@pytest.mark.parametrize(("L", "N"), [(1, 1), (63, 64), (65, 257), (129, 129), (330, 200), (90, 31)])
def test_wgmma_boundaries(kernels: Any, L: int, N: int, D: int, causal: bool) -> None:
    """Tiles of 64 rows and 256 keys, full and not; fewer tiles than buffers and more; splits with nothing to do."""
    case = Case(H=2, Hkv=1, L=L, N=N, D=D, dtype=HALF[L % 2], causal=causal)
    check(kernels, replace(case, plan=WGMMA))
    check(kernels, replace(case, plan=WGMMA | {"row_splits": 3, "col_splits": 3}))
    check(kernels, replace(case, head_reduction=NONE, plan=WGMMA | {"col_splits": 3}))


@pytest.mark.parametrize("heads", [NONE, MEAN, SUM, MAX])
@pytest.mark.parametrize("rows", [MEAN, SUM])
def test_wgmma_reductions(kernels: Any, rows: int, heads: int) -> None:
    case = Case(B=2, H=4, Hkv=2, L=70, N=80, D=16, dtype="float16", query_reduction=rows, head_reduction=heads, plan=WGMMA)
    check(kernels, replace(case, causal=True, row_weights=True, accumulate=True))
    check(kernels, replace(case, bias="bool", plan=WGMMA | {"col_splits": 2}))
    check(kernels, replace(case, lse=True, key_range=(7, 71), normalize=RANGE))
    check(kernels, replace(case, positions=[[-1] * 20 + [40] * 50, [79] * 70]))
    if heads in (MEAN, SUM):
        check(kernels, replace(case, head_weights=[0.5, 0.0, 2.0, -1.0]))


def test_wgmma_every_schedule(scheduled: Any) -> None:
    check(scheduled, Case(L=330, N=90, D=72, H=1, Hkv=1, dtype="float16", causal=True, plan=WGMMA))
    check(scheduled, Case(L=70, N=130, D=24, dtype="bfloat16", head_reduction=NONE, plan=WGMMA | {"row_splits": 2, "col_splits": 2}))


def test_wgmma_takes_aligned_rows_only(kernels: Any) -> None:
    """Others go to the mma sweep; the transposed layout stays."""
    check(kernels, Case(L=35, N=37, D=72, dtype="float16", offset_bytes=4, plan=WGMMA))
    check(kernels, Case(L=35, N=37, D=20, dtype="float16", plan=WGMMA))
    check(kernels, Case(B=2, H=4, Hkv=2, L=37, N=67, D=32, dtype="bfloat16", layout="bnhd", plan=WGMMA))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 20.0])
def test_wgmma_scales(kernels: Any, scale: float) -> None:
    rng = np.random.default_rng(0)  # small integers: their dot products are exact in float32
    query, key = rng.integers(-3, 4, (1, 1, 70, 16)), rng.integers(-3, 4, (1, 1, 90, 16))
    case = Case(H=1, Hkv=1, L=70, N=90, D=16, dtype="float16", scale=scale, causal=True, query=query, key=key, plan=WGMMA)
    scores, lse = case.expected()
    result = kernels.score_cuda(case.arguments())
    np.testing.assert_allclose(result["lse"], lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result["scores"], scores, rtol=2e-5 if abs(scale) < 1 else 1e-3, atol=1e-9)


def test_wgmma_normalisers_alone(kernels: Any) -> None:
    case = Case(L=200, N=150, D=16, key_range=(7, 7), causal=True, dtype="float16", query_reduction=NONE)
    result = check(kernels, replace(case, plan={"device_wgmma": True}))
    assert result["plan"]["wgmma"]


def test_wgmma_nan_query(kernels: Any) -> None:
    query = np.random.default_rng(0).standard_normal((1, 2, 70, 16))
    query[0, 1, 5] = np.nan
    case = Case(L=70, N=70, D=16, query=query, dtype="float16", head_reduction=NONE, plan=WGMMA)
    assert np.isnan(check(kernels, case)["scores"][:, 1]).all()
    check(kernels, replace(case, head_reduction=SUM, head_weights=[1.0, 0.0]))


def test_wgmma_refuses_what_it_cannot_do(kernels: Any) -> None:
    for other in ({"dtype": "float32"}, {"D": 129}, {"query_reduction": MAX}, {"bias": "float"}, {"activation": SIGMOID}):
        with pytest.raises(RuntimeError, match="wgmma needs 16-bit types, D <= 128"):
            kernels.score_cuda(replace(Case(D=16, dtype="float16", plan=WGMMA), **other).arguments())


# ---- strips: all keys in one block --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("D", [16, 72])
@pytest.mark.parametrize(("L", "N"), [(1, 1), (7, 64), (16, 65), (65, 128), (129, 129), (64, 200), (200, 60)])
def test_strip_boundaries(kernels: Any, L: int, N: int, D: int, causal: bool) -> None:
    """Strips of 8 and 16 rows, tiles of 64, warps of 64 keys, full and not; rows that see nothing; one block and several."""
    case = Case(H=2, Hkv=1, L=L, N=N, D=D, dtype="float16", causal=causal)
    check(kernels, replace(case, plan=STRIP))
    check(kernels, replace(case, plan=STRIP | {"rows_per_pass": 48}))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("D", [1, 8, 15, 64, 65, 72, 80])
def test_strip_head_dims(kernels: Any, D: int, dtype: str) -> None:
    check(kernels, Case(H=1, Hkv=1, N=70, L=66, D=D, dtype=dtype, plan=STRIP))
    check(kernels, Case(B=2, H=4, Hkv=2, L=37, N=67, D=D, dtype=dtype, layout="bnhd", plan=STRIP))


@pytest.mark.parametrize("heads", [NONE, MEAN, SUM, MAX])
@pytest.mark.parametrize("rows", [MEAN, SUM])
def test_strip_reductions(kernels: Any, rows: int, heads: int) -> None:
    case = Case(B=2, H=6, Hkv=2, L=70, N=80, D=16, dtype="float16", query_reduction=rows, head_reduction=heads, plan=STRIP)
    check(kernels, case)
    check(kernels, replace(case, causal=True, accumulate=True, row_weights=True, plan=STRIP | {"rows_per_pass": 32}))
    check(kernels, replace(case, bias="bool", key_range=(5, 77)))
    if heads in (MEAN, SUM):
        check(kernels, replace(case, head_weights=[0.5, 0.0, 2.0, -1.0, 1.0, 1.0], accumulate=True))
        check(kernels, replace(case, head_weights=[0.0] * 6))


@pytest.mark.parametrize("normalize", [0, RANGE])
@pytest.mark.parametrize("key_range", [(0, 100), (7, 91), (64, 65), (30, 100)])
def test_strip_key_range(kernels: Any, key_range: tuple[int, int], normalize: int) -> None:
    case = Case(B=2, L=66, N=100, D=16, dtype="bfloat16", key_range=key_range, normalize=normalize, plan=STRIP)
    check(kernels, case)
    check(kernels, replace(case, causal=True, head_reduction=NONE, bias="bool"))


def test_strip_query_positions(kernels: Any) -> None:
    some = [int(x) for x in np.random.default_rng(1).integers(-1, 75, 70)]
    case = Case(B=3, H=2, L=70, N=75, D=16, positions=[some, [-1] * 69 + [74], [-1] * 70], dtype="float16", plan=STRIP)
    check(kernels, case)
    check(kernels, replace(case, row_weights=True, plan=STRIP | {"rows_per_pass": 32}))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_strip_scales(kernels: Any, scale: float) -> None:
    check(kernels, Case(L=70, N=90, D=16, dtype="float16", scale=scale, plan=STRIP))


def test_strip_nan_query(kernels: Any) -> None:
    query = np.random.default_rng(0).standard_normal((1, 2, 70, 16))
    query[0, 1, 5] = np.nan
    case = Case(L=70, N=70, D=16, query=query, dtype="float16", head_reduction=NONE, plan=STRIP)
    assert np.isnan(check(kernels, case)["scores"][:, 1]).all()
    check(kernels, replace(case, head_reduction=SUM, head_weights=[1.0, 0.0]))


def test_strip_repeats_bit_for_bit(kernels: Any) -> None:
    case = Case(B=2, H=4, Hkv=2, L=70, N=150, D=24, dtype="float16", causal=True, plan=STRIP | {"rows_per_pass": 32})
    results = []
    for order, seed, blocks in [("ascending", 0, 1), ("descending", 0, 4), ("random", 1, 2)]:
        kernels.configure(order, seed, blocks)
        results.append(kernels.score_cuda(case.arguments())["scores"].view(np.uint32))
    assert (results[1] == results[0]).all()
    assert (results[2] == results[0]).all()


@pytest.mark.parametrize(("N", "D"), [(577, 64), (640, 64), (729, 72), (768, 80)])
def test_strip_as_planned(kernels: Any, N: int, D: int) -> None:
    """CLIP and SigLIP, one head: the plan's own launch, up to all warps and keys."""
    result = check(kernels, Case(H=1, Hkv=1, L=N, N=N, D=D, dtype="bfloat16"))
    assert result["plan"]["algo"] == "strip"


def test_strip_refuses_what_it_cannot_do(kernels: Any) -> None:
    half = Case(D=16, dtype="float16", plan=STRIP)
    for case, message in [
        (replace(half, dtype="float32"), "strips need float16"),
        (replace(half, D=81), "D <= 80"),
        (replace(half, N=641), "does not hold the keys"),
        (replace(half, lse=True), "no lse"),
        (replace(half, query_reduction=MAX), "sum over rows"),
        (replace(half, bias="float"), "no bias but"),
        (replace(half, activation=LOGIT), "sum over rows"),
        (replace(half, L=40, plan=STRIP | {"rows_per_pass": 16, "col_splits": 2}), "do not cover the rows"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernels.score_cuda(case.arguments())


# ---- plans: host arithmetic, no kernel --------------------------------------------------------------------------------------


def plan(kernels: Any, shape: dict[str, int], **fields: Any) -> dict[str, Any]:
    """Plan on an H200, or on what the fields say."""
    sizes = [shape[name] for name in ("B", "H", "Hkv", "L", "N", "D")]
    result: dict[str, Any] = kernels.score_plan_cuda({"sizes": sizes, "dtype": "bfloat16", **fields})
    return result


SHAPES = {
    "llava_next": {"B": 1, "H": 32, "Hkv": 32, "L": 2944, "N": 2944, "D": 128},
    "qwen_16k": {"B": 1, "H": 28, "Hkv": 4, "L": 16384, "N": 16384, "D": 128},
    "siglip_2k": {"B": 1, "H": 16, "Hkv": 16, "L": 2304, "N": 2304, "D": 72},
    "video_50k_last_256": {"B": 1, "H": 28, "Hkv": 4, "L": 256, "N": 50176, "D": 128},
}
EXACT = {
    "llava_next": {"chunk_keys": 256, "num_chunks": 12, "row_splits": 3, "col_splits": 3, "smem_bytes": 40960, "num_semaphores": 384},
    "qwen_16k": {"chunk_keys": 256, "num_chunks": 64, "row_splits": 1, "col_splits": 5, "smem_bytes": 40960, "num_semaphores": 64},
    "siglip_2k": {"chunk_keys": 256, "num_chunks": 9, "row_splits": 8, "col_splits": 8, "smem_bytes": 24576, "num_semaphores": 144},
    "video_50k_last_256": {
        "chunk_keys": 256,
        "num_chunks": 196,
        "row_splits": 38,
        "col_splits": 2,
        "smem_bytes": 40960,
        "num_semaphores": 196,
    },
}
WORKSPACE = {  # row statistics, then partial sums or the splits' statistics
    "llava_next": 4 * (2 * 32 * 2944 + 2 * 3 * 32 * 2944),
    "qwen_16k": 4 * (2 * 28 * 16384 + 5 * 4 * 16384),
    "siglip_2k": 4 * (2 * 16 * 2304 + 2 * 8 * 16 * 2304),
    "video_50k_last_256": 4 * (2 * 28 * 256 + 2 * 38 * 28 * 256),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_colsum_plan_of_named_shapes(kernels: Any, shape: str) -> None:
    p = plan(kernels, SHAPES[shape])
    assert {name: p[name] for name in EXACT[shape]} == EXACT[shape]
    assert p["threads"] == 128
    assert p["workspace_bytes"] == WORKSPACE[shape]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cc", [(80, 108, 163 << 10), (89, 128, 99 << 10), (90, 132, 227 << 10), (120, 170, 99 << 10)], ids=lambda c: c[0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_colsum_plan_fits_the_device(kernels: Any, shape: str, dtype: str, cc: tuple[int, int, int]) -> None:
    device = {"compute_capability": cc[0], "num_sms": cc[1], "smem_per_block": cc[2]}
    p = plan(kernels, SHAPES[shape], dtype=dtype, **device)
    assert p["algo"] == "two_pass"
    assert p["smem_bytes"] + (3 << 10) <= cc[2]
    assert p["num_chunks"] * p["chunk_keys"] >= SHAPES[shape]["N"]
    blocks = SHAPES[shape]["B"] * SHAPES[shape]["Hkv"] * p["num_chunks"] * p["col_splits"]
    assert blocks >= 2 * cc[1]


def test_colsum_plan_of_wgmma(kernels: Any) -> None:
    """Only where it is asked for, and for what it takes; half as many blocks are resident."""
    shape = SHAPES["llava_next"]
    assert not plan(kernels, shape)["wgmma"]
    p = plan(kernels, shape, device_wgmma=True)
    assert (p["wgmma"], p["chunk_keys"], p["num_chunks"], p["row_splits"], p["col_splits"]) == (True, 256, 12, 2, 2)
    assert not plan(kernels, shape | {"D": 136}, device_wgmma=True)["wgmma"]
    for other in ({"dtype": "float32"}, {"query_reduction": MAX}, {"activation": SIGMOID}, {"smem_per_block": 64 << 10}):
        assert not plan(kernels, shape, device_wgmma=True, **other)["wgmma"]


def test_colsum_plan_takes_other_roads(kernels: Any) -> None:
    """What the sweeps do not take, or do worse, stays with the few-row kernels."""
    shape = SHAPES["llava_next"]
    assert plan(kernels, shape, query_reduction=NONE)["algo"] in ("cluster", "split")
    assert plan(kernels, shape | {"L": 64})["algo"] == "cluster"
    assert plan(kernels, shape | {"L": 129})["algo"] == "two_pass"
    assert plan(kernels, shape | {"L": 31, "Hkv": 4})["algo"] in ("cluster", "split")
    assert plan(kernels, shape, range_begin=5, range_end=5)["algo"] == "two_pass"  # the first sweep alone
    assert plan(kernels, shape, range_begin=5, range_end=5, lse=True)["algo"] in ("cluster", "split")
    wide = shape | {"D": 256}
    assert plan(kernels, wide, dtype="float32")["algo"] == "two_pass"
    assert plan(kernels, wide, dtype="float32", smem_per_block=99 << 10)["algo"] in ("cluster", "split")


def test_colsum_plan_memory_is_linear(kernels: Any) -> None:
    """Row statistics and partial sums: nothing grows with L x N."""
    for N in (2048, 65536):
        p = plan(kernels, {"B": 1, "H": 32, "Hkv": 8, "L": N, "N": N, "D": 128})
        assert p["workspace_bytes"] <= 8 * 32 * N * (1 + p["row_splits"]) + 4 * 8 * p["col_splits"] * N + 64
        given = plan(kernels, {"B": 1, "H": 32, "Hkv": 8, "L": N, "N": N, "D": 128}, lse=True)
        assert given["workspace_bytes"] <= 8 * 32 * N * given["row_splits"] + 4 * 8 * given["col_splits"] * N + 64


STRIPS = {  # warps, blocks that share the rows, rows of each
    "clip_b1": ({"B": 1, "H": 16, "Hkv": 16, "L": 577, "N": 577, "D": 64}, (320, 8, 80)),
    "clip_b64": ({"B": 64, "H": 16, "Hkv": 16, "L": 577, "N": 577, "D": 64}, (320, 1, 592)),
    "siglip_b1": ({"B": 1, "H": 16, "Hkv": 16, "L": 729, "N": 729, "D": 72}, (384, 8, 96)),
    "siglip_b64": ({"B": 64, "H": 16, "Hkv": 16, "L": 729, "N": 729, "D": 72}, (384, 1, 736)),
}


@pytest.mark.parametrize("shape", STRIPS)
def test_strip_plan_of_named_shapes(kernels: Any, shape: str) -> None:
    sizes, expected = STRIPS[shape]
    p = plan(kernels, sizes)
    assert p["algo"] == "strip"
    assert (p["threads"], p["col_splits"], p["rows_per_pass"]) == expected
    assert p["smem_bytes"] == 24576
    assert p["workspace_bytes"] == 4 * 16 * sizes["B"] * sizes["N"] * p["col_splits"]
    assert p["num_semaphores"] == 0


def test_strip_plan_takes_other_roads(kernels: Any) -> None:
    shape = STRIPS["clip_b1"][0]
    for change in ({"N": 641}, {"D": 88}):
        assert plan(kernels, shape | change)["algo"] == "two_pass"
    fields: list[dict[str, Any]] = [
        {"dtype": "float32"},
        {"query_reduction": MAX},
        {"query_reduction": VISIBLE},
        {"activation": 1},
        {"lse": True},
    ]
    for field in fields:
        assert plan(kernels, shape, **field)["algo"] == "two_pass"
    assert plan(kernels, shape | {"N": 2000, "L": 577}, normalize=RANGE, range_begin=10, range_end=600)["algo"] == "strip"
