"""ToFu (Token Fusion): prune early, merge with preserved norms later (arXiv 2312.01026, WACV 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import BlockMethod, require, require_ints, require_numbers
from .tome import capped, match
from .views import BlockStep, BlockView


@dataclass(frozen=True)
class ToFu(BlockMethod):
    """ToFu (arXiv 2312.01026): match tokens as ToMe does; early blocks drop the sources, later ones merge them and keep the norm.

    Early blocks are far from linear, where a mean of two tokens stands for neither. Later, the mean of a group is scaled by its largest
    norm over the receiver's own. No sizes, no proportional attention. Training free.

    Args:
        keep: share of the patches that each block keeps; at least 0.5.
        prune_blocks: blocks at the start that drop; None = the first half.

    Differs from the official code: none was at hand; the maths is that of the re-implementation beside PiToMe, whose scale is the
    receiver's norm (the paper's MLERP divides by the norm of the mean). A receiver of norm 0 keeps the plain mean (there, NaN). Ties go to
    the lowest position.

    Example:
        >>> ToFu(keep=0.8).merges(98), ToFu().prunes(5, 12), ToFu().prunes(6, 12)
        (19, True, False)
    """

    title = "ToFu"
    paper = "arXiv 2312.01026"
    proportional = False

    keep: float = 0.9
    prune_blocks: int | None = None

    def __post_init__(self) -> None:
        require_numbers(self, keep=self.keep)
        require_ints(self, **({} if self.prune_blocks is None else {"prune_blocks": self.prune_blocks}))
        require(0 < self.keep <= 1, self, "keep must be in (0, 1]", self.keep)
        require(self.prune_blocks is None or self.prune_blocks >= 0, self, "prune_blocks must be 0 or more", self.prune_blocks)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth)) if self.keep < 1 else ()

    def merges(self, patches: int) -> int:
        """Patches that leave of so many."""
        return math.floor(patches - patches * self.keep)

    def prunes(self, block: int, depth: int) -> bool:
        """Whether a block drops its sources instead of merging them."""
        return block < (depth // 2 if self.prune_blocks is None else self.prune_blocks)

    def step(self, view: BlockView) -> BlockStep | None:
        N = view.tokens.shape[1]
        r = capped(self, self.merges(N - view.prefix), N, view.prefix)
        if r == 0:
            return None
        plan = match(view.key, r, view.prefix)
        if self.prunes(view.block, view.depth):
            return BlockStep(ops.gather_tokens(view.tokens, plan.index), plan.index)
        return BlockStep(merge_keeping_norm(view.tokens, plan), plan.index, plan.inverse)


def merge_keeping_norm(tokens: Tensor, plan: ops.MergePlan) -> Tensor:
    """(B, M, C): the mean of every group times its largest norm over the receiver's own.

    Example:
        >>> import torch
        >>> tokens = torch.tensor([[[7.0, 0.0], [1.0, 0.0], [0.0, 4.0], [0.0, 2.0]]])
        >>> merge_keeping_norm(tokens, match(tokens, 1))
        tensor([[[7., 0.], [1., 0.], [0., 6.]]])
    """
    result: Tensor = ops.merge_tokens(tokens, plan, mode="mlerp").tensors
    return result
