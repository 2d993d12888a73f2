"""ToMeSD: merge before a module and undo it behind, one random receiver in every cell of the grid (arXiv 2303.17604)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers, warn_once


@dataclass(frozen=True)
class ToMeSD(TensorMethod):
    """ToMeSD (arXiv 2303.17604): half of a latent's tokens merge before attention, and each gets its group's output behind it.

    Diffusion models need the whole grid after every module, so merging is undone: `h = unmerge(module(merge(h))) + h`. In every cell of
    sx x sy tokens one receives; of the others, the share `ratio` of all tokens that is most like a receiver merges into it. Plain means, no
    sizes.

    Args:
        ratio: share of all tokens that merges; at most 1 - 1 / (sx * sy) can.
        sx, sy: columns and rows of a cell.
        max_downsample: levels of the U-Net that merge, by how often the latent was halved: 1 = the first only.
        random: receivers are drawn in every call; False, and an odd batch, takes the top left corners.

    Differs from the official code: lists are ascending by position (there, in no defined order); a norm of 0 has similarity 0.

    Example:
        >>> method = ToMeSD(random=False)
        >>> x = torch.randn(2, 16, 8)
        >>> plan = method.plan(x, grid=(4, 4))
        >>> small = ops.merge_tokens(x, plan).tensors
        >>> small.shape, ops.unmerge_tokens(small, plan).shape
        (torch.Size([2, 8, 8]), torch.Size([2, 16, 8]))
    """

    title = "ToMeSD"
    paper = "arXiv 2303.17604"
    hook = "vit"

    ratio: float = 0.5
    sx: int = 2
    sy: int = 2
    max_downsample: int = 1
    random: bool = True

    def __post_init__(self) -> None:
        require_ints(self, sx=self.sx, sy=self.sy, max_downsample=self.max_downsample)
        require_numbers(self, ratio=self.ratio)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)
        require(min(self.sx, self.sy) >= 1, self, "sx and sy must be 1 or more", (self.sx, self.sy))

    def grid(self, tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of a module's tokens, of a latent of `size` = (rows, columns); None where the level does not merge.

        Example:
            >>> ToMeSD().grid(4096, (64, 64)), ToMeSD(max_downsample=2).grid(1024, (64, 64)), ToMeSD().grid(1024, (64, 64))
            ((64, 64), (32, 32), None)
        """
        require(1 <= tokens <= size[0] * size[1], self, f"tokens must be in [1, {size[0] * size[1]}] of the latent", tokens)
        downsample = math.ceil(math.sqrt(size[0] * size[1] // tokens))
        return None if downsample > self.max_downsample else (math.ceil(size[0] / downsample), math.ceil(size[1] / downsample))

    def plan(
        self, x: Tensor, grid: tuple[int, int], *, offsets: Tensor | None = None, generator: torch.Generator | None = None
    ) -> ops.MergePlan | None:
        """Which tokens merge; None: none.

        Args:
            x: (B, N, C) tokens that are compared; grid: (rows, columns), N = rows * columns.
            offsets: (rows // sy, columns // sx) int64, the receiver of each cell, row by row; None: drawn with `generator`.
        """
        rows, columns = grid
        N, cells = x.shape[1], (rows // self.sy, columns // self.sx)
        require(rows * columns == N, self, f"grid must hold the N={N} tokens", grid)
        wanted, most = int(N * self.ratio), N - cells[0] * cells[1]
        if wanted > most and not torch.compiler.is_compiling():
            warn_once(self, "asks to merge more than all tokens but one of each cell; these merge")
        r = index(min(wanted, most))
        if r == 0 or 0 in cells:
            return None
        if offsets is None and self.random and x.shape[0] % 2 == 0:
            offsets = torch.randint(self.sx * self.sy, cells, generator=generator, device=x.device)
        sources, targets = partition(grid, (self.sy, self.sx), offsets, x.device)
        x = x if x.stride(-1) == 1 else x.contiguous()  # latents come as (B, C, rows, columns)
        return ops.bipartite_match(x, r, sources=sources, targets=targets, order="score")


def partition(
    grid: tuple[int, int], cell: tuple[int, int], offsets: Tensor | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(sources, targets): ascending positions; one target in every cell of the top left region that the cells cover.

    Args:
        grid: (rows, columns); cell: (rows, columns); offsets: (grid rows // cell rows, grid columns // cell columns) int64, position of the
            target in its cell, row by row; None = its top left corner.

    Example:
        >>> partition((2, 5), (2, 2), torch.tensor([[1, 2]]))
        (tensor([0, 2, 3, 4, 5, 6, 8, 9]), tensor([1, 7]))
    """
    (rows, columns), (sy, sx) = grid, cell
    down, across = torch.arange(rows // sy, device=device), torch.arange(columns // sx, device=device)
    corner = (down * sy * columns)[:, None] + across * sx
    if offsets is not None:
        require(tuple(offsets.shape) == tuple(corner.shape), "partition", f"offsets must be {tuple(corner.shape)}", tuple(offsets.shape))
        corner = corner + offsets // sx * columns + offsets % sx
    targets = corner.flatten().sort().values  # cells of one row of cells interleave
    return ops.complement_index(targets[None], rows * columns)[0], targets
