"""match_cuda under the host SIMT runtime and match_cpu at every level: the exact plan where cosines are exact; what the plan chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits
from kernels.test_cosine_cuda import cosines, exact

DTYPES = ["float32", "float16", "bfloat16"]
NAMES = ("source", "destination", "similarity", "index", "inverse")
POSITION, SCORE = 0, 1


def lists_of(p: dict[str, Any], b: int) -> list[list[int]]:
    """keep, sources and targets of an image."""
    N, prefix = p["sizes"][2], p.get("prefix", 0)
    first = [list(range(prefix)), [n for n in range(prefix, N) if n % 2 == 0], [n for n in range(prefix, N) if n % 2 == 1]]
    given = [p.get(name) for name in ("keep", "sources", "targets")]
    return [d if g is None else [int(n) for n in (g if g.ndim == 1 else g[b])] for d, g in zip(first, given, strict=True)]


def plan_of_image(p: dict[str, Any], b: int, pairs: np.ndarray) -> tuple[list[Any], ...]:
    """One image's plan, one source after the other."""
    N, r = p["sizes"][2], p["r"]
    keep, sources, targets = lists_of(p, b)
    mask = np.ones(N, dtype=bool) if p.get("candidates") is None else p["candidates"][b]
    found = []  # (grade, -rank), place of the target, similarity
    to = np.array([t if 0 <= t < N else 0 for t in targets], dtype=np.int64)
    able = np.array([0 <= t < N and bool(mask[t]) for t in targets], dtype=bool)
    for i, s in enumerate(sources):
        best = -1
        if 0 <= s < N and mask[s] and able.any():
            best = int(np.argmin(np.where(able, np.where(np.isnan(pairs[s, to]), 100.0, -pairs[s, to]), np.inf)))
        value = 0.0 if best < 0 else float(pairs[s, targets[best]])
        rank = value + (0.0 if p.get("bias") is None else float(p["bias"][b, i]))
        grade = 2 if best < 0 else 1 if np.isnan(rank) else 0
        found.append(((grade, 0.0 if grade else -rank), best, value))
    order = sorted(range(len(sources)), key=lambda i: found[i][0])
    gone, stay = order[:r], order[r:]
    stay = sorted(stay) if p.get("order", POSITION) == POSITION else stay
    named = [n if 0 <= n < N else -1 for n in [*keep, *(sources[i] for i in stay), *targets]]
    inverse = [-1] * N
    for row, n in enumerate(named):
        if n >= 0:
            inverse[n] = row
    merged = [i for i in gone if found[i][1] >= 0]
    for i in merged:
        inverse[sources[i]] = len(keep) + len(stay) + found[i][1]
    none = [-1] * (r - len(merged))  # they rank last
    source, destination = [sources[i] for i in merged], [targets[found[i][1]] for i in merged]
    return source + none, destination + none, [found[i][2] for i in merged] + [0.0] * len(none), named, inverse


def check(run: Any, x: np.ndarray, r: int, atol: float = 0.0, **p: Any) -> dict[str, Any]:
    """x is (B, N, D) or (B, H, N, D)."""
    x = x if x.ndim == 4 else x[:, None]
    p = {"sizes": list(x.shape), "r": r, **p}
    bits = to_bits(x, p.get("dtype", "float32"))
    got = run({**p, "metric": bits})
    mean = from_bits(bits, p.get("dtype", "float32")).astype(np.float64).mean(1)
    pairs = cosines(mean, mean)
    images = [plan_of_image(p, b, pairs[b]) for b in range(x.shape[0])]
    for name, want in zip(NAMES, zip(*images, strict=True), strict=True):
        what = f"{name}: { {k: v for k, v in p.items() if not isinstance(v, np.ndarray)} }"
        np.testing.assert_allclose(got[name], np.array(want).reshape(got[name].shape), rtol=0, atol=atol, err_msg=what)
    return got


def shuffled(seed: int, B: int, N: int, keep: int, S: int, T: int) -> dict[str, np.ndarray]:
    ids = np.stack([np.random.default_rng(seed + b).permutation(N) for b in range(B)])
    return {"keep": ids[:, :keep], "sources": ids[:, keep : keep + S], "targets": ids[:, keep + S : keep + S + T]}


MODES: list[dict[str, Any]] = [
    {"fused": True},
    {"fused": False},
    {"fused": True, "order": SCORE, "splits": 1},
    {"fused": False, "order": SCORE, "splits": 3},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_match_every_schedule(scheduled: Any, mode: dict[str, Any]) -> None:
    """Several tiles of sources and of targets, two blocks of rankers, lists in any order, tokens in no list, ids that name none."""
    lists = shuffled(3, 2, 330, 3, 150, 140)
    lists["sources"][0, 5] = lists["targets"][1, 7] = lists["keep"][0, 1] = -1
    candidates = np.random.default_rng(3).random((2, 330)) < 0.7
    check(scheduled.match_cuda, exact(1, 2, 330, 4), 120, candidates=candidates, dtype="float16", **lists, **mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, 2, 3, 64, 129, 260])
def test_match_sizes(kernels: Any, N: int, dtype: str) -> None:
    for D, prefix in ((1, 0), (16, min(1, N)), (70, min(2, N))):
        x = exact(N + D, 1, N, D)
        most = min(len(range(prefix + prefix % 2, N, 2)), len(range(prefix + 1 - prefix % 2, N, 2)))
        for r in sorted({0, most} if N < 4 else {most // 3, most}):
            for run in (kernels.match_cuda, kernels.match_cpu):
                check(run, x, r, dtype=dtype, prefix=prefix, order=r % 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_match_heads(kernels: Any, dtype: str) -> None:
    """Two heads that are equal (an exact mean), and heads of integers."""
    x = np.repeat(exact(4, 2, 75, 16)[:, None], 2, axis=1)
    heads = np.random.default_rng(5).integers(-8, 9, (2, 4, 61, 12)).astype(np.float32)
    for run in (kernels.match_cuda, kernels.match_cpu):
        check(run, x, 20, dtype=dtype, prefix=1)
        got = run({"sizes": [2, 4, 61, 12], "metric": to_bits(heads, dtype), "r": 25, "dtype": dtype})
        mean = heads.mean(1, keepdims=True)
        want = run({"sizes": [2, 1, 61, 12], "metric": mean, "r": 25})
        for name in NAMES:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_match_given_lists(kernels: Any, fused: bool) -> None:
    x = exact(9, 2, 150, 16)
    for keep, S, T in ((0, 100, 50), (3, 20, 100), (5, 140, 5), (4, 0, 30), (4, 30, 0), (150, 0, 0), (0, 0, 0)):
        lists = shuffled(keep + S, 2, 150, keep, S, T)
        for given in (lists, {name: ids[0] for name, ids in lists.items()}):
            for r in sorted({S // 2, S}):
                check(kernels.match_cuda, x, r, fused=fused, order=r % 2, **given)
                check(kernels.match_cpu, x, r, order=r % 2, **given)


def test_match_positions_outside_are_no_tokens(kernels: Any) -> None:
    """The CPU refuses them; on CUDA nothing is read or written outside."""
    x = exact(2, 1, 40, 16)
    lists = {"sources": np.array([0, 40, 2, -7, 1 << 40]), "targets": np.array([1, 1 << 33, 3, 99]), "keep": np.array([5, 40, -3])}
    for fused in (True, False):
        for order in (POSITION, SCORE):
            for r in range(6):
                check(kernels.match_cuda, x, r, fused=fused, order=order, **lists)
    with pytest.raises(RuntimeError, match="sources must be in"):
        check(kernels.match_cpu, x, 1, **lists)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_match_ties_nan_zero_bias_and_candidates(kernels: Any, mode: dict[str, Any]) -> None:
    x = exact(7, 3, 141, 16)
    x[0, 4] = x[0, 9] = x[1, 20] = 0
    x[1, 7, 3] = x[1, 40, 0] = np.nan
    x[2] = x[2, :1]  # all equal
    bias = np.random.default_rng(1).integers(-4, 5, (3, 71)).astype(np.float32) / 4
    bias[0, 3], bias[1, 5], bias[1, 6] = np.inf, -np.inf, np.nan
    for r, share in ((30, 1.0), (71, 1.0), (0, 0.6), (31, 0.6), (70, 0.6), (45, 0.1), (20, 0.0)):
        mask = np.random.default_rng(r).random((3, 141)) < share if share < 1 else None
        check(kernels.match_cuda, x, r, bias=bias if r % 2 else None, candidates=mask, **mode)
        check(kernels.match_cpu, x, r, bias=bias if r % 2 else None, candidates=mask, order=mode.get("order", POSITION))


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_match_splits_are_the_same_answer(kernels: Any, splits: int) -> None:
    """Also more splits than column tiles (3): the empty ones have no match to offer."""
    for fused in (True, False):
        check(kernels.match_cuda, exact(5, 1, 300, 16), 77, splits=splits, fused=fused)


def test_match_many_sources(kernels: Any) -> None:
    """More keys than shared memory holds at once."""
    check(kernels.match_cuda, exact(8, 1, 1300, 4), 400, sources=np.arange(1, 1300), targets=np.array([0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_match_alignment_and_strides_change_no_bit(kernels: Any, dtype: str) -> None:
    size = 4 if dtype == "float32" else 2
    x = np.random.default_rng(1).standard_normal((1, 1, 90, 40)).astype(np.float32)
    call = {"sizes": [1, 1, 90, 40], "r": 30, "dtype": dtype}
    padded = np.full((1, 1, 90, 43), np.nan, dtype=np.float32)
    padded[..., :40] = x
    for run in (kernels.match_cuda, kernels.match_cpu):
        want = run({**call, "metric": to_bits(x, dtype)})
        for got in (
            run({**call, "metric": to_bits(x, dtype), "offset_bytes": size}),
            run({**call, "metric": to_bits(padded, dtype), "row": 43}),
        ):
            for name in NAMES:
                np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_match_empty(kernels: Any) -> None:
    for run in (kernels.match_cuda, kernels.match_cpu):
        assert run({"sizes": [0, 1, 6, 4], "metric": np.ones((0, 1, 6, 4), np.float32), "r": 2})["index"].shape == (0, 4)
        assert run({"sizes": [2, 1, 0, 4], "metric": np.ones((2, 1, 0, 4), np.float32), "r": 0})["inverse"].shape == (2, 0)
        check(run, np.ones((1, 6, 0), np.float32), 2)
        check(run, np.ones((1, 2, 6, 0), np.float32), 2)


def test_match_levels_are_the_same_bits(kernels: Any) -> None:
    x = np.random.default_rng(2).standard_normal((2, 1, 301, 72)).astype(np.float32)
    results = [kernels.match_cpu({"sizes": [2, 1, 301, 72], "metric": x, "r": 80, "level": level}) for level in kernels.cpu_levels()]
    for got in results[1:]:
        for name in ("source", "destination", "index", "inverse"):
            np.testing.assert_array_equal(got[name], results[0][name], err_msg=name)


def test_match_refuses_what_it_cannot_do(kernels: Any) -> None:
    x = exact(1, 1, 1100, 4)
    with pytest.raises(RuntimeError, match="one block ranks at most 512 sources"):
        check(kernels.match_cuda, x, 1, fused=True)
    with pytest.raises(RuntimeError, match="splits must be at least 1"):
        check(kernels.match_cuda, x, 1, splits=0)


@pytest.mark.parametrize(
    ("sizes", "num_sms", "splits", "fused"),
    [
        ((1, 1, 577, 64), 132, 5, True),  # ToMe ViT-L: 5 x 5 tiles, every one a block
        ((64, 1, 577, 64), 132, 2, True),
        ((32, 1, 196, 3584), 132, 2, True),  # AIM
        ((1, 1, 4096, 320), 132, 16, False),
        ((1, 1, 729, 1152), 4, 3, True),
        ((1, 1, 1024, 64), 132, 8, True),
        ((1, 1, 1025, 64), 132, 8, False),
        ((1, 1, 0, 64), 132, 1, True),
    ],
    ids=str,
)
def test_match_plan(kernels: Any, sizes: tuple[int, ...], num_sms: int, splits: int, fused: bool) -> None:
    plan = kernels.match_plan_cuda({"sizes": list(sizes), "num_sms": num_sms})
    assert (plan["splits"], plan["fused"]) == (splits, fused)
    assert (plan["threads"], plan["smem_bytes"], plan["num_semaphores"]) == (128, 36864, sizes[0])
    S, T = (sizes[2] + 1) // 2, sizes[2] // 2
    assert plan["flops"] == 2 * sizes[0] * S * T * sizes[3]
    assert plan["bytes_moved"] == sizes[0] * (sizes[2] * sizes[3] * 4 + 8 * 2 * sizes[2])
