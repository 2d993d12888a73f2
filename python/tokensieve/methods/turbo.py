"""Turbo: merge what is redundant and means little, redundancy minus CLS attention (arXiv 2407.11717, ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import BlockMethod, require, require_ints, require_numbers
from .tome import block_step, capped, check_schedule, match, merge_schedule, merge_weighted
from .views import BlockStep, BlockView

ATTENTION_WEIGHT = 30.0  # the released code's constant: a row of attention sums to 1, cosines are near 1 each


@dataclass(frozen=True)
class Turbo(BlockMethod):
    """Turbo (arXiv 2407.11717): in every block, merge the r tokens that are most redundant after what CLS's attention takes off.

    ToMe's matching; a source ranks by cosine - alpha * beta ** |gamma - l| * 30 * (CLS's attention to it), l = merging blocks so far.
    Who it merges into is decided by similarity alone, and receivers are never scored. Merging is weighted by size as in ToMe.

    Args:
        r: tokens that leave in each block; a tuple has one number a block. inflect: see `ToMe`.
        alpha: weight of the attention; 0 = ToMe. beta, gamma: how the weight changes with the block.
        threshold: blocks with fewer tokens merge nothing (r_threshold: 40, and 100 in the retrieval script).

    Differs from the official code: as `ToMe`; drop path stays on both residuals; the factor 30, which the command line there hides, is the
    module's `ATTENTION_WEIGHT`.

    Example:
        >>> Turbo(beta=0.5, gamma=2).weight(0)
        7.5
    """

    title = "Turbo"
    paper = "arXiv 2407.11717"
    needs_cls = True

    r: int | tuple[int, ...] = 40
    inflect: float = 0.0
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.0
    threshold: int = 40

    def __post_init__(self) -> None:
        check_schedule(self, self.r, self.inflect)
        require_ints(self, threshold=self.threshold)
        require_numbers(self, alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        require(self.beta > 0, self, "beta must be positive", self.beta)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(block for block, r in enumerate(merge_schedule(self.r, self.inflect, depth)) if r > 0)

    def weight(self, turn: int) -> float:
        """Weight of the attention in the turn-th block that merges, from 0."""
        return self.beta ** abs(self.gamma - turn) * self.alpha * ATTENTION_WEIGHT

    def step(self, view: BlockView) -> BlockStep | None:
        N, turn = view.tokens.shape[1], self.blocks(view.depth).index(view.block)
        r = capped(self, merge_schedule(self.r, self.inflect, view.depth)[view.block], N, view.prefix)
        if r == 0 or self.threshold > N:
            return None
        plan = match_informed(view.key, view.cls_scores(), r, self.weight(turn), view.prefix)
        return block_step(merge_weighted(view.tokens, plan, view.size), plan)


def match_informed(metric: Tensor, scores: Tensor, r: int, weight: float, prefix: int = 1) -> ops.MergePlan:
    """ToMe's matching where sources rank by similarity - weight * score.

    Args:
        metric: (B, N, C), or (B, H, N, D) keys; scores: (B, N) float32, CLS's attention to every token; r: 0 to half of the patches.

    Example:
        >>> import torch
        >>> metric = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [2.0, 0.0], [0.0, 2.0], [1.0, 3.0]]])
        >>> match_informed(metric, torch.tensor([[0.2, 0.2, 0.5, 0.1, 0.0]]), 1, 30.0).source
        tensor([[4]])
    """
    first = prefix + prefix % 2  # the first even position behind the prefix
    return match(metric, r, prefix, bias=(scores.detach()[:, first::2] * -weight).contiguous())
