"""What a call costs before any work: every op on a handful of numbers, next to an aten op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tokensieve as ts
import torch
from reference import ops as reference
from torch import Tensor

from . import cases
from .harness import Case, Function, Inputs, Settings, Target

LIMIT_US = 6.0  # over torch.add


def build(settings: Settings) -> Iterator[Case]:
    device = settings.device

    def inputs(seed: int) -> Inputs:
        query = cases.randn(seed, 1, 2, 1, 8, device=device)
        key = cases.randn(seed + 1, 1, 2, 8, 8, device=device)
        x = cases.randn(seed + 2, 1, 8, 4, device=device)
        return query, key, x, torch.tensor([[1, 3]], device=device), torch.empty(1, 2, 4, device=device), x[..., 0].contiguous()

    ops: dict[str, Function] = {
        "attention_scores": lambda q, k, x, index, out, scores: ts.attention_scores(q, k),
        "select_topk": lambda q, k, x, index, out, scores: ts.select_topk(scores, 2),
        "gather_tokens": lambda q, k, x, index, out, scores: ts.gather_tokens(x, index),
        "gather_tokens_out": lambda q, k, x, index, out, scores: ts.gather_tokens_out((x,), index, (out,)),
        "prune_tokens": lambda q, k, x, index, out, scores: ts.prune_tokens(q, k, (x,), 2, key_range=(1, 7)),
    }

    def add(q: Tensor, k: Tensor, x: Tensor, index: Tensor, out: Tensor, scores: Tensor) -> Tensor:
        return torch.add(x, x)

    for name, op in ops.items():
        yield Case(
            op=name,
            case="8 tokens: the cost of a call",
            dtype="f32",
            inputs=inputs,
            ours=op,
            peers={"torch.add": add},
            check=_check(name),
            quick=True,
            call_only=True,
            targets=(Target(LIMIT_US, of="overhead_us"),),
        )


def _check(name: str) -> Any:
    """Tiny as they are, the outputs are compared too."""

    def check(inputs: Inputs, output: Any, ours: bool) -> str | None:
        query, key, x, index, out, scores = inputs
        if not ours:
            return None if torch.equal(output, 2 * x) else "x + x is not 2x"
        if name == "attention_scores":
            return None if torch.allclose(output.double(), reference.attention_scores(query, key)[0], rtol=1e-5) else "scores differ"
        if name == "select_topk":
            return None if torch.equal(output, reference.select_topk(scores, 2)) else "indices differ"
        if name == "prune_tokens":
            want = reference.prune_tokens(output.scores, (x,), 2, 8, (1, 7))
            return None if torch.equal(output.index, want[1]) and torch.equal(output.tensors[0], want[0][0]) else "output differs"
        got = out if name == "gather_tokens_out" else output
        return None if torch.equal(got, reference.gather_tokens((x,), index)[0]) else "rows differ"

    return check
