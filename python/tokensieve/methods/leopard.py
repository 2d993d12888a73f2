"""LEOPARD: a budget of tiles for all images of a prompt, and pixel shuffle of every view (arXiv 2410.01744)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints


@dataclass(frozen=True)
class Leopard(TensorMethod):
    """LEOPARD (arXiv 2410.01744): share `views` tiles among all images by their size; fold every `block` x `block` tokens into one.

    Args:
        views: views of a prompt at most: one of every whole image, the rest tiles.
        tile: side of a tile, pixels.
        block: side of the square of tokens that become one, `block` ** 2 times as wide.

    Differs from the official code: a loop that would trim too many tiles is not here, because truncation never leaves too many. Tiles that
    truncation leaves over are not handed out there either.

    Example:
        >>> Leopard().tiles([(1092, 728), (364, 364)]), Leopard().tiles([(3640, 3640)])
        ([6, 0], [49])
    """

    title = "LEOPARD"
    paper = "arXiv 2410.01744"
    hook = "enc"

    views: int = 50
    tile: int = 364
    block: int = 2

    def __post_init__(self) -> None:
        require_ints(self, views=self.views, tile=self.tile, block=self.block)
        require(self.views >= 1, self, "views must be 1 or more", self.views)
        require(self.tile >= 1, self, "tile must be 1 or more", self.tile)
        require(self.block >= 1, self, "block must be 1 or more", self.block)

    def tiles(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """Tiles of every image of these (width, height); 0 = its base view alone. Halves round to even."""
        budget = self.views - len(sizes)
        if budget <= 0:
            return [0] * len(sizes)
        wished = [round(width / self.tile) * round(height / self.tile) for width, height in sizes]
        wished = [0 if count == 1 else count for count in wished]
        total = sum(wished)
        return wished if total <= budget else [int(count * budget / total) for count in wished]

    def canvas(self, size: tuple[int, int], tiles: int) -> tuple[int, int]:
        """(width, height) that an image of (width, height) is fitted into with so many tiles; (0, 0) = none.

        The most pixels of the image, then the least padding; the fewest rows, then columns, of equals.

        Example:
            >>> Leopard().canvas((1000, 500), 4)
            (728, 364)
        """
        wide, high = size
        best, most = (0, 0), (-1, 0)
        for rows in range(1, tiles + 1):
            for columns in range(1, tiles // rows + 1):
                if rows == columns == 1:
                    continue
                width, height = columns * self.tile, rows * self.tile
                scale = min(width / wide, height / high)
                seen = min(int(wide * scale) * int(high * scale), wide * high)
                if (seen, seen - width * height) > most:
                    best, most = (width, height), (seen, seen - width * height)
        return best


def space_to_depth(x: Tensor, grid: tuple[int, int], block: int = 2) -> Tensor:
    """Folds squares of tokens into one wider token (pixel shuffle).

    Args:
        x: (B, h * w, C), rows of a grid one after the other; grid: (h, w), multiples of block.

    Returns:
        (B, h * w / block ** 2, block ** 2 * C), channels by (row, column) within the square. One copy; gradients go to x.

    Example:
        >>> import torch
        >>> space_to_depth(torch.arange(8.0).view(1, 8, 1), (2, 4))
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    return ops.space_to_depth(x, grid, block)
