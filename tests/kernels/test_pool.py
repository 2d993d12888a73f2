"""The pooling kernels under the host SIMT runtime, and the CPU's at every level, on exact-size buffers, against float64 numpy."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from kernels.score_reference import from_bits, to_bits

MEAN, MAX, BILINEAR, SOFTMAX, STACK = range(5)
TOLERANCE = {"float32": 3e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}
ONE = (1, 1, 1, 1)  # an axis of one token: tokens, outputs, span, step


def windows(size: int, step: int, n: int) -> tuple[int, int, int, int]:
    return n, (n - size) // step + 1, size, step


def adaptive(n: int, out: int, parts: int = 1) -> tuple[int, int, int, int]:
    return n, out, n // parts, out // parts


def resize(n: int, out: int) -> tuple[int, int, int, int]:
    return n, out, 1, 1


def taps(p: dict[str, Any], axis: tuple[int, int, int, int], o: int) -> dict[int, float]:
    """Tokens of an axis that output o covers, with their bilinear weights."""
    n, out, span, step = axis
    if p["kind"] == BILINEAR:
        at = max((o + 0.5) * n / out - 0.5, 0.0)
        low = min(int(at), n - 1)
        pairs = [(low, 1 - (at - low)), (min(low + 1, n - 1), at - low)]
        return {i: sum(w for j, w in pairs if j == i) for i, _ in pairs if sum(w for j, w in pairs if j == i) > 1e-9}
    if not p.get("adaptive"):
        return dict.fromkeys(range(o * step, o * step + span), 1.0)
    part, u = divmod(o, step)
    return dict.fromkeys(range(part * span + u * span // step, part * span + -(-(u + 1) * span // step)), 1.0)


def covers(p: dict[str, Any]) -> list[tuple[list[int], list[float]]]:
    """Of every output in raster order: its tokens in raster order, and the products of their weights."""
    axes, found = p["axes"], []
    for place in product(*(range(a[1]) for a in axes)):
        t, y, x = (taps(p, a, o) for a, o in zip(axes, place))
        found.append(
            (
                [(i * axes[1][0] + j) * axes[2][0] + k for i in t for j in y for k in x],
                [t[i] * y[j] * x[k] for i in t for j in y for k in x],
            )
        )
    return found


def softmax(scores: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        e = np.exp(scores - scores.max())
        return e / e.sum()


def weights_of(p: dict[str, Any], b: int, tokens: list[int], products: list[float]) -> np.ndarray:
    if p["kind"] == MEAN:
        return np.full(len(tokens), 1 / len(tokens))
    if p["kind"] == SOFTMAX:
        return softmax(p["scores"][b, tokens].astype(np.float64) / p["temperature"])
    return np.array(products)


def pooled(p: dict[str, Any], x: np.ndarray) -> np.ndarray:
    rows = covers(p)
    out = []
    for b in range(p["B"]):
        for tokens, products in rows:
            if p["kind"] == MAX:
                out.append(x[b, tokens].max(0))
            elif p["kind"] == STACK:
                out.append(x[b, tokens].reshape(-1))
            else:
                out.append(weights_of(p, b, tokens, products) @ x[b, tokens])
    return np.array(out).reshape(p["B"], len(rows), p["C"] * (len(rows[0][0]) if p["kind"] == STACK else 1))


def gradients(p: dict[str, Any], x: np.ndarray, out: np.ndarray, grad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    to, scores = np.zeros_like(x), np.zeros(x.shape[:2])
    for b in range(p["B"]):
        for r, (tokens, products) in enumerate(covers(p)):
            g = grad[b, r]
            if p["kind"] == MAX:
                same = (x[b, tokens] == out[b, r]) | (np.isnan(x[b, tokens]) & np.isnan(out[b, r]))
                to[b, np.array(tokens)[same.argmax(0)], np.arange(x.shape[2])] += g
            elif p["kind"] == STACK:
                to[b, tokens] += g.reshape(len(tokens), -1)
            else:
                w = weights_of(p, b, tokens, products)
                to[b, tokens] += w[:, None] * g
                if p["kind"] == SOFTMAX:
                    scores[b, tokens] += w / p["temperature"] * ((x[b, tokens] - out[b, r]) @ g)
    return to, scores


def stored(p: dict[str, Any], values: np.ndarray, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of [..., C] rows with `pad` elements between two of them, and what they hold, in float64."""
    bits = to_bits(values, p["dtype"])
    wide = np.zeros((*values.shape[:-1], values.shape[-1] + pad), bits.dtype)
    wide[..., : values.shape[-1]] = bits
    return np.ascontiguousarray(wide).reshape(-1).view(np.uint8), from_bits(bits, p["dtype"])


def loaded(p: dict[str, Any], data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return from_bits(data.view(np.uint16 if p["dtype"] == "bfloat16" else p["dtype"]), p["dtype"]).reshape(shape)


def close(p: dict[str, Any], got: np.ndarray, want: np.ndarray, what: str) -> None:
    tolerance = TOLERANCE[p["dtype"]]
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=f"{what} of { {k: v for k, v in p.items() if k != 'x'} }")


def check(kernels: Any, *, values: np.ndarray | None = None, gradient: bool = True, **given: Any) -> None:
    p: dict[str, Any] = {"B": 2, "C": 8, "dtype": "float32", "temperature": 1.0, "axes": (ONE, ONE, ONE)} | given
    rng = np.random.default_rng(p["C"])
    N = int(np.prod([a[0] for a in p["axes"]]))
    if p["kind"] == SOFTMAX and "scores" not in p:
        p["scores"] = rng.standard_normal((p["B"], N)).astype(np.float32) * 3
    pad = p.pop("pad", 0)
    data, x = stored(p, rng.integers(-3, 4, (p["B"], N, p["C"])).astype(np.float64) if values is None else values, pad)
    p |= {"x": data, "stride_n": p["C"] + pad}
    want = pooled(p, x)
    out = kernels.pool(p)
    close(p, loaded(p, out, want.shape), want, "pool")
    if not gradient:
        return
    grads, grad = stored(p, rng.standard_normal(want.shape))
    _, forward = stored(p, loaded(p, out, want.shape))
    to, scores = gradients(p, x, forward, grad)
    got, got_scores = kernels.pool_grad(p | {"out": out, "grad": grads, "scores_wanted": p["kind"] == SOFTMAX})
    close(p, loaded(p, got, x.shape), to, "gradient")
    if p["kind"] == SOFTMAX:
        close(p, got_scores, scores, "gradient of the scores")


# Grids that tile, overlap, leave a tail, and adaptive ones in parts; C for 16-byte vectors, for one element, for several turns of a warp.
CASES = [
    {"kind": MEAN, "axes": (ONE, windows(2, 2, 4), windows(2, 2, 6))},
    {"kind": MEAN, "axes": (ONE, windows(3, 2, 6), windows(2, 1, 4)), "C": 5, "dtype": "float16"},
    {"kind": MEAN, "axes": (adaptive(4, 3), adaptive(5, 2), adaptive(6, 4, parts=2)), "adaptive": True, "C": 16, "dtype": "bfloat16"},
    {"kind": MEAN, "axes": (adaptive(2, 5), adaptive(3, 4), ONE), "adaptive": True, "C": 3},
    {"kind": MEAN, "axes": (ONE, ONE, windows(35, 35, 70)), "C": 264},
    {"kind": MAX, "axes": (ONE, windows(2, 2, 5), windows(2, 2, 4)), "C": 9},
    {"kind": MAX, "axes": (windows(2, 1, 3), windows(3, 2, 5), windows(2, 1, 3)), "C": 8, "dtype": "float16"},
    {"kind": MAX, "axes": (ONE, adaptive(5, 3), adaptive(7, 2)), "adaptive": True, "C": 16, "dtype": "bfloat16", "pad": 8},
    {"kind": BILINEAR, "axes": (ONE, resize(5, 3), resize(4, 2))},
    {"kind": BILINEAR, "axes": (ONE, resize(3, 7), resize(5, 5)), "C": 7, "dtype": "float16", "pad": 3},
    {"kind": BILINEAR, "axes": (resize(3, 2), resize(2, 3), resize(9, 1)), "C": 8, "dtype": "bfloat16"},
    {"kind": SOFTMAX, "axes": (windows(2, 2, 4), windows(2, 2, 4), windows(3, 3, 6)), "temperature": 0.5},
    {"kind": SOFTMAX, "axes": (adaptive(3, 2), ONE, adaptive(40, 1)), "adaptive": True, "C": 6, "dtype": "float16"},
    {"kind": SOFTMAX, "axes": (ONE, windows(2, 1, 3), windows(2, 1, 3)), "C": 24, "dtype": "bfloat16", "pad": 8},
    {"kind": SOFTMAX, "axes": (ONE, ONE, windows(2, 3, 8))},  # tokens between the windows
    {"kind": STACK, "axes": (ONE, windows(2, 2, 5), windows(2, 2, 4))},
    {"kind": STACK, "axes": (windows(2, 3, 5), windows(1, 1, 2), windows(3, 3, 3)), "C": 5, "dtype": "bfloat16", "pad": 1},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kind']}-{c.get('dtype', 'float32')}-{c.get('C', 8)}")
def test_pool_matches_the_reference(scheduled: Any, case: dict[str, Any]) -> None:
    check(scheduled, **case)


@pytest.mark.parametrize("level", range(3))
def test_pool_cpu_matches_the_reference(kernels: Any, level: int) -> None:
    for case in CASES:
        check(kernels, level=level, **case)


def test_pool_softmax_of_more_windows_than_a_warp_has_lanes(kernels: Any) -> None:
    check(kernels, kind=SOFTMAX, axes=(ONE, ONE, windows(34, 1, 68)), B=1, C=4)


def test_pool_parts_of_rows(scheduled: Any) -> None:
    for splits, kind, axes in [
        (1, MEAN, (ONE, ONE, windows(2, 1, 3))),
        (2, BILINEAR, (ONE, ONE, resize(4, 3))),
        (3, MAX, (ONE, ONE, windows(2, 1, 3))),
        (7, STACK, (ONE, ONE, windows(2, 2, 4))),  # more parts than a row has: the last ones are empty
    ]:
        check(scheduled, kind=kind, axes=axes, C=4 * 131, B=1, splits=splits)


def test_pool_unaligned_views(kernels: Any) -> None:
    for kind in (MEAN, MAX, SOFTMAX, STACK):
        check(kernels, kind=kind, axes=(ONE, windows(2, 2, 4), windows(2, 2, 2)), offset_bytes=4)
        check(kernels, kind=kind, axes=(ONE, windows(2, 2, 4), windows(2, 2, 2)), dtype="float16", offset_bytes=2, pad=1)


@pytest.mark.parametrize("level", [None, 0, 2])
def test_pool_nothing_to_do(kernels: Any, level: int | None) -> None:
    where = {} if level is None else {"level": level}
    for kind in (MEAN, MAX, STACK):
        axes = (ONE, windows(2, 2, 4), windows(2, 2, 2))
        check(kernels, kind=kind, axes=axes, B=0, C=4, **where)
        check(kernels, kind=kind, axes=axes, C=0, **where)
    p = {"kind": SOFTMAX, "axes": (ONE, ONE, windows(2, 2, 4)), "B": 1, "C": 0, "dtype": "float32", "scores": np.zeros((1, 4), np.float32)}
    empty = np.zeros(0, np.uint8)
    _, scores = kernels.pool_grad(p | where | {"x": empty, "out": empty, "grad": empty, "scores_wanted": True})
    np.testing.assert_array_equal(scores, np.zeros((1, 4)))


@pytest.mark.parametrize("level", [None, 0, 1, 2])
def test_pool_max_ties_and_nan(kernels: Any, level: int | None) -> None:
    where = {} if level is None else {"level": level}
    x = np.random.default_rng(0).integers(0, 2, (1, 12, 20)).astype(np.float64)
    x[0, 3:6, :7] = np.nan
    x[0, 8, 5:9] = np.inf
    x[0, 9] = -np.inf
    for axes in ((ONE, windows(2, 2, 4), windows(3, 3, 3)), (ONE, windows(2, 1, 4), windows(2, 1, 3)), (ONE, ONE, windows(1, 1, 12))):
        check(kernels, kind=MAX, axes=axes, B=1, C=20, values=x, **where)


@pytest.mark.parametrize("level", [None, 0, 1, 2])
def test_pool_max_of_two_zeros_is_the_later(kernels: Any, level: int | None) -> None:
    x = np.where(np.random.default_rng(0).random((2, 3, 20)) < 0.5, -0.0, 0.0).astype(np.float32)
    p = {"B": 1, "C": 20, "dtype": "float32", "kind": MAX, "axes": (ONE, ONE, windows(3, 3, 6)), "x": x.reshape(-1).view(np.uint8)}
    got = kernels.pool(p if level is None else p | {"level": level}).view(np.float32).reshape(2, 20)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(x[:, -1]))


@pytest.mark.parametrize("level", [None, 0, 2])
def test_pool_softmax_not_finite(kernels: Any, level: int | None) -> None:
    """-inf is no weight; a NaN, +inf or -inf alone makes the window NaN, and no other."""
    where = {} if level is None else {"level": level}
    scores = np.zeros((1, 12), np.float32)
    scores[0, [1, 3, 6, 7, 8]] = -np.inf, np.nan, -np.inf, -np.inf, -np.inf
    scores[0, 10] = np.inf
    check(kernels, kind=SOFTMAX, axes=(ONE, ONE, windows(3, 3, 12)), B=1, scores=scores, gradient=False, **where)
    check(kernels, kind=SOFTMAX, axes=(ONE, ONE, windows(3, 3, 3)), B=1, scores=scores[:, :3], **where)


def test_pool_bilinear_gradient_skips_what_is_not_covered(kernels: Any) -> None:
    """An infinite gradient reaches the taps of its output alone."""
    p = {"kind": BILINEAR, "axes": (ONE, ONE, resize(4, 4)), "B": 1, "C": 4, "dtype": "float32"}
    grad = np.zeros((1, 4, 4), np.float32)
    grad[0, 1] = np.inf
    got, _ = kernels.pool_grad(p | {"grad": grad.reshape(-1).view(np.uint8)})
    np.testing.assert_array_equal(got.view(np.float32).reshape(4, 4), grad[0])


def test_pool_plan_of_a_video(kernels: Any) -> None:
    """LLaVA-OneVision: 32 frames of 27 x 27 tokens to 14 x 14: a warp takes whole rows where there are enough of them."""
    p = {"kind": BILINEAR, "axes": (ONE, resize(27, 14), resize(27, 14)), "B": 32, "C": 3584, "dtype": "bfloat16"}
    plan = kernels.pool_plan_cuda(p, False)
    assert (plan["vector"], plan["splits"], plan["blocks"]) == (8, 3, 32 * 196 * 3 // 8)
    assert (plan["bytes_moved"], plan["workspace_bytes"]) == (32 * (729 + 196) * 3584 * 2, 0)
    assert kernels.pool_plan_cuda(p | {"B": 1}, False)["splits"] == 7
    assert kernels.pool_plan_cuda(p | {"B": 1, "stride_n": 3585}, False)["vector"] == 1
    assert kernels.pool_plan_cuda(p, True)["splits"] == 1


def test_pool_refusals(kernels: Any) -> None:
    p = {"kind": BILINEAR, "axes": (ONE, ONE, resize(4, 2)), "B": 1, "C": 4, "dtype": "float32", "x": np.zeros(64, np.uint8)}
    with pytest.raises(RuntimeError, match="16 bytes or one element"):
        kernels.pool(p | {"vector": 2})
    with pytest.raises(RuntimeError, match="the plan is not one of CUDA"):
        kernels.pool(p | {"splits": 0})
    with pytest.raises(RuntimeError, match=r"tokens x outputs of an axis must be below 2\^29"):
        kernels.pool_grad(p | {"axes": (ONE, ONE, resize(1 << 16, 1 << 14)), "C": 0})
    with pytest.raises(RuntimeError, match="a warp whole rows"):
        kernels.pool_grad(p | {"kind": SOFTMAX, "scores": np.zeros(4, np.float32), "scores_wanted": True, "splits": 2})


# ---- runs -----------------------------------------------------------------------------------------------------------------


def run_sources(starts: np.ndarray, S: int, length: int, stride: int) -> list[list[int]]:
    """The tokens of every output row."""
    rows: list[list[int]] = []
    n = 0
    while n < S:
        if n in starts:
            rows += [list(range(n + i * stride, n + (i + 1) * stride)) for i in range(length // stride)]
            n += length
        else:
            rows.append([n])
            n += 1
    return rows


def check_runs(kernels: Any, starts: list[list[int]], **given: Any) -> None:
    p: dict[str, Any] = {"C": 8, "dtype": "float32", "B": len(starts), "images": len(starts[0]) if starts else 0} | given
    pad, rng = p.pop("pad", 0), np.random.default_rng(p["S"])
    data, x = stored(p, rng.standard_normal((p["B"], p["S"], p["C"])), pad)
    p |= {"starts": np.array(starts, np.int64).reshape(p["B"], p["images"]), "stride_n": p["C"] + pad}
    rows = [run_sources(s, p["S"], p["length"], p["stride"]) for s in p["starts"]]
    want = np.array([x[b, r].mean(0) for b in range(p["B"]) for r in rows[b]]).reshape(p["B"], -1, p["C"]) if p["B"] and p["C"] else None
    if want is not None:
        close(p, loaded(p, kernels.pool_runs(p | {"x": data}), want.shape), want, "pool_runs")
    grads, grad = stored(p, rng.standard_normal((p["B"], len(rows[0]) if rows else 0, p["C"])))
    to = np.zeros_like(x)
    for b in range(p["B"]):
        for r, tokens in enumerate(rows[b]):
            to[b, tokens] += grad[b, r] / len(tokens)
    close(p, loaded(p, kernels.pool_runs(p | {"x": grads, "grad": True}), x.shape), to, "gradient of pool_runs")


RUNS = [
    {"starts": [[0], [9]], "S": 15, "length": 6, "stride": 2},
    {"starts": [[2, 9], [0, 7]], "S": 16, "length": 7, "stride": 3, "dtype": "bfloat16", "C": 16},  # a dropped tail; neighbours
    {"starts": [[1, 5]], "S": 9, "length": 4, "stride": 4, "dtype": "float16", "C": 5, "pad": 2},
    {"starts": [[1, 6]], "S": 11, "length": 3, "stride": 1, "C": 3},
    {"starts": [[1, 4]], "S": 8, "length": 3, "stride": 5, "C": 4},  # runs of no mean: all of them dropped
    {"starts": [[0, 4]], "S": 8, "length": 4, "stride": 8, "C": 4},  # nothing is left
    {"starts": [[], []], "S": 5, "length": 3, "stride": 2},
    {"starts": [[3]], "S": 45, "length": 40, "stride": 40, "C": 4 * 70},  # a mean of more tokens than a warp has lanes
    {"starts": [[0]], "S": 4, "length": 4, "stride": 2, "C": 0},
    {"starts": [], "images": 1, "S": 4, "length": 4, "stride": 2},
]


@pytest.mark.parametrize("case", RUNS, ids=lambda c: f"S{c['S']}-{c['length']}by{c['stride']}")
def test_pool_runs_match_the_reference(scheduled: Any, case: dict[str, Any]) -> None:
    check_runs(scheduled, **case)


@pytest.mark.parametrize("level", range(3))
def test_pool_runs_cpu_match_the_reference(kernels: Any, level: int) -> None:
    for case in RUNS:
        check_runs(kernels, level=level, **case)


def test_pool_runs_wrong_starts(kernels: Any) -> None:
    """The CPU refuses them; a CUDA kernel cannot without a sync, and stays inside its buffers (the address sanitizer sees that)."""
    p = {"B": 1, "S": 6, "C": 4, "images": 2, "length": 3, "stride": 2, "dtype": "float32"}  # two rows
    x = {grad: np.zeros(rows * 16, np.uint8) for grad, rows in ((False, 6), (True, 2))}
    for starts in ([-5, 1], [4, 5], [3, 1], [2**62, -(2**62)], [7, 900]):
        for grad in (False, True):
            got = kernels.pool_runs(p | {"x": x[grad], "starts": np.array([starts], np.int64), "grad": grad})
            assert got.size == (6 if grad else 2) * 16
        for level in range(3):
            with pytest.raises(RuntimeError, match="starts must be ascending"):
                kernels.pool_runs(p | {"x": x[False], "starts": np.array([starts], np.int64), "level": level})


# ---- means over rows and columns ---------------------------------------------------------------------------------------------


def check_means(kernels: Any, **given: Any) -> None:
    p: dict[str, Any] = {"B": 1, "dtype": "float32"} | given
    pad, rng = p.pop("pad", 0), np.random.default_rng(p["N"])
    B, T, N, C = (p[name] for name in "BTNC")
    data, x = stored(p, rng.standard_normal((B, T, N, C)), pad)
    rows, columns = kernels.pool_means(p | {"x": data, "stride_n": C + pad})
    close(p, loaded(p, rows, (B, T, C)), x.mean(2), "rows")
    close(p, loaded(p, columns, (B, N, C)), x.mean(1), "columns")
    grads = [stored(p, rng.standard_normal(shape)) for shape in ((B, T, C), (B, N, C))]
    for wanted in ((True, True), (True, False), (False, True)):
        given = {n: g[0] for n, g, w in zip(("rows_grad", "columns_grad"), grads, wanted) if w}
        want = wanted[0] * grads[0][1][:, :, None] / N + wanted[1] * grads[1][1][:, None] / T
        close(p, loaded(p, kernels.pool_means_grad(p | given), x.shape), want, "gradient of the means")


MEANS = [
    {"T": 3, "N": 5, "C": 8, "B": 2},
    {"T": 9, "N": 40, "C": 20, "dtype": "bfloat16"},  # two slices of the tokens, two turns of the frames; one element at a time
    {"T": 8, "N": 33, "C": 72, "dtype": "float16", "B": 2},
    {"T": 1, "N": 1, "C": 36, "pad": 4},
    {"T": 2, "N": 130, "C": 8, "rows_per_block": 128, "splits": 2, "workspace_bytes": 2 * 2 * 8 * 4},
    {"T": 17, "N": 7, "C": 3, "dtype": "float16", "pad": 1, "rows_per_block": 128, "splits": 1},
]


@pytest.mark.parametrize("case", MEANS, ids=lambda c: f"T{c['T']}-N{c['N']}-C{c['C']}")
def test_pool_means_match_the_reference(scheduled: Any, case: dict[str, Any]) -> None:
    # The gradient's plan has no slices: it is forced to nothing.
    check_means(scheduled, **case)


@pytest.mark.parametrize("level", range(3))
def test_pool_means_cpu_match_the_reference(kernels: Any, level: int) -> None:
    for case in MEANS:
        check_means(kernels, level=level, **{k: v for k, v in case.items() if k not in ("splits", "rows_per_block", "workspace_bytes")})


def test_pool_means_plan(kernels: Any) -> None:
    p = {"B": 1, "T": 100, "N": 256, "C": 1024, "dtype": "bfloat16"}  # Video-ChatGPT
    plan = kernels.pool_means_plan_cuda(p)
    assert (plan["vector"], plan["rows_per_block"], plan["splits"], plan["blocks"]) == (8, 32, 8, 16 * 8)
    assert plan["workspace_bytes"] == 8 * 100 * 1024 * 4
    plan = kernels.pool_means_plan_cuda(p | {"B": 16})
    assert (plan["rows_per_block"], plan["splits"]) == (128, 2)
    with pytest.raises(RuntimeError, match="the plan is not one of CUDA"):
        kernels.pool_means(p | {"T": 1, "N": 64, "C": 8, "x": np.zeros(1024, np.uint8), "splits": 1})
