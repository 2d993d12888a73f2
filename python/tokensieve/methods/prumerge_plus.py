"""PruMerge+: PruMerge with centres on a regular grid beside the outliers (arXiv 2403.15388, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import require, require_ints
from .positions import token_mask
from .prumerge import PruMerge


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge+ (arXiv 2403.15388): PruMerge with centres on a regular grid beside the outliers, so that no region is lost.

    The grid's step is a third of the patches per outlier: every 4th patch at 39 outliers of 576, a quarter to a third of the tokens in all.

    Args:
        neighbors, adaptive, ratio: see `PruMerge`.
        grid_end: patches from here on are not sampled; None = N - 1, the official code's 575 of 576 patches.

    Differs from the official code: as `PruMerge`; any number of patches and any batch work; an image without outliers takes a grid of three
    patches (there, a division by zero); not adaptive, a patch that is chosen twice counts once.

    Example:
        >>> from tokensieve.methods.prumerge import select
        >>> select(torch.tensor([[0.1, 0.1, 0.1, 0.2, 0.1, 0.9, 0.1, 0.2]]), PruMergePlus())
        tensor([[ 5,  0,  2,  4,  6, -1, -1, -1]])
    """

    title = "PruMerge+"

    grid_end: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ints(self, **({} if self.grid_end is None else {"grid_end": self.grid_end}))
        require(self.grid_end is None or self.grid_end >= 0, self, "grid_end must be 0 or more", self.grid_end)

    def add_centers(self, best: Tensor, count: Tensor, candidates: Tensor | None, N: int) -> Tensor:
        end = N - 1 if self.grid_end is None else self.grid_end
        grid = ~token_mask(best, N) & grid_marks(count, N, end, None if self.adaptive else self.ratio)
        grid = grid if candidates is None else grid & candidates
        both = torch.cat([best, ops.select_topk(grid.float(), N, candidates=grid)], 1)
        return both.gather(1, (both < 0).int().argsort(dim=1, stable=True)[:, :N])  # pads last


def grid_marks(count: Tensor, N: int, end: int, ratio: float | None = None) -> Tensor:
    """(R, N) bool: patches 0, s, 2 s, ... below `end` with s = N // count // 3; with a ratio s = 1 // ratio, from s // 2 on.

    Args:
        count: (R,) int64 outliers of each image.

    Example:
        >>> grid_marks(torch.tensor([1, 2]), 12, 11).int()
        tensor([[1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
                [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]], dtype=torch.int32)
    """
    place = torch.arange(N, device=count.device)
    if ratio is not None:
        step = int(1 / ratio)
        return ((place % step == step // 2 % step) & (place >= step // 2) & (place < end)).expand(len(count), -1)
    steps = torch.div(torch.div(N, count.clamp(min=1), rounding_mode="floor"), 3, rounding_mode="floor").clamp(min=1)
    return (place % steps[:, None] == 0) & (place < end)
