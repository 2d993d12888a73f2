"""PiToMe: merge where the energy says that many are alike (arXiv 2405.16148, NeurIPS 2024). Written from the paper's maths alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import BlockMethod, require, require_numbers
from .tome import block_step, capped, merge_weighted
from .views import BlockStep, BlockView


@dataclass(frozen=True)
class PiToMe(BlockMethod):
    """PiToMe (arXiv 2405.16148): in every block keep a constant share; patches in large clusters merge, the isolated ones are protected.

    The energy of a patch is the mean over all patches of ELU(cosine of their keys - margin): high in a large cluster. In the second half of
    the blocks the 2 r patches of highest energy split by the parity of their rank, and each even one merges into its best odd one. In the
    first half all patches split so, and the r best pairs merge, as in ToMe. Training free.

    Args:
        keep: share of the patches that each block keeps; at least 0.5.
        margin: of the first block, falling to 0 behind the last: 0.75 for DeiT and MAE, 0.9 for CLIP, BLIP and AugReg.
        proportional: add log(size) to the logits of later blocks; the official code has a flag for it and calls attention without.

    Differs from the official code: `keep` below 0.5 merges half and warns (there, wrong silently); distillation and register tokens are
    protected as CLS is; ties go to the lowest position.

    Example:
        >>> PiToMe(keep=0.9).merges(196), PiToMe().margin_of(6, 12)
        (19, 0.375)
    """

    title = "PiToMe"
    paper = "arXiv 2405.16148"

    keep: float = 0.9
    margin: float = 0.75
    proportional: bool = False

    def __post_init__(self) -> None:
        require_numbers(self, keep=self.keep, margin=self.margin)
        require(0 < self.keep <= 1, self, "keep must be in (0, 1]", self.keep)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth)) if self.keep < 1 else ()

    def merges(self, patches: int) -> int:
        """Patches that leave of so many."""
        return math.floor(patches - patches * self.keep)

    def margin_of(self, block: int, depth: int) -> float:
        """Similarity from which two patches of a block count as alike."""
        return self.margin * (1 - block / depth)

    def step(self, view: BlockView) -> BlockStep | None:
        N = view.tokens.shape[1]
        r = capped(self, self.merges(N - view.prefix), N, view.prefix)
        if r == 0:
            return None
        metric = view.key.detach().float().mean(1)
        scores = energy(metric[:, view.prefix :], self.margin_of(view.block, view.depth))
        plan = match_by_energy(metric, scores, r, view.prefix, protect=view.block >= math.ceil(view.depth / 2))
        return block_step(merge_weighted(view.tokens, plan, view.size), plan)


def energy(metric: Tensor, margin: float) -> Tensor:
    """Energy of every patch: the mean of ELU(cosine - margin) over all, itself too.

    Stores one (B, T, T) matrix, 154 KB for an image of 196 patches: the ELU comes before the mean, so it is no sum that two passes over the
    tokens give, and none of the reductions of `ops.cosine_scores`. No gradient.

    Args:
        metric: (B, T, C), such as the keys' mean over heads.

    Returns:
        (B, T) float32.

    Example:
        >>> energy(torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]), 0.5)
        tensor([[ 0.2022,  0.2022, -0.0956]])
    """
    return torch.nn.functional.elu(ops.cosine_scores(metric, metric, reduction=None).sub_(margin), inplace=True).mean(-1)


def match_by_energy(metric: Tensor, scores: Tensor, r: int, prefix: int = 1, *, protect: bool = True) -> ops.MergePlan:
    """Which patches merge: r of them, by their energy.

    Args:
        metric: (B, prefix + T, C); scores: (B, T) float32 energies; r: 0 to T // 2.
        protect: True, the 2 r patches of highest energy take part and the others stay, by falling energy, before the receivers; False, all
            take part and those that stay follow by falling similarity.

    Example:
        >>> metric = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, 0.5]]])
        >>> plan = match_by_energy(metric, energy(metric[:, 1:], 0.5), 1)
        >>> plan.source, plan.destination, plan.index
        (tensor([[3]]), tensor([[1]]), tensor([[0, 2, 4, 1]]))
    """
    B, T = scores.shape
    require(0 <= 2 * r <= T, "match_by_energy", f"r must be in [0, {T // 2}]", r)
    order = ops.select_topk(scores, T, order="score") + prefix
    taking = 2 * r if protect else T
    first = torch.arange(prefix, device=order.device).expand(B, -1)
    keep = torch.cat([first, order[:, taking:]], 1)
    sources, targets = order[:, 0:taking:2].contiguous(), order[:, 1:taking:2].contiguous()
    return ops.bipartite_match(metric, r, sources=sources, targets=targets, keep=keep, order="score")
