"""ToMe: merge the tokens whose keys are most alike, in every block (arXiv 2210.09461, ICLR 2023). Written from the paper's maths alone."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from .. import ops
from .base import BlockMethod, Method, require, require_ints, require_numbers, warn_once
from .views import BlockStep, BlockView


@dataclass(frozen=True)
class ToMe(BlockMethod):
    """ToMe (arXiv 2210.09461): in every block, merge the r tokens whose keys are most alike into their matches, weighted by size.

    Every second token looks for the most similar of the others; the r best pairs merge. Later blocks add log(size) to the logits of a key,
    so that a token of several patches counts as several. Prefix tokens (CLS, distillation, registers) take no part. Training free.

    Args:
        r: tokens that leave in each block; a tuple has one number a block, 0 behind its end.
        inflect: -1 to 1, how r grows from the first block to the last with the same sum (an int r only); 0 = constant.
        proportional: add log(size) to the logits; the authors switch it off for an off-the-shelf MAE.

    Differs from the official code: a norm of 0 has similarity 0 (there NaN, which attracts every source); undoing a merge works with a
    distillation token; register tokens are protected too; r above half of the patches warns once; ties go to the lowest.

    Example:
        >>> ToMe(r=8).schedule(3), ToMe(r=8, inflect=1.0).schedule(3), ToMe(r=(4, 2)).blocks(12)
        ((8, 8, 8), (0, 8, 16), (0, 1))
    """

    title = "ToMe"
    paper = "arXiv 2210.09461"

    r: int | tuple[int, ...] = 13
    inflect: float = 0.0
    proportional: bool = True

    def __post_init__(self) -> None:
        check_schedule(self, self.r, self.inflect)

    def schedule(self, depth: int) -> tuple[int, ...]:
        """Tokens that leave in each of so many blocks."""
        return merge_schedule(self.r, self.inflect, depth)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(block for block, r in enumerate(self.schedule(depth)) if r > 0)

    def step(self, view: BlockView) -> BlockStep | None:
        r = capped(self, self.schedule(view.depth)[view.block], view.tokens.shape[1], view.prefix)
        if r == 0:
            return None
        plan = match(view.key, r, view.prefix)
        return block_step(merge_weighted(view.tokens, plan, view.size), plan)


def check_schedule(owner: Method, r: int | tuple[int, ...], inflect: float) -> None:
    """Raises the rule that r and inflect break, if any."""
    require_ints(owner, r=r)
    require_numbers(owner, inflect=inflect)
    require(min(r if isinstance(r, tuple) else (r,), default=0) >= 0, owner, "r must be 0 or more", r)
    require(-1 <= inflect <= 1, owner, "inflect must be in [-1, 1]", inflect)
    require(isinstance(r, int) or inflect == 0, owner, "inflect goes with an int r, not with one number a block", inflect)


def merge_schedule(r: int | tuple[int, ...], inflect: float, depth: int) -> tuple[int, ...]:
    """Tokens that leave in each of `depth` blocks: `merge_schedule(10, -0.5, 4)` is (15, 11, 8, 5)."""
    if isinstance(r, tuple):
        return (*r, *(0,) * depth)[:depth]
    low = int(r * (1 - inflect))
    high = 2 * r - low
    return tuple(int(low + (high - low) / max(depth - 1, 1) * block) for block in range(depth))


def capped(method: Method, r: int, tokens: int, prefix: int) -> int:
    """r, but at most half of the patches: a token merges once a block. Warns once for each method that asks for more.

    Under torch.compile(dynamic=True) a method's numbers and the count of tokens may be symbols. The result is a plain int, guarded, so that
    the expressions of the counts don't nest from block to block (4 blocks of a tiny ViT: 85 s of tracing before, 5 s now).
    """
    most = max(tokens - prefix, 0) // 2
    if r > most and not torch.compiler.is_compiling():
        warn_once(method, "asks to merge more than half of its patches at once; half of them merge")
    return index(min(r, most))


def match(metric: Tensor, r: int, prefix: int = 1, bias: Tensor | None = None) -> ops.MergePlan:
    """Bipartite soft matching: the r even positions most like their best odd position merge into it.

    Args:
        metric: (B, N, C), or (B, H, N, D) keys, whose mean over heads is compared; r: 0 to half of the patches.
        prefix: tokens at the start that stay as they are and first. With none, sources that stay follow by falling similarity.
        bias: (B, S) float32, added to the similarity of each even position in the ranking.

    Example:
        >>> metric = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 1.0]]])
        >>> plan = match(metric, 1)
        >>> plan.source, plan.destination, plan.index
        (tensor([[2]]), tensor([[3]]), tensor([[0, 4, 1, 3]]))
    """
    return ops.bipartite_match(metric, r, keep=prefix, bias=bias, order="position" if prefix else "score")


def match_kth(metric: Tensor, k: int) -> ops.MergePlan:
    """The last of every k tokens receives, all others merge into their best of these: N // k tokens; the N % k at the end are dropped.

    Example:
        >>> match_kth(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 2.0], [0.0, 1.0]]]), 2).inverse
        tensor([[ 0,  0,  1,  1, -1]])
    """
    N = metric.shape[-2]
    require(1 <= k <= N, "match_kth", f"k must be in [1, N={N}]", k)
    ids = torch.arange(N // k * k, device=metric.device).view(-1, k)
    return ops.bipartite_match(metric, ids.numel() - len(ids), sources=ids[:, :-1].flatten().contiguous(), targets=ids[:, -1].contiguous())


def match_random(metric: Tensor, r: int, generator: torch.Generator | None = None) -> ops.MergePlan:
    """r random tokens of every row, all of which merge into their best of the others, in a random order: (B, N - r) rows."""
    draws = torch.rand(metric.shape[0], metric.shape[-2], generator=generator, device=metric.device).argsort(1)
    return ops.bipartite_match(metric, r, sources=draws[:, :r].contiguous(), targets=draws[:, r:].contiguous())


def merge_weighted(tokens: Tensor, plan: ops.MergePlan, size: Tensor | None = None) -> ops.Merged:
    """Merged tokens, each the mean of its parts by their sizes, new sizes, and log(size) for the next block's keys.

    Args:
        tokens: (B, N, C); size: (B, N) float32, None = 1 each.

    Example:
        >>> plan = match(torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]]), 1)
        >>> merge_weighted(torch.tensor([[[7.0], [1.0], [4.0], [2.0]]]), plan, torch.tensor([[1.0, 1.0, 1.0, 3.0]])).tensors.flatten()
        tensor([7.0000, 1.0000, 2.5000])
    """
    return ops.merge_tokens(tokens, plan, size=size, mode="weighted")


def block_step(merged: ops.Merged, plan: ops.MergePlan) -> BlockStep:
    """What a block's step returns after one merge of its tokens."""
    return BlockStep(merged.tensors, plan.index, plan.inverse, merged.size, merged.log_size)
