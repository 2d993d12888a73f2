"""score_cuda under the host SIMT runtime, against float64 numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernels.score_reference import LOGIT, MAX, MEAN, NONE, RANGE, SIGMOID, SUM, VISIBLE, Case, check

CLUSTER = {"algo": "cluster", "threads": 128}
SPLIT = {"algo": "split", "threads": 128}
DTYPES = ["float32", "float16", "bfloat16"]

# Small shapes with everything in them: run once per schedule, and under the sanitizers.
SCHEDULED = [
    Case(N=50, D=32, plan=CLUSTER | {"chunk_keys": 32}),
    Case(N=50, D=32, plan=SPLIT | {"chunk_keys": 16}),
    Case(B=2, H=4, Hkv=2, L=3, N=70, D=24, dtype="float16", causal=True, bias="float", plan=CLUSTER | {"chunk_keys": 16 * 2}),
    Case(H=6, Hkv=2, L=4, N=40, D=20, dtype="bfloat16", row_weights=True, plan=CLUSTER | {"chunk_keys": 48, "rows_per_pass": 5}),
    Case(H=4, Hkv=1, L=5, N=33, D=16, dtype="float16", query_reduction=MAX, plan=SPLIT | {"chunk_keys": 16, "rows_per_pass": 7}),
    Case(H=2, L=2, N=40, dtype="float32", lse=True, key_range=(5, 37), head_reduction=SUM, plan={"chunk_keys": 16}),
    Case(H=4, Hkv=2, L=3, N=40, query_reduction=NONE, key_range=(3, 30), normalize=RANGE, plan=CLUSTER | {"chunk_keys": 16}),
    Case(H=4, Hkv=2, L=3, N=40, query_reduction=VISIBLE, causal=True, accumulate=True, plan=SPLIT | {"chunk_keys": 16, "rows_per_pass": 4}),
    Case(H=2, L=3, N=40, activation=SIGMOID, head_weights=[1.0, 2.0], bias="bool", plan=CLUSTER | {"chunk_keys": 16}),
]


@pytest.mark.parametrize("case", SCHEDULED, ids=range(len(SCHEDULED)))
def test_score_every_schedule(scheduled: Any, case: Case) -> None:
    check(scheduled, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "Hkv", "L"), [(1, 1, 1), (2, 2, 3), (6, 2, 3), (8, 1, 2), (4, 1, 9), (3, 1, 22)])
def test_score_rows_and_groups(kernels: Any, dtype: str, H: int, Hkv: int, L: int) -> None:
    """1 to 66 rows of a group: every number of row tiles, and two passes."""
    check(kernels, Case(H=H, Hkv=Hkv, L=L, N=45, D=32, dtype=dtype))


@pytest.mark.parametrize("algo", [CLUSTER | {"chunk_keys": 32}, SPLIT | {"chunk_keys": 32}], ids=["cluster", "split"])
@pytest.mark.parametrize("N", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 128])
def test_score_key_boundaries(kernels: Any, algo: dict[str, Any], N: int) -> None:
    check(kernels, Case(N=N, L=2, dtype="float16", plan=algo))
    check(kernels, Case(N=N, L=2, dtype="float32", plan=algo))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 8, 15, 16, 20, 32, 33, 64, 72, 80, 128, 136, 256])
def test_score_head_dims(kernels: Any, D: int, dtype: str) -> None:
    check(kernels, Case(H=1, Hkv=1, N=20, L=2, D=D, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [2, 4, 8])
def test_score_unaligned_pointers(kernels: Any, dtype: str, offset: int) -> None:
    if dtype == "float32" and offset == 2:
        pytest.skip("float32 storage is 4-byte aligned")
    check(kernels, Case(N=20, L=2, D=32, dtype=dtype, offset_bytes=offset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_score_transposed_storage(kernels: Any, dtype: str) -> None:
    check(kernels, Case(B=2, H=4, Hkv=2, L=3, N=37, D=32, dtype=dtype, layout="bnhd"))
    check(kernels, Case(B=2, H=3, Hkv=3, L=2, N=37, D=20, dtype=dtype, layout="bnhd"))


@pytest.mark.parametrize("rows_per_pass", [2, 64])
@pytest.mark.parametrize("heads", [NONE, MEAN, SUM, MAX])
@pytest.mark.parametrize("rows", [NONE, MEAN, SUM, MAX])
def test_score_reductions(kernels: Any, rows: int, heads: int, rows_per_pass: int) -> None:
    """Every pair of reductions, grouped heads, in one pass and in three."""
    for Hkv in (1, 2):
        case = Case(B=2, H=4, Hkv=Hkv, L=3, N=30, D=16, query_reduction=rows, head_reduction=heads)
        check(kernels, replace(case, plan=CLUSTER | {"chunk_keys": 16, "rows_per_pass": rows_per_pass}))
        check(kernels, replace(case, plan=SPLIT | {"chunk_keys": 16, "rows_per_pass": rows_per_pass}))
        check(kernels, replace(case, row_weights=True, plan=CLUSTER | {"chunk_keys": 32, "rows_per_pass": rows_per_pass}))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [257, 1000, 1024, 2048])
def test_score_wide_heads(kernels: Any, D: int, dtype: str) -> None:
    """One head as wide as the model (DAMRO), as planned and in both algorithms; 20 rows of it do not fit one pass."""
    case = Case(H=1, Hkv=1, N=70, L=3, D=D, dtype=dtype)
    check(kernels, case)
    check(kernels, replace(case, L=20, plan={"smem_per_block": 99 << 10}))
    check(kernels, replace(case, plan=SPLIT | {"chunk_keys": 32}))


OPTIONS = [
    {"query_reduction": VISIBLE},
    {"query_reduction": VISIBLE, "row_weights": True, "causal": True},
    {"query_reduction": VISIBLE, "bias": "float", "bias_hole": True},
    {"head_weights": [0.5, 0.0, 2.0, -1.0]},
    {"head_weights": [0.5, 0.0, 2.0, 1.0], "head_reduction": SUM, "query_reduction": MAX},
    {"head_weights": [0.5, 0.0, 2.0, 1.0], "query_reduction": NONE},
    {"head_weights": [0.0, 0.0, 0.0, 0.0]},
    {"accumulate": True},
    {"accumulate": True, "head_reduction": NONE},
    {"accumulate": True, "query_reduction": NONE},
    {"accumulate": True, "query_reduction": NONE, "head_reduction": NONE},
    {"activation": LOGIT},
    {"activation": LOGIT, "causal": True, "query_reduction": MAX},
    {"activation": LOGIT, "bias": "bool", "query_reduction": VISIBLE, "normalize": RANGE, "key_range": (5, 37)},
    {"activation": SIGMOID, "bias": "float", "query_reduction": SUM, "row_weights": True},
    {"activation": SIGMOID, "causal": True, "query_reduction": NONE, "head_reduction": MAX},
    {"activation": SIGMOID, "causal": True, "query_reduction": MAX, "head_reduction": NONE, "L": 45},
]


@pytest.mark.parametrize("plan", [CLUSTER, SPLIT], ids=["cluster", "split"])
@pytest.mark.parametrize("rows_per_pass", [2, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_score_options(kernels: Any, options: dict[str, Any], rows_per_pass: int, plan: dict[str, Any]) -> None:
    """Activations, head weights, accumulate and visible means; grouped heads, in one pass and in three and more."""
    for Hkv in (1, 2):
        fields = {"B": 2, "H": 4, "Hkv": Hkv, "L": 3, "N": 40, "D": 16} | options
        if fields.pop("bias_hole", False):  # an additive -inf hides a key from some rows only
            bias = np.zeros((2, 4, 3, 40), dtype=np.float32)
            bias[:, :, 1, 7], bias[:, :, :, 8] = -np.inf, -np.inf
            fields |= {"bias": None, "bias_values": bias}
        check(kernels, Case(plan=plan | {"chunk_keys": 16, "rows_per_pass": rows_per_pass}, **fields))


def test_score_given_lse_of_minus_infinity_is_a_row_of_zeros(kernels: Any) -> None:
    for plan in ({}, {"algo": "two_pass"}):
        case = Case(H=1, Hkv=1, L=40, N=40, lse=True, query_reduction=VISIBLE, plan=plan)
        assert case.given_lse is not None
        case.given_lse[0, 0, 1] = -np.inf
        check(kernels, case)


def test_score_head_of_weight_zero_may_be_nan(kernels: Any) -> None:
    bias = np.zeros((1, 2, 2, 40), dtype=np.float32)
    bias[0, 1, 0, 3] = np.nan
    for plan in (CLUSTER, SPLIT):
        case = Case(L=2, N=40, bias_values=bias, head_weights=[2.0, 0.0], plan=plan | {"chunk_keys": 16})
        assert np.isfinite(check(kernels, case)["scores"]).all()


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("normalize", [0, RANGE])
@pytest.mark.parametrize("key_range", [(0, 50), (7, 41), (16, 32), (20, 20), (49, 50)])
def test_score_key_range(kernels: Any, key_range: tuple[int, int], normalize: int, lse: bool) -> None:
    for plan in (CLUSTER, SPLIT):
        forced = {"chunk_keys": 16} if lse else plan | {"chunk_keys": 16}
        check(kernels, Case(L=2, N=50, key_range=key_range, normalize=normalize, lse=lse, plan=forced))


@pytest.mark.parametrize("bias", ["float", "float16", "bool"])
@pytest.mark.parametrize("causal", [False, True])
def test_score_bias_and_causal(kernels: Any, bias: str, causal: bool) -> None:
    check(kernels, Case(B=2, H=4, Hkv=2, L=5, N=33, bias=bias, causal=causal))
    check(kernels, Case(B=2, H=4, Hkv=2, L=5, N=3, bias=bias, causal=causal))  # rows that see nothing


@pytest.mark.parametrize("rows", [NONE, MEAN, SUM, MAX])
def test_score_query_positions(kernels: Any, rows: int) -> None:
    """Unused slots (-1) give zero rows and do not count; a batch whose slots are all unused gives zeros."""
    case = Case(B=3, H=2, L=3, N=30, positions=[[29, 4, -1], [-1, 0, 12], [-1, -1, -1]], query_reduction=rows)
    check(kernels, case)
    check(kernels, replace(case, row_weights=True, plan=SPLIT | {"chunk_keys": 16}))


def test_score_masked_rows_are_zero_and_lse_minus_infinity(kernels: Any) -> None:
    visible = np.ones((1, 1, 3, 40), dtype=bool)
    visible[0, 0, 1] = False
    for plan in (CLUSTER | {"chunk_keys": 16}, SPLIT | {"chunk_keys": 16}):
        result = check(kernels, Case(L=3, N=40, bias_values=visible, query_reduction=NONE, head_reduction=NONE, plan=plan))
        assert (result["scores"][:, :, 1] == 0).all()
        assert np.isneginf(result["lse"][:, :, 1]).all()
    masked = np.where(visible, 0, -np.inf).astype(np.float32)  # the same as an additive bias
    check(kernels, Case(L=3, N=40, bias_values=masked, query_reduction=NONE, head_reduction=NONE))


@pytest.mark.parametrize("plan", [CLUSTER | {"chunk_keys": 16}, SPLIT | {"chunk_keys": 16}], ids=["cluster", "split"])
def test_score_chunk_without_visible_keys(kernels: Any, plan: dict[str, Any]) -> None:
    """A chunk whose keys are all masked adds nothing, not NaN."""
    visible = np.ones((1, 1, 1, 48), dtype=bool)
    visible[..., 16:32] = False
    check(kernels, Case(N=48, bias_values=visible, plan=plan))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [NONE, SUM, MAX])
@pytest.mark.parametrize("plan", [CLUSTER | {"chunk_keys": 16}, SPLIT | {"chunk_keys": 16}], ids=["cluster", "split"])
def test_score_not_finite_logits(kernels: Any, plan: dict[str, Any], rows: int, bad: float) -> None:
    """NaN and +inf make their whole row NaN, as in torch; -inf hides a key."""
    bias = np.zeros((1, 2, 2, 40), dtype=np.float32)
    bias[0, 0, 0, 21] = bad
    check(kernels, Case(L=2, N=40, bias_values=bias, query_reduction=rows, head_reduction=NONE, plan=plan))


def test_score_large_logits_do_not_overflow(kernels: Any) -> None:
    """exp needs the maximum: logits of +-1000 and a chunk far below the others."""
    bias = np.zeros((1, 1, 1, 48), dtype=np.float32)
    bias[..., :16] = -1000.0
    bias[..., 40] = 1000.0
    check(kernels, Case(N=48, bias_values=bias, head_reduction=NONE, plan=CLUSTER | {"chunk_keys": 16}))
    check(kernels, Case(N=48, bias_values=bias, head_reduction=NONE, plan=SPLIT | {"chunk_keys": 16}))


@pytest.mark.parametrize("case", [Case(B=0), Case(L=0), Case(N=0), Case(L=0, query_reduction=NONE), Case(N=0, normalize=RANGE)], ids=str)
def test_score_empty(kernels: Any, case: Case) -> None:
    check(kernels, case)


def test_score_without_heads_is_zero(kernels: Any) -> None:
    result = kernels.score_cuda(Case(H=1, Hkv=1, L=2).arguments() | {"sizes": [1, 0, 0, 2, 50, 32]})
    assert (result["scores"] == 0).all()


def test_score_all_keys_equal_is_uniform(kernels: Any) -> None:
    result = check(kernels, Case(N=64, key=np.ones((1, 1, 1, 1)), plan=CLUSTER | {"chunk_keys": 16}))
    np.testing.assert_allclose(result["scores"], 1 / 64, rtol=1e-6)


def test_score_repeats_bit_for_bit(kernels: Any) -> None:
    """Fixed summation order: any schedule, any interleaving of blocks gives the same bits."""
    case = Case(B=2, H=6, Hkv=3, L=3, N=70, D=24, dtype="float16", plan=CLUSTER | {"chunk_keys": 32})
    results = []
    for order, seed, blocks in [("ascending", 0, 1), ("descending", 0, 4), ("random", 1, 2), ("random", 2, 8)]:
        kernels.configure(order, seed, blocks)
        results.append(kernels.score_cuda(case.arguments()))
    for other in results[1:]:
        assert (other["scores"].view(np.uint32) == results[0]["scores"].view(np.uint32)).all()
        assert (other["lse"].view(np.uint32) == results[0]["lse"].view(np.uint32)).all()


@pytest.mark.parametrize("H", [1, 4])
def test_score_plans_of_real_shapes(kernels: Any, H: int) -> None:
    """The planned launch itself, at a size where clusters, warps and tiles are all full: 600 keys, 8 blocks."""
    check(kernels, Case(H=H, Hkv=1, L=1, N=1100, D=64, dtype="bfloat16", key_range=(35, 611)))


def test_score_refuses_what_it_cannot_do(kernels: Any) -> None:
    with pytest.raises(RuntimeError, match="D must be at most 2048"):
        kernels.score_cuda(Case(D=2049).arguments())
    with pytest.raises(RuntimeError, match="multiple of 16"):
        kernels.score_cuda(Case(plan=CLUSTER | {"chunk_keys": 20}).arguments())
    with pytest.raises(RuntimeError, match="given lse needs"):
        kernels.score_cuda(Case(lse=True, plan=CLUSTER).arguments())


# ---- plans: host arithmetic, no kernel --------------------------------------------------------------------------------------


def plan(kernels: Any, **fields: Any) -> dict[str, Any]:
    """Plan of a shape on an H200, or what `device` says."""
    device = fields.pop("device", {})
    sizes = [fields.pop(name) for name in ("B", "H", "Hkv", "L", "N", "D")]
    result: dict[str, Any] = kernels.score_plan_cuda({"sizes": sizes, "dtype": "bfloat16", **fields, **device})
    return result


SHAPES = {
    "clip_b1": {"B": 1, "H": 16, "Hkv": 16, "L": 1, "N": 577, "D": 64},
    "clip_b64": {"B": 64, "H": 16, "Hkv": 16, "L": 1, "N": 577, "D": 64},
    "llava_next": {"B": 1, "H": 32, "Hkv": 32, "L": 1, "N": 2944, "D": 128},
    "llava_next_64_rows": {"B": 1, "H": 32, "Hkv": 32, "L": 64, "N": 2944, "D": 128},
    "qwen_16k": {"B": 1, "H": 28, "Hkv": 4, "L": 1, "N": 16384, "D": 128},
    "video_50k": {"B": 1, "H": 28, "Hkv": 4, "L": 1, "N": 50176, "D": 128},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cc", [(80, 108, 163 << 10), (89, 128, 99 << 10), (90, 132, 227 << 10), (120, 170, 99 << 10)], ids=lambda c: c[0])
def test_score_plan_fits_the_device(kernels: Any, shape: str, cc: tuple[int, int, int]) -> None:
    device = {"compute_capability": cc[0], "num_sms": cc[1], "smem_per_block": cc[2]}
    p = plan(kernels, **SHAPES[shape], device=device)
    assert p["smem_bytes"] + (8 << 10) <= cc[2]
    assert p["chunk_keys"] * p["num_chunks"] >= SHAPES[shape]["N"]
    assert p["chunk_keys"] % 16 == 0
    assert p["threads"] % 32 == 0
    assert 128 <= p["threads"] <= 512
    assert p["algo"] == "split" or p["num_chunks"] <= (8 if cc[0] >= 90 else 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_score_plan_is_one_launch_on_h200(kernels: Any, shape: str) -> None:
    """Clusters of eight hold every named shape; K is read once."""
    p = plan(kernels, **SHAPES[shape])
    assert p["algo"] == "cluster"
    rows = SHAPES[shape]["H"] // SHAPES[shape]["Hkv"] * SHAPES[shape]["L"]
    assert p["rows_per_pass"] >= min(rows, 64)


def test_score_plan_memory_is_linear_in_keys(kernels: Any) -> None:
    """No workspace grows with L x N while rows are reduced, at any L."""
    for N in (4096, 65536):
        for L in (1, 16, 31):  # more: test_colsum_cuda.py
            p = plan(kernels, B=1, H=32, Hkv=8, L=L, N=N, D=128)
            assert p["workspace_bytes"] <= 4 * 8 * N + 8 * 32 * L * p["num_chunks"] + 64


def test_score_plan_counts_compulsory_traffic(kernels: Any) -> None:
    p = plan(kernels, **SHAPES["llava_next"])
    assert p["bytes_moved"] == (32 * 2944 * 128 + 32 * 128) * 2 + 2944 * 4
    assert p["flops"] == 2 * 32 * 2944 * 128
