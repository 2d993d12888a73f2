"""merge_cuda and its gradient under the host SIMT runtime, and the CPU kernels at every level, on exact-size buffers and exact numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernels.test_gather_cuda import Tokens

SUM, MEAN, WEIGHTED, AMAX, MLERP = range(5)
MODES = [SUM, MEAN, WEIGHTED, AMAX, MLERP]
KINDS = {"float32": np.float32, "float16": np.float16, "int32": np.int32, "int64": np.int64}


def numbers(rng: np.random.Generator, t: Tokens, B: int, N: int, kind: str) -> tuple[dict[str, Any], np.ndarray]:
    """The binding's dict of a tensor of small whole numbers (their sums are exact), and its [B, N, M, elements] view."""
    d, _ = t.make(rng, B, N)
    size = np.dtype(kind).itemsize
    data = rng.integers(-8, 9, d["data"].size // size).astype(kind)
    shape, strides = (B, N, t.M, t.W // size), (d["stride_b"], d["stride_n"], d["stride_m"], size)
    view = np.lib.stride_tricks.as_strided(data, shape, strides) if data.size else np.zeros(shape, kind)
    return d | {"data": data.view(np.uint8).reshape(d["data"].shape), "dtype": kind}, view


def random_rows(rng: np.random.Generator, B: int, N: int, R: int, drop: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """inverse [B, N] and own [B, R], where every row has its own token, and some tokens have no row."""
    inverse = np.where(rng.random((B, N)) < drop, -1, rng.integers(0, max(R, 1), (B, N))).astype(np.int64)
    own = np.stack([rng.permutation(N)[:R] for _ in range(B)]).astype(np.int64) if B else np.zeros((0, R), np.int64)
    for b in range(B):
        inverse[b, own[b]] = np.arange(R)
    return inverse, own


def tokens_of(p: dict[str, Any], b: int, r: int) -> list[int]:
    if p.get("complement"):
        return [n for n in range(p["N"]) if n not in p["inverse"][b]]
    entries = [n for n in range(p["N"]) if p["inverse"][b, n] == r and (p.get("from") is None or p["from"][b, n] >= 0)]
    own = -1 if p.get("own") is None else p["own"][b, r]
    return [own, *(n for n in entries if n != own)] if own >= 0 else entries


def merged(p: dict[str, Any], view: np.ndarray) -> np.ndarray:
    """[B, R, M, elements] in float64."""
    B, R, mode = p["B"], p["R"], p["mode"]
    out = np.zeros((B, R, *view.shape[2:]))
    for b in range(B):
        for r in range(R):
            tokens = tokens_of(p, b, r)
            if not tokens:
                continue
            rows = view[b, [n if p.get("from") is None else p["from"][b, n] for n in tokens]].astype(np.float64)
            w = np.ones(len(tokens)) if p.get("weights") is None else p["weights"][b, tokens].astype(np.float64)
            total = np.tensordot(w, rows, 1)
            if mode == AMAX:
                out[b, r] = rows.max(0)
            elif mode == SUM:
                out[b, r] = total
            elif mode == WEIGHTED and len(tokens) == 1:
                out[b, r] = rows[0]
            elif mode == MLERP:
                norms = np.sqrt((rows**2).sum((1, 2)))
                out[b, r] = rows.mean(0) * (norms.max() / norms[0] if norms[0] > 0 else 1)
            else:
                divisor = w.sum() + p.get("epsilon", 0.0)
                out[b, r] = total / divisor if divisor != 0 else 0
    return out


def totals(p: dict[str, Any]) -> np.ndarray:
    size = np.ones((p["B"], p["N"])) if p.get("size") is None else p["size"].astype(np.float64)
    return np.array([[size[b, tokens_of(p, b, r)].sum() for r in range(p["R"])] for b in range(p["B"])]).reshape(p["B"], p["R"])


def close(got: np.ndarray, want: np.ndarray, kind: str, what: str) -> None:
    if kind.startswith("int"):
        np.testing.assert_array_equal(got, want.astype(kind), err_msg=what)
    else:
        tolerance = 2e-6 if kind == "float32" else 2e-3
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=tolerance, err_msg=what)


def check(kernels: Any, tensors: list[tuple[Tokens, str]], **p: Any) -> None:
    rng = np.random.default_rng(p["N"] + p["R"])
    made = [numbers(rng, t, p["B"], p.get("rows", p["N"]), kind) for t, kind in tensors]
    outs, total, log_total = kernels.merge(p | {"tensors": [d for d, _ in made]})
    for (t, kind), got, (_, view) in zip(tensors, outs, made):
        want = merged(p, view)
        close(got.view(kind).reshape(want.shape), want, kind, f"{t} {kind} mode {p['mode']}")
    want = totals(p)
    np.testing.assert_allclose(total, want, rtol=1e-6)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(log_total, np.log(np.maximum(want, 0)), rtol=1e-5, atol=1e-6)


def grads(p: dict[str, Any], view: np.ndarray, grad: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every token, [B, N, M, elements], and of every weight [B, N], in float64."""
    to = np.zeros((p["B"], p["N"], *view.shape[2:]))
    weights = np.zeros((p["B"], p["N"]))
    for b in range(p["B"]):
        for r in range(p["R"]):
            tokens, g = tokens_of(p, b, r), grad[b, r].astype(np.float64)
            source = [n if p.get("from") is None else p["from"][b, n] for n in tokens]
            if not tokens:
                continue
            rows = view[b, source].astype(np.float64)
            w = np.ones(len(tokens)) if p.get("weights") is None else p["weights"][b, tokens].astype(np.float64)
            divisor = 1.0 if p["mode"] in (SUM, AMAX, MLERP) else w.sum() + p.get("epsilon", 0.0)
            if p["mode"] == AMAX:
                order = np.argsort(tokens)
                first = (rows[order] == rows.max(0)).argmax(0)
                for i, k in enumerate(order):
                    to[b, tokens[k]] = np.where(first == i, g, 0)
            elif p["mode"] == MLERP:
                norms = np.sqrt((rows**2).sum((1, 2)))
                best, scale = norms.argmax(), norms.max() / norms[0] if norms[0] > 0 else 1.0
                s = (g * rows.mean(0)).sum()
                for k, n in enumerate(tokens):
                    to[b, n] = g * scale / len(tokens)
                    if best != 0 and norms[0] > 0:
                        to[b, n] += rows[k] * (
                            s / norms[0] / norms[best] if k == best else -s * norms[best] / norms[0] ** 3 if k == 0 else 0
                        )
            else:
                single = p["mode"] == WEIGHTED and len(tokens) == 1
                dead = divisor == 0 and not single
                for k, n in enumerate(tokens):
                    to[b, n] = 0 if dead else g if single else g * w[k] / divisor
                    centred = rows[k] - (out[b, r].astype(np.float64) if p["mode"] != SUM else 0)
                    weights[b, n] = (0 if dead else (g * centred).sum() / divisor) + (
                        0 if p.get("total_grad") is None else p["total_grad"][b, r]
                    )
    return to, weights


def check_grad(kernels: Any, tensors: list[tuple[Tokens, str]], **p: Any) -> None:
    rng = np.random.default_rng(p["N"] + p["R"])
    made, wanted = [], []
    for t, kind in tensors:
        d, view = numbers(rng, t, p["B"], p.get("rows", p["N"]), kind)
        out = merged(p, view).astype(kind)
        grad = rng.integers(-8, 9, out.shape).astype(kind)
        made.append(
            d | {"grad": grad.view(np.uint8) if grad.size else np.zeros(0, np.uint8), "out": out.view(np.uint8) if out.size else None}
        )
        wanted.append(grads(p, view, grad, out))
    got, of_weights = kernels.merge_grad(p | {"tensors": made})
    for (t, kind), values, (want, _) in zip(tensors, got, wanted):
        close(values.view(kind).reshape(want.shape), want, kind, f"gradient of {t} {kind} mode {p['mode']}")
    if p.get("weights_wanted"):
        scale = np.abs(wanted[0][1]).max(initial=1.0)
        np.testing.assert_allclose(of_weights, wanted[0][1], rtol=1e-4, atol=2e-6 * scale if tensors[0][1] == "float32" else 1e-3 * scale)


def runs(kernels: Any) -> list[dict[str, int]]:
    """The emulated GPU, then every CPU level."""
    return [{}] + [{"level": level} for level in kernels.cpu_levels()]


FLOATS = [
    (Tokens(64), "float32"),
    (Tokens(32, M=3, heads_first=True), "float16"),
    (Tokens(36), "float32"),
    (Tokens(4), "float32"),
    (Tokens(48, pad=4), "float32"),
]
INTEGERS = [(Tokens(24), "int64"), (Tokens(16, M=2, heads_first=True), "int32"), (Tokens(8), "int64"), (Tokens(12), "int32")]


def problem(B: int, N: int, R: int, mode: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    inverse, own = random_rows(rng, B, N, R)
    size = rng.integers(1, 4, (B, N)).astype(np.float32)
    return {
        "B": B,
        "N": N,
        "R": R,
        "mode": mode,
        "inverse": inverse,
        "own": own,
        "size": size,
        "weights": size if mode == WEIGHTED else None,
    }


@pytest.mark.parametrize("mode", MODES)
def test_merge_every_schedule(scheduled: Any, mode: int) -> None:
    p = problem(2, 20, 7, mode)
    check(scheduled, FLOATS[:3], **p, blocks_per_row=2, column_blocks=0)
    check_grad(scheduled, FLOATS[:3], **p, blocks_per_row=2)
    if mode != MLERP:
        check(scheduled, FLOATS[:2], **problem(1, 70, 2, mode), column_blocks=2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [1, 3, 9])
def test_merge_slices(kernels: Any, mode: int, blocks: int) -> None:
    check(
        kernels, FLOATS[:4] + (INTEGERS if mode in (SUM, AMAX) else []), **problem(2, 33, 9, mode), blocks_per_row=blocks, column_blocks=0
    )
    check_grad(kernels, FLOATS, **problem(2, 33, 9, mode), blocks_per_row=blocks)


@pytest.mark.parametrize("mode", MODES)
def test_merge_cpu_levels(kernels: Any, mode: int) -> None:
    for run in runs(kernels)[1:]:
        check(kernels, FLOATS[:4] + (INTEGERS if mode in (SUM, AMAX) else []), **problem(2, 33, 9, mode), **run)
        check_grad(kernels, FLOATS, **problem(2, 33, 9, mode), **run)


@pytest.mark.parametrize("W", [4, 8, 12, 16, 48, 80, 512, 1040, 4100])
def test_merge_widths(kernels: Any, W: int) -> None:
    p = problem(2, 12, 5, MEAN)
    tokens = [Tokens(W), Tokens(W, M=2, heads_first=True), Tokens(W, M=3), Tokens(W, pad=4), Tokens(W, offset=4)]
    for run in runs(kernels):
        check(kernels, [(t, "float32") for t in tokens], **p, **run)
        check_grad(kernels, [(t, "float16") for t in tokens], **p, **run)


@pytest.mark.parametrize("mode", [SUM, MEAN, WEIGHTED, AMAX])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_merge_long_rows(kernels: Any, mode: int, columns: int) -> None:
    """Rows of more than 32 tokens, with an own token in the middle, one with a single token and one without any."""
    p = problem(2, 120, 4, mode)
    p["inverse"] = np.where(p["inverse"] == 3, -1, np.where(p["inverse"] == 2, 0, p["inverse"]))
    for b in range(2):
        p["inverse"][b, p["own"][b, 2]] = 2
        p["inverse"][b, p["own"][b, 3]] = 0
        p["own"][b, 3] = -1
    check(kernels, FLOATS[:4] + (INTEGERS if mode in (SUM, AMAX) else []), **p, column_blocks=columns)
    check(kernels, FLOATS, **p, column_blocks=0)
    check_grad(kernels, FLOATS, **p)


@pytest.mark.parametrize("mode", [SUM, MEAN])
def test_merge_complement_and_gradients_to_weights(kernels: Any, mode: int) -> None:
    rng = np.random.default_rng(1)
    kept = np.array([[3, 60, -1, 0, 31, 32], [5, 69, 64, 63, 1, 2]], dtype=np.int64)
    weights = rng.integers(1, 5, (2, 70)).astype(np.float32)
    p: dict[str, Any] = {
        "B": 2,
        "N": 70,
        "R": 1,
        "K": 6,
        "mode": mode,
        "inverse": kept,
        "complement": True,
        "weights": weights,
        "size": weights,
    }
    for run in [*runs(kernels), {"column_blocks": 0}]:
        for tokens in FLOATS[:3]:
            check(kernels, [tokens], **p, **run)
            grad = {k: v for k, v in run.items() if k != "column_blocks"}
            check_grad(kernels, [tokens], **p, **grad, weights_wanted=True, total_grad=rng.integers(-3, 4, (2, 1)).astype(np.float32))
            check_grad(kernels, [tokens], **p, **grad, weights_wanted=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("N", [32, 33, 64])
def test_merge_one_row_that_the_first_token_owns(kernels: Any, mode: int, N: int) -> None:
    p = {"B": 2, "N": N, "R": 1, "mode": mode, "inverse": np.zeros((2, N), np.int64), "own": np.zeros((2, 1), np.int64)}
    for run in runs(kernels):
        check(kernels, FLOATS[:1], **p, **run, column_blocks=0)
        check_grad(kernels, FLOATS[:1], **p, **run)


def test_merge_groups_of_lanes_without_a_token(kernels: Any) -> None:
    """Of the 32 groups that share a long row the last ones may have none of its tokens: the largest stays negative."""
    for N in (1, 5, 34, 64, 65):
        data = -np.random.default_rng(N).integers(1, 9, (1, N, 4)).astype(np.float32)
        tensor = {"data": data.view(np.uint8), "stride_b": 16 * N, "stride_n": 16, "stride_m": 0, "segment_bytes": 16}
        p = {"B": 1, "N": N, "R": 1, "mode": AMAX, "inverse": np.zeros((1, N), np.int64), "tensors": [tensor], "column_blocks": 1}
        np.testing.assert_array_equal(kernels.merge(p)[0][0].view(np.float32), data[0].max(0))


@pytest.mark.parametrize("mode", MODES)
def test_merge_gradients_of_eight_tensors(kernels: Any, mode: int) -> None:
    check_grad(kernels, (FLOATS + FLOATS)[:8], **problem(2, 9, 4, mode))


def test_merge_gradients_to_weights_of_tokens_of_no_width(kernels: Any) -> None:
    p = problem(2, 9, 4, SUM) | {"weights": np.ones((2, 9), np.float32)}
    total = np.arange(1, 9, dtype=np.float32).reshape(2, 4)
    for run in runs(kernels):
        check_grad(kernels, [(Tokens(0), "float32")], **p, **run, weights_wanted=True, total_grad=total)


def test_merge_single_tokens_are_copies_whatever_their_weight(kernels: Any) -> None:
    p = problem(2, 12, 8, WEIGHTED)
    p["size"] = p["weights"] = np.zeros((2, 12), np.float32)
    for run in runs(kernels):
        check(kernels, FLOATS[:2], **p, **run)
        with np.errstate(invalid="ignore"):  # the weights have no gradient there; it is not asked for
            check_grad(kernels, FLOATS[:2], **p, **run)


def test_merge_tiny_divisors(kernels: Any) -> None:
    """Weights below 2^-128, whose reciprocal is infinite: attention that underflows. A row without tokens is 0 with any epsilon."""
    labels, tiny = np.repeat([[0, 0, 1, 2, 2, 2]], 2, 0), np.float32(2.0**-140)
    weights = np.repeat(np.array([[1, 3, 5, 0, 0, 0]], np.float32) * tiny, 2, 0)
    p = {"B": 2, "N": 6, "R": 4, "mode": MEAN, "inverse": labels, "weights": weights}
    made, view = numbers(np.random.default_rng(0), Tokens(32), 2, 6, "float32")
    rows = view[:, :, 0].astype(np.float64)
    want = np.stack([(rows[:, 0] + 3 * rows[:, 1]) / 4, rows[:, 2], 0 * rows[:, 0], 0 * rows[:, 0]], 1)
    for run in [*runs(kernels), {"column_blocks": 1}]:
        got = kernels.merge(p | run | {"tensors": [made]})[0][0].view(np.float32).reshape(want.shape)
        np.testing.assert_array_equal(got, want)
        got = kernels.merge(p | run | {"tensors": [made], "epsilon": tiny})[0][0].view(np.float32).reshape(want.shape)
        np.testing.assert_allclose(got[:, :2], want[:, :2] * [[[4 / 5], [5 / 6]]], rtol=1e-6)
        np.testing.assert_array_equal(got[:, 2:], 0)


def test_merge_labels_weights_and_epsilon(kernels: Any) -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(-1, 6, (2, 30))
    weights = rng.integers(-2, 4, (2, 30)).astype(np.float32)  # some rows' weights may add up to 0
    weights[0, labels[0] == 2] = 0
    p: dict[str, Any] = {"B": 2, "N": 30, "R": 7, "inverse": labels, "weights": weights, "size": weights}
    for run in runs(kernels):
        for mode in (SUM, MEAN):
            check(kernels, FLOATS[:1], **p, mode=mode, epsilon=0.5 * mode, **run)
            check_grad(kernels, FLOATS[:1], **p, mode=mode, epsilon=0.5 * mode, weights_wanted=True, **run)
        check(kernels, FLOATS[:1], **p, mode=MEAN, **run)


def test_merge_pairs(kernels: Any) -> None:
    """Entries (source, row) with a weight each, some without a source, some without a row; a source may come often."""
    rng = np.random.default_rng(3)
    p: dict[str, Any] = {"B": 2, "N": 25, "R": 4, "rows": 6, "inverse": rng.integers(-1, 4, (2, 25)), "from": rng.integers(-1, 6, (2, 25))}
    p |= {"mode": SUM, "weights": rng.integers(1, 4, (2, 25)).astype(np.float32)}
    for run in runs(kernels):
        for tokens in FLOATS:
            check(kernels, [tokens], **p, **run)
            made, view = numbers(np.random.default_rng(1), tokens[0], 2, 6, tokens[1])
            grad = rng.integers(-8, 9, (2, 4, *view.shape[2:])).astype(tokens[1])
            _, got = kernels.merge_grad(
                p | run | {"tensors": [made | {"grad": grad.view(np.uint8)}], "values_wanted": False, "weights_wanted": True}
            )
            used = (p["inverse"] >= 0) & (p["from"] >= 0)
            want = np.array(
                [[(grad[b, p["inverse"][b, e]].astype(np.float64) * view[b, p["from"][b, e]]).sum() for e in range(25)] for b in range(2)]
            )
            np.testing.assert_array_equal(got, np.where(used, want, 0))


def test_merge_lists_in_the_workspace(kernels: Any) -> None:
    """More tokens than a block lists in shared memory."""
    N = 32 * 1024 + 5
    for mode, columns in ((MEAN, 0), (AMAX, 0), (SUM, 2)):
        p = problem(1, N, 3, mode) if columns else problem(1, N, 5, mode)
        p["inverse"] = np.where(np.arange(N) % 4096 == 7, p["inverse"], -1)
        p["inverse"][0, p["own"][0]] = np.arange(p["R"])
        check(kernels, [(Tokens(8), "float32")], **p, blocks_per_row=2, column_blocks=columns, workspace_bytes=6 * N * 4)


def test_merge_empty(kernels: Any) -> None:
    for run in runs(kernels):
        for mode in MODES:
            check(kernels, FLOATS, **problem(0, 5, 3, mode), **run)
            check(kernels, [(Tokens(0), "float32"), (Tokens(4), "float32")], **problem(2, 5, 3, mode), **run)
            check(kernels, FLOATS, **(problem(2, 5, 0, mode) | {"inverse": np.full((2, 5), -1)}), **run)
            check_grad(kernels, FLOATS, **(problem(2, 5, 0, mode) | {"inverse": np.full((2, 5), -1)}), **run)
            none = {"inverse": np.zeros((2, 0), np.int64), "own": None, "size": None, "weights": None}
            check(kernels, FLOATS, **(problem(2, 3, 0, mode) | none | {"N": 0, "R": 3}), **run)


def test_merge_nan_wins_amax(kernels: Any) -> None:
    data = np.array([[[1.0, np.nan, -0.0, np.nan], [np.nan, 2.0, 0.0, np.nan], [3.0, 1.0, -1.0, np.nan]]], dtype=np.float32)
    tensor = {"data": data.view(np.uint8), "stride_b": 48, "stride_n": 16, "stride_m": 0, "segment_bytes": 16}
    p = {"B": 1, "N": 3, "R": 1, "mode": AMAX, "inverse": np.zeros((1, 3), np.int64), "tensors": [tensor]}
    for run in [*runs(kernels), {"column_blocks": 1}]:
        got = kernels.merge(p | run)[0][0].view(np.float32)
        np.testing.assert_array_equal(got, np.array([np.nan, np.nan, 0.0, np.nan], np.float32))


@pytest.mark.parametrize("N", [3, 40])
def test_merge_amax_of_two_zeros_is_the_later(kernels: Any, N: int) -> None:
    data = np.where(np.random.default_rng(N).random((1, N, 20)) < 0.5, -0.0, 0.0).astype(np.float32)
    tensor = {"data": data.view(np.uint8), "stride_b": 80 * N, "stride_n": 80, "stride_m": 0, "segment_bytes": 80}
    p = {"B": 1, "N": N, "R": 1, "mode": AMAX, "inverse": np.zeros((1, N), np.int64), "tensors": [tensor]}
    for run in [*runs(kernels), {"column_blocks": 0}, {"column_blocks": 1}]:
        np.testing.assert_array_equal(np.signbit(kernels.merge(p | run)[0][0].view(np.float32)), np.signbit(data[0, -1]))


def test_merge_out_of_range_rows_are_skipped_on_the_gpu_and_errors_on_the_cpu(kernels: Any) -> None:
    p = problem(1, 6, 3, SUM)
    good = p | {"inverse": np.array([[0, 1, -1, -1, 2, 2]]), "own": np.array([[0, 1, 4]])}
    bad = [p | {"inverse": np.array([[0, 1, 3, -(2**62), 2, 2]]), "own": np.array([[0, 1, 4]])}]
    bad.append(good | {"own": np.array([[-7, 10**12, 4]])})
    bad.append(good | {"own": np.array([[1, 2, 4]])})  # tokens of other rows
    bad.append(good | {"own": np.array([[0, 1, 6]])})  # one behind the last
    made, view = numbers(np.random.default_rng(1), Tokens(16), 1, 6, "float32")
    for q in bad:
        got, total, _ = kernels.merge(q | {"tensors": [made]})
        np.testing.assert_array_equal(got[0].view(np.float32).reshape(1, 3, 1, 4), merged(good, view))
        np.testing.assert_array_equal(total, totals(good))
        for level in kernels.cpu_levels():
            with pytest.raises(RuntimeError, match=r"must be in range|must belong together"):
                kernels.merge(q | {"tensors": [made], "level": level})
    for mode in MODES:  # tokens whose row is R, one behind the last: in the other batch row, and behind the last one
        q = problem(2, 6, 3, mode) | {"inverse": np.array([[0, 1, 3, -(2**62), 2, 2], [3, 0, 1, 2, 3, 1]]), "own": None}
        check_grad(kernels, FLOATS[:2], **q)
    kept = {"B": 1, "N": 6, "R": 1, "K": 3, "mode": SUM, "inverse": np.array([[6, -9, 2]]), "complement": True, "tensors": [made]}
    np.testing.assert_array_equal(kernels.merge(kept)[0][0].view(np.float32), view[0, [0, 1, 3, 4, 5], 0].sum(0))


def test_merge_out_of_range_sources_and_kept_tokens_are_skipped_on_the_gpu(kernels: Any) -> None:
    """The same bits as with -1 in their place; the address sanitizer sees a read behind the last."""
    made, _ = numbers(np.random.default_rng(1), Tokens(16), 1, 64, "float32")
    grad = made | {"grad": np.ones((1, 3, 4), np.float32).view(np.uint8)}
    p: dict[str, Any] = {"B": 1, "N": 6, "R": 3, "rows": 64, "mode": SUM, "inverse": np.array([[0, 1, 2, 0, 1, 2]])}
    pairs = [p | {"from": np.array([[5, other, 0, other, 1, 63]])} for other in (-1, 64, 2**40)]
    p = {"B": 1, "N": 64, "R": 1, "K": 3, "mode": SUM, "complement": True}
    kept = [p | {"inverse": np.array([[other, 3, other]])} for other in (-1, 64, 2**40)]
    for good, *bad in (pairs, kept):
        want, total, _ = kernels.merge(good | {"tensors": [made]})
        _, of_weights = kernels.merge_grad(good | {"tensors": [grad], "values_wanted": False, "weights_wanted": True})
        for q in bad:
            got, got_total, _ = kernels.merge(q | {"tensors": [made]})
            _, got_of_weights = kernels.merge_grad(q | {"tensors": [grad], "values_wanted": False, "weights_wanted": True})
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_array_equal(got_total, total)
            np.testing.assert_array_equal(got_of_weights, of_weights)


@pytest.mark.parametrize("long", [False, True])
def test_merge_gpu_and_cpu_agree_to_the_bit_on_short_rows(kernels: Any, long: bool) -> None:
    rng = np.random.default_rng(5)
    B = 8 if long else 2  # two orders of 32 numbers often round to the same sum
    p = problem(B, 40, 11, WEIGHTED)
    if long:  # 32 tokens: the longest list that is summed one token after the other
        p["inverse"], p["own"] = np.repeat(np.where(np.arange(40) < 32, 0, 1)[None], B, 0), np.full((B, 11), -1)
    p["size"] = p["weights"] = rng.random((B, 40)).astype(np.float32)
    made, _ = Tokens(128).make(rng, B, 40)
    made["data"] = rng.standard_normal(made["data"].size // 4).astype(np.float32).view(np.uint8).reshape(made["data"].shape)
    results = [kernels.merge(p | run | {"tensors": [made]}) for run in runs(kernels)]
    for other in results[1:]:
        np.testing.assert_array_equal(other[0][0], results[0][0][0])
        np.testing.assert_array_equal(other[1], results[0][1])


def test_merge_plan(kernels: Any) -> None:
    assert kernels.merge_plan_cuda(64, 196, 98, 7168, MEAN, False) == (8, 0, 0, 64 * (294 * 7168 + 8 * 196))  # four blocks an SM
    assert kernels.merge_plan_cuda(1, 577, 561, 2048, WEIGHTED, False)[:2] == (36, 0)
    assert kernels.merge_plan_cuda(1, 2944, 1, 8192, SUM, False)[1] == 64  # one row of 2944 tokens: its columns on 64 blocks
    assert kernels.merge_plan_cuda(1, 2944, 1, 8192, MLERP, False)[1] == 0
    assert kernels.merge_plan_cuda(1, 50_000, 25_000, 2048, MEAN, False)[:3] == (528, 0, 528 * 200_000)
    assert kernels.merge_plan_cuda(8, 577, 561, 2048, MEAN, True)[:3] == (66, 0, 8 * 561 * 8)


def test_merge_alignment(kernels: Any) -> None:
    for offset in (0, 2, 4, 8):
        for pad in (0, 2, 8):
            p = problem(2, 9, 4, MEAN)
            tokens = [replace(t, offset=offset, pad=pad) for t in (Tokens(32), Tokens(48, M=2, heads_first=True))]
            check(kernels, [(t, "float16") for t in tokens], **p)
            check_grad(kernels, [(t, "float16") for t in tokens], **p)
