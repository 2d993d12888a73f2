"""One source, three instruction levels, one answer: scores bit for bit, selections and copies equal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import every_op
import pytest
import tokensieve as ts
import torch
from every_op import GROUPS, given
from reference import inputs
from reference.compare import assert_equal
from reference.inputs import FLOATS, queries_and_keys, seeded
from same_bits import bits, cpu_levels, processor
from tokensieve import _load
from torch import Tensor

LEVELS = _load.CPU_LEVELS
BEST = cpu_levels()[-1]  # of this machine


def results() -> dict[str, Tensor]:
    """Every CPU kernel on the shapes where vector widths matter: tails, odd head dims, all dtypes."""
    out: dict[str, Tensor] = {}
    for dtype in FLOATS:
        for L, N, D in ((1, 577, 64), (1, 130, 20), (5, 67, 72), (3, 33, 33), (17, 259, 128), (2, 1, 1), (9, 40, 256), (75, 80, 40)):
            query, key = queries_and_keys(seeded(N), 2, 6, 3, L, N, D, dtype)
            for rows, heads in (("mean", "mean"), ("max", "sum"), (None, "max"), ("sum", None)):
                scores, lse = ts.attention_scores(query, key, causal=L > 1, query_reduction=rows, head_reduction=heads, return_lse=True)
                out[f"scores {dtype} {L} {N} {D} {rows} {heads}"], out[f"lse {dtype} {L} {N} {D} {rows} {heads}"] = scores, lse
            for activation, rows in (("logit", "max"), ("sigmoid", "visible_mean")):
                scores = ts.attention_scores(query, key, causal=L > 1, activation=activation, query_reduction=rows, head_reduction=None)
                out[f"{activation} {dtype} {L} {N} {D} {rows}"] = scores
            bias = inputs.normal(seeded(D), 2, 1, 1, N, dtype=dtype)
            out[f"bias {dtype} {L} {N} {D}"] = ts.attention_scores(query * 8, key, bias=bias, key_range=(0, N // 2 + 1), normalize="range")
        for kind in inputs.SCORE_KINDS:
            for N in (1, 7, 16, 31, 64, 577, 2880):
                x = inputs.scores(seeded(N), kind, 3, N, dtype)
                out[f"position {dtype} {kind} {N}"] = ts.select_topk(x, N // 3 + 1)
                out[f"score {dtype} {kind} {N}"] = ts.select_topk(x, N // 2, order="score", candidates=x > 0, always_keep=x < -1)
        for N, C in ((7, 5), (90, 33), (300, 130)):
            plan = ts.bipartite_match(inputs.normal(seeded(N), 2, N, C, dtype=dtype), N // 3, keep=1)
            heads = ts.bipartite_match(inputs.normal(seeded(C), 2, 3, N, C, dtype=dtype), N // 4, order="score")
            out |= {f"match {dtype} {N} {C} {name}": value for name, value in plan._asdict().items()}
            out |= {f"match heads {dtype} {N} {C} {name}": value for name, value in heads._asdict().items()}
        for M, N, C in ((1, 40, 7), (13, 33, 16), (150, 301, 129), (64, 300, 64)):
            a, b = inputs.normal(seeded(M), 2, M, C, dtype=dtype), inputs.normal(seeded(N), 2, N, C, dtype=dtype)
            what = f"{dtype} {M} {N} {C}"
            out[f"match {what}"], out[f"matches {what}"] = ts.cosine_match(a, b)
            out[f"lowest {what}"], out[f"lowest indices {what}"] = ts.cosine_match(a, b, k=5, largest=False, candidates=b[..., 0] > -0.5)
            for how in (None, "mean", "sum", "max"):
                out[f"cosine {how} {what}"] = ts.cosine_scores(b, b, reduction=how, exclude_self=True)
            for metric in ("cosine", "euclidean"):
                out[f"diverse {metric} {what}"] = ts.select_diverse(b, N // 3, metric=metric, order="pick")
            out[f"diverse first {what}"] = ts.select_diverse(b, N // 20, first=torch.tensor([0, N // 2]), order="pick")
        x = inputs.normal(seeded(1), 2, 50, 3, 37, dtype=dtype)
        index = torch.tensor([[3, -1, 49, 7], [0, 1, 2, -1]])
        out[f"gather {dtype}"] = ts.gather_tokens(x, index)
        (out[f"scatter {dtype}"],) = torch.ops.tokensieve.gather_tokens_backward([out[f"gather {dtype}"]], index, 50)
    return out


def assert_levels_agree(run: Callable[[], dict[str, Tensor]]) -> None:
    threads = torch.get_num_threads()
    with processor(BEST, threads):
        want = run()
    for level in range(BEST):
        with processor(level, threads):
            for name, got in run().items():
                assert_equal(bits(got), bits(want[name]), f"{LEVELS[level]} against {LEVELS[BEST]}: {name}")


def test_cpu_levels_give_the_same_bits() -> None:
    assert_levels_agree(results)


def test_every_op_gives_the_same_bits_on_all_levels() -> None:
    x = given(1, "cpu")
    assert_levels_agree(lambda: {f"output {i} of {name}": out for name, run in GROUPS.items() for i, out in enumerate(run(x))})


def gradients() -> dict[str, Tensor]:
    """Backward kernels, at tails and odd widths. The upstream gradient differs from element to element."""
    out: dict[str, Tensor] = {}

    def add(name: str, value: Tensor, *leaves: Tensor) -> None:
        upstream = inputs.normal(seeded(value.numel()), *value.shape).to(value.dtype)
        for i, grad in enumerate(torch.autograd.grad(value, leaves, upstream)):
            out[f"{name} {value.dtype} {i}"] = grad

    for dtype in FLOATS:
        for L, N, D in ((1, 130, 20), (5, 67, 72), (3, 33, 33), (2, 577, 64)):
            query, key = (x.requires_grad_() for x in queries_and_keys(seeded(N), 2, 6, 3, L, N, D, dtype))
            for causal, heads in ((False, "mean"), (True, "sum")):
                scores = ts.attention_scores(query, key, causal=causal, query_reduction="mean", head_reduction=heads)
                add(f"scores {dtype} {L} {N} {D} {heads}", scores, query, key)
        x = inputs.normal(seeded(5), 2, 60, 37, dtype=dtype).requires_grad_()
        weights = torch.rand(2, 60, generator=seeded(6)).requires_grad_()
        plan = ts.bipartite_match(x.detach(), 20, keep=1)
        for mode in ("mean", "sum", "amax", "mlerp"):
            add(f"merge {mode}", ts.merge_tokens(x, plan, mode=mode).tensors, x)
        add("by label", ts.merge_by_label(x, torch.arange(60).expand(2, -1).contiguous() // 7, 9, weights=weights)[0], x, weights)
        add("fused", ts.fuse_dropped(x, weights, plan.index[:, :11].contiguous(), normalize=True), x, weights)
        for kind in ("mean", "max"):
            add(f"pool {kind}", ts.pool_grid(x, (6, 10), window=(2, 3), kind=kind), x)
        add("bilinear", ts.pool_grid(x, (6, 10), size=(4, 7), kind="bilinear"), x)
        add("windows", ts.pool_windows(x, weights, (2, 3, 10), (1, 2, 3)), x, weights)
    return out


def test_gradients_have_the_same_bits_on_all_levels() -> None:
    assert_levels_agree(gradients)


def test_every_op_is_called() -> None:
    """The list that levels, graphs and streams are tested with names every op."""
    calls = inspect.getsource(every_op)
    ops = [name for name in ts.ops.__all__ if name[0].islower() and name != "debug_checks"]
    assert [name for name in ops if f"ts.{name}(" not in calls] == []


def test_cpu_level_above_the_machine_is_refused() -> None:
    for level in (-1, BEST + 1, 17):
        with pytest.raises(RuntimeError, match=rf"level must be in \[0, {BEST}\] on this machine, got {level}"):
            torch.ops.tokensieve.set_cpu_level(level)


def test_cpu_level_environment_variable(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    generator = seeded(1)
    query, key = queries_and_keys(generator, 2, 4, 2, 3, 200, 72, torch.float16)
    torch.save((query, key), tmp_path / "given.pt")
    want = ts.prune_tokens(query, key, [key.transpose(1, 2)], 50)
    code = (
        "import torch, tokensieve as ts; from tokensieve import _load; torch.set_num_threads(1);"
        f"query, key = torch.load({str(tmp_path / 'given.pt')!r});"
        "got = ts.prune_tokens(query, key, [key.transpose(1, 2)], 50);"
        f"torch.save(tuple(got), {str(tmp_path / 'got.pt')!r}); print(_load.STATE.cpu_level)"
    )
    for level in LEVELS[: BEST + 1]:
        done = run_python(code, TOKENSIEVE_CPU=level)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == level
        (rows,), index, scores = torch.load(tmp_path / "got.pt")
        assert_equal(scores, want.scores, level)
        assert_equal(index, want.index, level)
        assert_equal(rows, want.tensors[0], level)


def test_cpu_level_environment_variable_unknown_name(run_python: Callable[..., Any]) -> None:
    done = run_python("import tokensieve", TOKENSIEVE_CPU="sse2")
    assert done.returncode != 0
    assert "TOKENSIEVE_CPU must be one of baseline, avx2, avx512, got 'sse2'" in done.stderr
