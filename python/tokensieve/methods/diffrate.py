"""DiffRate: prune, then merge, by CLS attention, with learned numbers for every block (arXiv 2305.17997, ICCV 2023): inference."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .base import BlockMethod, require, require_ints
from .views import BlockStep, BlockView

SMALLEST = 1e-6  # of a size: a negative cosine may take more than there is, and log(0) hides the token for ever


@dataclass(frozen=True)
class DiffRate(BlockMethod):
    """DiffRate (arXiv 2305.17997): in every block order tokens by CLS attention, drop the last, merge the next into what they are like.

    Numbers of tokens are learned for each model (the authors' compression_rate.json): after block l `prune[l]` and then `merge[l]` tokens
    are left, CLS included. Plain means of the residual stream; sizes grow by those of the merged tokens times their cosine.

    Args:
        prune: tokens left after dropping, block by block; blocks behind the end compress nothing.
        merge: tokens left after merging. The defaults are the authors' first four blocks of DeiT-S at 2.5 GFLOPs: give your model's list.

    Differs from the official code: a size never falls to 0 or below (there, a negative cosine may make log(size) NaN); distillation and
    register tokens are protected as CLS is; ties go to the lowest position. Training of the numbers is not here.

    Example:
        >>> DiffRate().blocks(12)
        (0, 1, 2, 3)
    """

    title = "DiffRate"
    paper = "arXiv 2305.17997"
    needs_cls = True

    prune: tuple[int, ...] = (197, 192, 174, 156)
    merge: tuple[int, ...] = (197, 186, 160, 133)

    def __post_init__(self) -> None:
        require_ints(self, prune=self.prune, merge=self.merge)
        require(len(self.prune) == len(self.merge), self, f"merge must have {len(self.prune)} numbers as prune has", self.merge)
        require(min(self.merge, default=2) >= 2, self, "merge must be 2 or more: CLS and a token to merge into", self.merge)
        require(all(p >= m for p, m in zip(self.prune, self.merge)), self, "merge must be at most prune", self.merge)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(range(min(depth, len(self.merge))))

    def step(self, view: BlockView) -> BlockStep | None:
        N = view.tokens.shape[1]
        kept, merged = index(min(self.prune[view.block], N)), index(min(self.merge[view.block], N))  # compiled too: `capped` in tome.py
        if merged >= N or merged <= view.prefix:
            return None
        done = prune_and_merge(view.tokens, view.cls_scores(), kept, merged, view.prefix, view.size)
        return BlockStep(done.tokens, done.plan.index, done.plan.inverse, done.size)


class Compressed(NamedTuple):
    """Result of `prune_and_merge`: (B, merged, C), (B, merged) float32, and the plan; pruned tokens have inverse -1."""

    tokens: Tensor
    size: Tensor
    plan: ops.MergePlan


def importance_order(scores: Tensor, prefix: int = 1) -> Tensor:
    """(B, N) float32 CLS attention -> (B, N - prefix) int64 tokens behind the prefix by falling attention."""
    return ops.select_topk(scores.detach()[:, prefix:], scores.shape[1] - prefix, order="score") + prefix


def prune_and_merge(tokens: Tensor, scores: Tensor, kept: int, merged: int, prefix: int = 1, size: Tensor | None = None) -> Compressed:
    """The DiffRate step at inference.

    Args:
        tokens: (B, N, C); scores: (B, N) float32, CLS's attention; kept, merged: tokens left after each half, prefix included.
        size: (B, N) float32, None = 1 each.

    Example:
        >>> tokens = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [5.0, 5.0]]])
        >>> done = prune_and_merge(tokens, torch.tensor([[0.3, 0.3, 0.2, 0.15, 0.05]]), 4, 3)
        >>> done.tokens[0, 1], done.size, done.plan.inverse
        (tensor([2., 0.]), tensor([[1., 2., 1.]]), tensor([[ 0,  1,  2,  1, -1]]))
    """
    B, N = scores.shape
    require(prefix < merged <= kept <= N, "prune_and_merge", f"prefix={prefix} < merged <= kept <= N={N} must hold", (merged, kept))
    order = importance_order(scores, prefix)
    sources, targets = order[:, merged - prefix : kept - prefix].contiguous(), order[:, : merged - prefix].contiguous()
    plan = ops.bipartite_match(tokens.detach(), kept - merged, sources=sources, targets=targets, keep=prefix)  # the others are dropped
    mean = ops.merge_tokens(tokens, plan).tensors
    old = torch.ones(B, N, device=order.device) if size is None else size
    share = old.scatter(1, plan.source, old.gather(1, plan.source) * plan.similarity)
    total = ops.merge_tokens(share[..., None], plan, mode="sum").tensors
    return Compressed(mean, total[..., 0].clamp(min=SMALLEST), plan)
