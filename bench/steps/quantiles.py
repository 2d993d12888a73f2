"""Methods that cut at quantiles of their scores."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve import methods
from tokensieve.methods import lrs, paint
from torch import Tensor

from .. import cases, checks
from ..harness import Case, Inputs, Settings
from .encoder import N, inputs_of, map_scores, row_of, true_scores


def _lrs(settings: Settings) -> Case:
    """A level of 6 x 6 tiles of 12 x 12 tokens with newlines, the last text token's query."""
    method, rows, columns, H, D = methods.LRS(), 72, 73, 32, 128
    N = rows * columns

    def inputs(seed: int) -> Inputs:
        return cases.randn(seed, 1, H, 1, D, device=settings.device), cases.randn(seed + 1, 1, H, N, D, device=settings.device)

    def ours(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scores = lrs.text_scores(query, key)
        return scores, lrs.keep_ratio(scores, method, columns)[0]

    def eager(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(query @ key.transpose(2, 3) / D**0.5, -1).mean(1)[:, 0]
        ends = torch.arange(columns - 1, N, columns, device=key.device)
        index = torch.cat([scores[0].topk(int(N * method.ratio)).indices, ends]).unique()
        return scores, index[None]

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        scores, want = eager(*(x.double() for x in inputs))
        index = output[1][output[1] >= 0]
        if len(set(want[0].tolist()) ^ set(index.tolist())) > 2:  # two scores at the cut
            return "the kept tokens are not those of float64"
        return checks.near(output[0], scores, checks.score_tolerance(torch.float32, is_ours))

    return Case(
        op="LRS",
        case=f"{N} tokens of a level, {H}x{D}, keep {method.ratio:.0%} and row ends",
        dtype="f32",
        inputs=inputs,
        ours=ours,
        peers={"eager code": eager},
        check=check,
        bytes=4 * H * N * D,
        flops=2 * H * N * D,
        quick=True,
    )


def _paint(settings: Settings) -> Case:
    """The choice of both streams; what it changes in the decoder is one row of attention."""
    method = methods.PAINT()

    def ours(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        first, late = (paint.cls_scores(q[:, :, :1], key) for q, key in zip(queries, keys))
        return tuple(paint.streams(first, late, method))

    def choose(first: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.quantile(late[0], torch.tensor([0.25, 0.75], dtype=late.dtype, device=late.device)).tolist()  # numpy's, there
        count = int((late[0] > high + 1.5 * (high - low)).sum())
        summary = torch.zeros_like(late, dtype=torch.bool)
        local = torch.zeros_like(summary)
        summary[0, late[0].topk(count).indices] = True
        local[0, first[0].topk(method.local_count(N)).indices] = True
        return local & ~summary, summary

    def eager(queries: list[Tensor], keys: list[Tensor], features: Tensor) -> tuple[Tensor, Tensor]:
        return choose(*(map_scores(q, key) for q, key in zip(queries, keys)))

    def check(inputs: Inputs, output: Any, is_ours: bool) -> str | None:
        want = choose(*(true_scores(q, key) for q, key in zip(inputs[0], inputs[1])))
        differ = sum(int((a != b).sum()) for a, b in zip(output, want))
        return f"{differ} tokens differ" if differ > 2 else None  # at the borders of both sets

    fns = {"ours": ours, "eager code": eager}
    return row_of("PAINT", "two layers, both streams", 1, 2, 0, inputs_of(settings.device, 1, 2), fns, check)


STEPS = {"LRS": _lrs, "PAINT": _paint}
