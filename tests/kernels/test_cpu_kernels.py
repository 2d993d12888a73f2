"""The CPU kernels at every instruction level, on exact-size buffers: against the numpy references, and against each other to the bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kernels import test_topk_cuda as topk
from kernels.score_reference import LOGIT, MAX, MEAN, NONE, RANGE, SIGMOID, SUM, VISIBLE, Case
from kernels.score_reference import check as check_score
from kernels.test_gather_cuda import Tokens, gathered, scattered, unique_index

LEVELS = ["baseline", "avx2", "avx512"]
DTYPES = ["float32", "float16", "bfloat16"]


@dataclass
class Cpu:
    """The CPU kernels under the names that the CUDA tests' checks call."""

    kernels: Any
    level: int
    split: bool = False

    def __getattr__(self, name: str) -> Any:
        run = getattr(self.kernels, name.replace("_cuda", "_cpu"))
        return lambda arguments: run(arguments | {"level": self.level, "split": self.split})


@pytest.fixture(params=range(3), ids=LEVELS)
def cpu(request: pytest.FixtureRequest, kernels: Any) -> Cpu:
    if request.param not in kernels.cpu_levels():
        pytest.skip(f"this machine has no {LEVELS[request.param]}")
    return Cpu(kernels, request.param)


CASES = [
    Case(N=577, D=64),
    Case(B=2, H=4, Hkv=2, L=3, N=70, D=24, dtype="float16", causal=True, bias="float"),
    Case(H=6, Hkv=2, L=4, N=300, D=20, dtype="bfloat16", row_weights=True),
    Case(H=4, Hkv=1, L=5, N=33, D=16, dtype="float16", query_reduction=MAX, head_reduction=MAX),
    Case(H=2, L=2, N=540, D=72, dtype="float16", lse=True, key_range=(5, 537), head_reduction=SUM),
    Case(H=4, Hkv=2, L=3, N=300, query_reduction=NONE, key_range=(3, 270), normalize=RANGE),
    Case(H=4, Hkv=2, L=3, N=300, query_reduction=NONE, head_reduction=NONE, bias="bool", offset_bytes=4),
    Case(H=3, Hkv=1, L=30, N=260, D=40, causal=True, bias="bool", head_reduction=NONE),  # 5 passes
    Case(H=8, Hkv=8, L=37, N=290, D=16, causal=True, layout="bnhd", query_reduction=SUM),  # a task a key head
    Case(H=8, Hkv=8, L=37, N=40, D=16, dtype="bfloat16", query_reduction=MAX, row_weights=False, bias="float16"),
    Case(H=70, Hkv=1, L=2, N=50, D=8),  # more rows in a group than a task takes
    Case(H=2, L=2, N=20, D=300, offset_bytes=4),  # two blocks of head dims
    Case(H=6, Hkv=1, L=2, N=40, D=300, dtype="float16", offset_bytes=2),
    Case(B=2, L=3, N=40, positions=[[39, -1, 5], [-1, -1, -1]]),
]
OPTIONS = [  # of both kernels of attention_scores
    Case(H=4, Hkv=2, L=5, N=300, D=24, activation=LOGIT, query_reduction=MAX, causal=True, bias="bool"),
    Case(H=4, Hkv=2, L=40, N=70, D=24, activation=SIGMOID, query_reduction=VISIBLE, causal=True, accumulate=True),
    Case(B=2, H=4, L=6, Hkv=4, N=90, head_weights=[0.5, 0.0, 2.0, 1.0], query_reduction=VISIBLE, bias="bool", row_weights=True),
    Case(B=2, H=2, L=26, N=60, activation=LOGIT, query_reduction=NONE, head_reduction=NONE, accumulate=True, key_range=(7, 52)),
]
CASES += OPTIONS
# The same calls by the all-row kernel, and sizes around its strips of 24 rows; a wave packs at most 128 key heads.
STRIPS = [replace(case, plan={"algo": "cpu_strip"}) for case in CASES if case.query_reduction != NONE or case.head_reduction == NONE]
STRIPS += [
    Case(H=2, L=L, N=N, D=D, causal=L % 2 == 0, dtype=dtype, offset_bytes=4, plan={"algo": "cpu_strip"})
    for L, N, D, dtype in [(24, 16, 8, "float32"), (25, 33, 17, "float16"), (50, 31, 0, "float32"), (73, 100, 300, "bfloat16")]
]
STRIPS += [
    Case(H=4, Hkv=1, L=60, N=90, D=24, query_reduction=MAX, head_reduction=NONE, bias="bool", plan={"algo": "cpu_strip"}),
    Case(B=5, H=27, Hkv=27, L=26, N=20, D=8, head_reduction=SUM, key_range=(3, 17), plan={"algo": "cpu_strip"}),
    Case(H=1, Hkv=1, L=80, N=40, D=1100, row_weights=True, plan={"algo": "cpu_strip"}),
    Case(L=49, N=40, query_reduction=NONE, head_reduction=NONE, lse=True, key_range=(5, 39), plan={"algo": "cpu_strip"}),
]
CASES += STRIPS


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_score_cpu(cpu: Cpu, case: Case) -> None:
    got = check_score(cpu, case)
    cpu.split = True
    again = check_score(cpu, case)
    np.testing.assert_array_equal(got["scores"], again["scores"], err_msg="the order of the tasks changed the scores")
    np.testing.assert_array_equal(got["lse"], again["lse"])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_score_cpu_levels_agree_to_the_bit(kernels: Any, case: Case) -> None:
    results = [Cpu(kernels, level).score_cuda(case.arguments()) for level in kernels.cpu_levels()]
    for result in results[1:]:
        assert result["scores"].tobytes() == results[0]["scores"].tobytes()
        assert result["lse"].tobytes() == results[0]["lse"].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("L", [1, 6])
def test_score_cpu_every_head_dim(cpu: Cpu, L: int, dtype: str) -> None:
    for D in [0, 1, 7, 8, 15, 16, 17, 24, 31, 33, 64, 80, 257]:
        check_score(cpu, Case(H=1, Hkv=1, N=21, L=L, D=D, dtype=dtype, offset_bytes=4))


def test_score_cpu_every_key_count(cpu: Cpu) -> None:
    for N in [0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 513]:
        for L in (1, 6):
            check_score(cpu, Case(H=1, Hkv=1, N=N, L=L, D=8, bias="bool"))


@pytest.mark.parametrize("L", [1, 6])
def test_score_cpu_nan_makes_its_row_nan(cpu: Cpu, L: int) -> None:
    case = Case(B=2, H=2, L=L, N=600, D=16, query_reduction=NONE, head_reduction=NONE)
    case.query_bits[0, 1, 0, 3] = np.nan
    scores = cpu.score_cuda(case.arguments())["scores"]
    assert np.isnan(scores[0, 1, 0]).all()
    assert np.isnan(scores).sum() == 600


@pytest.mark.parametrize("how", [NONE, SUM, MAX, MEAN])
@pytest.mark.parametrize(
    "case",
    [
        Case(H=4, Hkv=2, L=6, N=600, D=16, causal=True),
        Case(H=4, Hkv=2, L=6, N=600, D=16, causal=True, bias="bool", key_range=(40, 590), normalize=RANGE),
        Case(H=4, Hkv=2, L=6, N=300, D=16, lse=True, bias="bool", positions=[[-1, 20, 299, 270, 5, 70]]),
        Case(H=8, Hkv=8, L=37, N=70, D=16, causal=True, bias="bool"),  # several passes, a task a key head
        Case(H=4, Hkv=2, L=50, N=70, D=16, causal=True, bias="bool", plan={"algo": "cpu_strip"}),
        Case(H=4, Hkv=2, L=50, N=70, D=16, causal=True, bias="bool", lse=True, plan={"algo": "cpu_strip"}),
    ],
    ids=str,
)
def test_score_cpu_nan_row_leaves_hidden_keys_alone(cpu: Cpu, case: Case, how: int) -> None:
    """A NaN row is NaN on the keys that it sees, and what other rows and heads give the rest is the same to the bit."""
    case = replace(case, query_reduction=how, head_reduction=NONE)
    clean = cpu.score_cuda(case.arguments())["scores"]
    if case.lse:
        case.given_lse[0, 1, 3] = np.nan
    else:
        case.query_bits[0, 1, 3, 2] = np.nan
    sees = np.zeros(case.logits().shape, dtype=np.bool_)
    sees[0, 1, 3] = ~np.isneginf(case.logits()[0, 1, 3])
    sees = sees[..., case.begin : case.end]
    assert sees.any()
    assert not sees[0, 1, 3].all()
    got = cpu.score_cuda(case.arguments())["scores"]
    nan = np.isnan(got)
    assert (nan == (sees if how == NONE else sees.any(axis=2, keepdims=True))).all()
    if how == NONE:
        assert (got[0, 1, 3][~sees[0, 1, 3]] == 0).all()
    assert (got[~nan] == clean[~nan]).all()


def test_score_cpu_hidden_keys_are_never_read_into_a_row(cpu: Cpu) -> None:
    for L in (1, 6):
        hidden = np.ones((1, 1, 1, 300), dtype=np.bool_)
        hidden[..., 290] = False
        case = Case(H=2, L=L, N=300, D=16, bias_values=hidden)
        case.key_bits[:, :, 290] = np.nan
        scores = cpu.score_cuda(case.arguments())["scores"]
        assert not np.isnan(scores).any()
        assert scores[..., 290] == 0


def test_score_cpu_exp_over_the_whole_range(cpu: Cpu) -> None:
    """One channel and a given lse of 0: scores are exp(key). Exact zeros below 2^-127, inf from 2^128 on, 2e-7 + 2e-8 |x| between."""
    edges = [0.0, -0.0, -87.3, -88.1, -1e30, -np.inf, 88.7, 89.0, 1e30, np.inf]
    x = np.concatenate([np.linspace(-87.3, 88.3, 4000), edges]).astype(np.float32)
    case = Case(H=1, Hkv=1, N=x.size, D=1, query=np.ones(()), key=x[:, None], scale=1.0, query_reduction=NONE, lse=True)
    case.given_lse[:] = 0
    got = cpu.score_cuda(case.arguments())["scores"].ravel()
    assert (got[x < -88] == 0).all()
    assert np.isposinf(got[x > 88.8]).all()
    inside = (x > -87.31) & (x < 88.31)
    wanted = np.exp(x[inside].astype(np.float64))
    assert (abs(got[inside] / wanted - 1) <= 2e-7 + 2e-8 * abs(x[inside])).all()
    assert (got[x == 0] == 1).all()


def test_score_cpu_no_rows_give_zeros(cpu: Cpu) -> None:
    for how in (MEAN, SUM, MAX):
        scores = cpu.score_cuda(Case(L=0, N=20, query_reduction=how).arguments())["scores"]
        assert scores.shape == (1, 1, 1, 20)
        assert not scores.any()


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [0, 1, 4])
def test_topk_cpu(cpu: Cpu, distinct: int, dtype: str, order: str) -> None:
    for N in [1, 5, 8, 15, 16, 17, 33, 256, 257, 577, 1300]:
        scores = topk.random_scores(N, 3, N, distinct)
        for K in sorted({0, 1, N // 4, N // 2, N - 1, N, N + 3}):
            topk.check(cpu, scores=scores, K=K, dtype=dtype, order=order)


@pytest.mark.parametrize("order", ["position", "score"])
@pytest.mark.parametrize("split", [False, True], ids=["one_thread", "split"])
def test_topk_cpu_masks(cpu: Cpu, split: bool, order: str) -> None:
    cpu.split = split
    rng = np.random.default_rng(0)
    for share in (0.0, 0.05, 0.4, 0.95, 1.0):
        B, N = 70, 300  # more rows than scratch areas
        masks = {"candidates": rng.random((B, N)) < share, "always_keep": rng.random((B, N)) < 0.2}
        k_rows = rng.integers(0, 71, B)
        around = {"prefix": 3, "suffix": 5} if order == "position" else {}
        scores = topk.random_scores(1, B, N, 5)
        topk.check(cpu, scores=scores, K=70, order=order, k_rows=k_rows, offset=35, **masks, **around)
        topk.check(cpu, scores=scores, K=70, order=order, candidates=masks["candidates"])
        topk.check(cpu, scores=scores, K=30, order=order, always_keep=masks["always_keep"])


def test_topk_cpu_k_out_of_range_is_an_error(cpu: Cpu) -> None:
    for bad in (-1, 4):
        with pytest.raises(RuntimeError, match=r"every k must be in \[0, max_k\]"):
            topk.check(cpu, scores=np.zeros((1, 9)), K=3, k_rows=np.array([bad]))


TOKENS = [Tokens(W) for W in (1, 2, 4, 8, 16)] + [Tokens(W=4, pad=4), Tokens(W=100), Tokens(W=16, M=3, heads_first=True)]


@pytest.mark.parametrize("split", [False, True], ids=["one_thread", "split"])
def test_gather_cpu_and_back(cpu: Cpu, split: bool) -> None:
    cpu.split = split
    rng = np.random.default_rng(1)
    for B, N, K in [(1, 1, 1), (2, 37, 11), (3, 1500, 400), (2, 5, 0), (0, 5, 2)]:
        index = unique_index(rng, B, N, K, holes=3)
        shape = {"B": B, "N": N, "K": K, "index": index}
        made = [tokens.make(rng, B, N) for tokens in TOKENS]
        for out, (_, view) in zip(cpu.gather_cuda(shape | {"tensors": [d for d, _ in made]}), made):
            assert out.tobytes() == gathered(view, index).tobytes()
        made = [tokens.compact(rng, B, K) for tokens in TOKENS]
        for out, (_, data) in zip(cpu.scatter_rows_cuda(shape | {"tensors": [d for d, _ in made]}), made):
            assert out.tobytes() == scattered(data, index, N).tobytes()


@pytest.mark.parametrize("bad", [-2, 5, 1 << 40, -(1 << 62)])
def test_gather_cpu_index_out_of_range_is_an_error(cpu: Cpu, bad: int) -> None:
    tokens, _ = Tokens(8).make(np.random.default_rng(0), 1, 5)
    arguments = {"B": 1, "N": 5, "K": 2, "index": np.array([[0, bad]]), "tensors": [tokens]}
    for run in (cpu.gather_cuda, cpu.scatter_rows_cuda):
        with pytest.raises(RuntimeError, match=r"every index must be in \[-1, N\)"):
            run(arguments)
