"""EViT: keep the patches that CLS attends to, fuse the rest into one token (arXiv 2202.07800, ICLR 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index as host_int

import torch
from torch import Tensor

from .. import ops
from .base import BlockMethod, require, require_ints, require_numbers
from .views import BlockStep, BlockView


@dataclass(frozen=True)
class EViT(BlockMethod):
    """EViT (arXiv 2202.07800): in blocks 3, 6 and 9 keep the share of patches that CLS attends to most and fuse the others into one.

    Kept tokens follow by falling attention; the fused token, the attention-weighted sum of the others, comes last and is an ordinary patch
    for later blocks. The weights are differentiable: training teaches the attention what to keep.

    Args:
        keep: share of the tokens behind the prefix that stays, rounded up; the official models use 0.5 to 0.9.
        layers: 0-based blocks that drop (drop_loc).
        tokens: an absolute number instead of the share.
        fuse: make the fused token.
        normalize: divide the fused token's weights by their sum; the official code does not.

    Differs from the official code: a distillation token and registers are protected as CLS is; ties go to the lowest position.

    Example:
        >>> [EViT(keep=0.7).keep_count(n) for n in (196, 139)]
        [138, 98]
    """

    title = "EViT"
    paper = "arXiv 2202.07800"
    needs_cls = True

    keep: float = 0.7
    layers: tuple[int, ...] = (3, 6, 9)
    tokens: int | None = None
    fuse: bool = True
    normalize: bool = False

    def __post_init__(self) -> None:
        require_ints(self, layers=self.layers, **({} if self.tokens is None else {"tokens": self.tokens}))
        require_numbers(self, keep=self.keep)
        require(0 < self.keep <= 1, self, "keep must be in (0, 1]", self.keep)
        require(min(self.layers, default=0) >= 0, self, "layers must be 0 or more", self.layers)
        require(self.tokens is None or self.tokens >= 0, self, "tokens must be 0 or more", self.tokens)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted(layer for layer in set(self.layers) if layer < depth))

    def keep_count(self, candidates: int) -> int:
        """Tokens kept of so many behind the prefix, without the fused one."""
        wanted = math.ceil(self.keep * candidates) if self.tokens is None else self.tokens
        return host_int(min(wanted, candidates))  # compiled too: see `capped` in tome.py

    def step(self, view: BlockView) -> BlockStep | None:
        k = self.keep_count(view.tokens.shape[1] - view.prefix)
        if k == view.tokens.shape[1] - view.prefix:
            return None
        tokens, index = keep_and_fuse(view.tokens, view.cls_scores(), k, view.prefix, fuse=self.fuse, normalize=self.normalize)
        return BlockStep(tokens, index)


def keep_and_fuse(
    tokens: Tensor, scores: Tensor, k: int, prefix: int = 1, *, fuse: bool = True, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """The EViT step: (tokens (B, prefix + k + 1, C), index (B, prefix + k + 1), -1 for the fused token); without it, one row fewer.

    Args:
        tokens: (B, N, C); scores: (B, N) float32, CLS's attention to every token, prefix included; k: kept behind the prefix.

    Gradients reach the tokens and, through the fused one, the scores.

    Example:
        >>> tokens, scores = torch.tensor([[[9.0], [1.0], [2.0], [4.0]]]), torch.tensor([[0.1, 0.2, 0.4, 0.3]])
        >>> keep_and_fuse(tokens, scores, 1)
        (tensor([[[9.0000], [2.0000], [1.4000]]]), tensor([[ 0,  2, -1]]))
    """
    N = tokens.shape[1]
    require(0 <= k <= N - prefix, "keep_and_fuse", f"k must be in [0, {N - prefix}]", k)
    chosen = ops.select_topk(scores.detach()[:, prefix:], k, order="score") + prefix
    index = torch.cat([torch.arange(prefix, device=tokens.device).expand(len(chosen), -1), chosen], 1)
    kept = ops.gather_tokens(tokens, index)
    if not fuse:
        return kept, index
    rest = ops.fuse_dropped(tokens, scores, index, normalize=normalize)
    return torch.cat([kept, rest], 1), torch.nn.functional.pad(index, (0, 1), value=-1)


def annealed(keep: float, step: int, start: int, steps: int) -> float:
    """The keep share at a training step: 1 until `start`, then along half a cosine to `keep` in so many steps.

    Example:
        >>> [round(annealed(0.7, epoch, 10, 100), 3) for epoch in (0, 60, 110, 300)]
        [1.0, 0.85, 0.7, 0.7]
    """
    share = min(max(step - start, 0) / max(steps, 1), 1.0)
    return keep + (1 - keep) * 0.5 * (1 + math.cos(math.pi * share))
