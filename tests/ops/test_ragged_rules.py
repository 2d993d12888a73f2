"""select_mass and select_threshold as ops: opcheck, torch.compile, instruction levels, threads, fuzz against exact integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tokensieve as ts
import torch
from reference import inputs, ragged
from reference.compare import assert_equal
from reference.inputs import FLOATS, integer, log_uniform, seeded
from same_bits import on_every_level
from torch import Tensor


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck_of_the_ragged_selections(dtype: torch.dtype, device: str) -> None:
    x = inputs.normal(seeded(3), 3, 20, dtype=dtype, device=device)
    rows, mask = torch.tensor([0.2, 0.5, 0.9], device=device), x > 0
    mass, threshold = torch.ops.tokensieve.select_mass.default, torch.ops.tokensieve.select_threshold.default
    for op, arguments in (
        (mass, (x, 0.5, None, False, 8, 0, None, None, None, 0, 0)),
        (mass, (x, 1.0, rows, True, 20, 1, 9, mask, ~mask, 1, 1)),
        (threshold, (x, 0.25, None, True, 8, 0, None, None, None, 0)),
        (threshold, (x, 0.0, rows, False, 20, 1, 9, mask, ~mask, 1)),
    ):
        results = torch.library.opcheck(op, arguments)
        assert set(results.values()) == {"SUCCESS"}, results


def test_ragged_selections_compile_with_dynamic_shapes(device: str) -> None:
    def step(scores: Tensor, tau: Tensor, capacity: int) -> tuple[Tensor, ...]:
        kept = ts.select_mass(scores * 2, 0.9, capacity=capacity, inclusive="below", extra=1)
        above = ts.select_threshold(scores, tau * 0.5, capacity=capacity, max_k=capacity, order="score")
        return (*kept, *above, kept.counts + above.counts)

    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for B, N, capacity in ((2, 30, 7), (3, 77, 40), (5, 200, 11)):
            scores, tau = torch.rand(B, N, generator=seeded(N)).to(device), torch.rand(B, generator=seeded(B)).to(device)
            for got, want in zip(function(scores, tau, capacity), step(scores, tau, capacity), strict=True):
                assert_equal(got, want)
    torch._dynamo.reset()


def test_ragged_selections_levels_and_threads_agree() -> None:
    cases = [inputs.scores(seeded(N), kind, 70, N) for N in (17, 700) for kind in ("normal", "special", "neighbours")]

    def run() -> Iterator[Tensor]:
        for x in cases:
            yield from ts.select_mass(x.abs(), 0.7, capacity=x.shape[1])
            yield from ts.select_threshold(x, 0.25, capacity=9, order="score")

    on_every_level(run)


def test_ragged_selections_fuzz(device: str) -> None:
    for seed in range(120):
        g = seeded(seed)
        B, N = log_uniform(g, 1, 5), log_uniform(g, 1, 600)
        kind = inputs.SCORE_KINDS[integer(g, 0, len(inputs.SCORE_KINDS) - 1)]
        x = inputs.scores(g, kind, B, N, FLOATS[integer(g, 0, 2)], device)
        common: dict[str, Any] = {"max_k": integer(g, 0, N)}
        common["min_k"] = integer(g, 0, common["max_k"])
        for name in ("candidates", "always_keep"):
            if integer(g, 0, 1):
                common[name] = (torch.rand(B, N, generator=g) < torch.rand((), generator=g) ** 2).to(device)
        capacity, order = integer(g, 0, N), ("position", "score")[integer(g, 0, 1)]
        share = (torch.rand(B, generator=g) + 1e-6).clamp(max=1).to(device)
        below, extra, strict = bool(integer(g, 0, 1)), integer(g, 0, 2), bool(integer(g, 0, 1))
        here = {"capacity": capacity, "order": order, **common}
        mass = ts.select_mass(x.abs(), share, inclusive="below" if below else "reach", extra=extra, **here)
        above = ts.select_threshold(x, share, strict=strict, **here)
        wanted = (
            (mass, ragged.select_mass(x.abs(), share.tolist(), below=below, extra=extra, **common)),
            (above, ragged.select_threshold(x, share.tolist(), strict=strict, **common)),
        )
        for got, want in wanted:
            what = f"seed {seed}: {kind} B={B} N={N} {here}"
            assert got.counts.tolist() == [len(tokens) for tokens in want], what
            assert got.overflow.tolist() == [len(tokens) > capacity for tokens in want], what
            for index, tokens in zip(got.index.tolist(), want, strict=True):
                kept = tokens[:capacity] if order == "score" else sorted(tokens[:capacity])
                assert index == kept + [-1] * (capacity - len(kept)), what
