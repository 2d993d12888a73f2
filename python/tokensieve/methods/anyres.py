"""Any-resolution images: crops in a grid, their mosaic, its padding. Geometry is host integers; indices are made once and copied."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .base import require
from .positions import to_device


def padding_cut(image_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the part of a mosaic that shows the image, as LLaVA-NeXT cuts it.

    Args:
        image_size: (width, height) of the original image in pixels; canvas: (width, height) of the mosaic in patches.

    Example:
        >>> padding_cut((600, 310), (48, 24))
        (0, 24, 1, 47)
    """
    (width, height), (wide, high) = image_size, canvas
    require(min(width, height) > 0, "padding_cut", "image_size must be positive", image_size)
    if width / height > wide / high:
        cut = (high - int(height * (wide / width))) // 2
        return cut, high - cut, 0, wide
    cut = (wide - int(width * (high / height))) // 2
    return 0, high, cut, wide - cut


def mosaic(grid: tuple[int, int], side: tuple[int, int]) -> Tensor:
    """(high * rows, wide * columns) int64, crop * N + patch of every place of the mosaic; crops count from 0 in raster order.

    Args:
        grid: (wide, high) crops; side: (rows, columns) of patches in a crop.

    Example:
        >>> mosaic((2, 1), (2, 2))
        tensor([[0, 1, 4, 5],
                [2, 3, 6, 7]])
    """
    (wide, high), (rows, columns) = grid, side
    numbers = torch.arange(wide * high * rows * columns).view(high, wide, rows, columns)
    return numbers.transpose(1, 2).reshape(high * rows, wide * columns)


def shown_patches(image_size: tuple[int, int], grid: tuple[int, int], side: tuple[int, int]) -> Tensor:
    """(wide * high, N) bool on the host: patches of every crop that are not padding.

    Example:
        >>> shown_patches((10, 20), (1, 2), (2, 4)).int()
        tensor([[0, 1, 1, 0, 0, 1, 1, 0],
                [0, 1, 1, 0, 0, 1, 1, 0]], dtype=torch.int32)
    """
    places = mosaic(grid, side)
    top, bottom, left, right = padding_cut(image_size, (places.shape[1], places.shape[0]))
    shown = torch.zeros(places.numel(), dtype=torch.bool)
    shown[places[top:bottom, left:right].flatten()] = True
    return shown.view(grid[0] * grid[1], side[0] * side[1])


def crop_cells(grid: tuple[int, int], side: tuple[int, int]) -> Tensor:
    """(N,) int64 on the host: the crop that each patch of the thumbnail lies in; what does not divide goes to the last row and column.

    Example:
        >>> crop_cells((2, 1), (2, 5))
        tensor([0, 0, 1, 1, 1, 0, 0, 1, 1, 1])
    """
    (wide, high), (rows, columns) = grid, side
    require(wide <= columns and high <= rows, "crop_cells", f"grid must fit into {columns} x {rows} patches", grid)
    row = (torch.arange(rows) // (rows // high)).clamp(max=high - 1)
    column = (torch.arange(columns) // (columns // wide)).clamp(max=wide - 1)
    return (row[:, None] * wide + column).flatten()


def in_order(marks: Tensor, order: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The marked ones of a list of positions, in its order, without a host sync.

    Args:
        marks: (M,) bool; order: (T,) int64 on the host, positions in marks, one may come again; most: an upper bound of the result.

    Returns:
        (1, most) int64, -1 padded at the end, and (1,) how many there are.

    Example:
        >>> in_order(torch.tensor([True, False, True]), torch.tensor([2, 1, 0, 2]), 4)
        (tensor([[ 2,  0,  2, -1]]), tensor([3]))
    """
    order = to_device(order, marks.device)
    present = marks[order][None]
    chosen = ops.select_topk(present.float(), min(most, present.shape[1]), candidates=present)
    return torch.where(chosen < 0, -1, order[chosen.clamp(min=0)]), present.sum(1)
