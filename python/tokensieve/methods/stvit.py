"""STViT: a few semantic tokens per window through most layers, and the full map recovered from them (arXiv 2303.08685, CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers


@dataclass(frozen=True)
class STViT(TensorMethod):
    """STViT-R (arXiv 2303.08685): maxima of each window become semantic tokens, refined by all tokens, and give the map back in the end.

    A unit of five layers on a map of tokens: generate, refine, attention within the windows' tokens, among all of them, recover.

    Args:
        window: side of a window; the map's sides are multiples of it.
        sample: side of a window's square of semantic tokens.
        key_window: side of the square of tokens, around its window but inside the map, that a window's semantic tokens also look at.
        shortcut: the generated tokens keep the maxima they start from.
        layer_scale: initial size of what each half of a layer adds; 0 = no such parameters.
        mlp_ratio: width of the MLP over that of a token.
        centers: semantic tokens of the whole map, each with a learned part added before refinement (USE_GLOBAL); 0 = none.

    Differs from the official code: any map, not 14 x 14 alone: a key window stands around its window's middle, moved inside the map, which
    on 14 x 14 are the official ones; keys are normalised and projected once a token, not once a window that sees it. The DeiT variant of
    the paper was never published and is not here; relative positions and convolutional ones, off by default there, are not either.
    Names of weights are ours: an official checkpoint needs a map of names.

    Example:
        >>> STViT().tokens((14, 14)), STViT(sample=4).tokens((28, 14))
        (36, 128)
    """

    title = "STViT"
    paper = "arXiv 2303.08685"
    hook = "vit"

    window: int = 7
    sample: int = 3
    key_window: int = 10
    shortcut: bool = False
    layer_scale: float = 1e-5
    mlp_ratio: float = 4.0
    centers: int = 0

    def __post_init__(self) -> None:
        require_ints(self, window=self.window, sample=self.sample, key_window=self.key_window, centers=self.centers)
        require_numbers(self, layer_scale=self.layer_scale, mlp_ratio=self.mlp_ratio)
        require(1 <= self.sample <= self.window, self, f"sample must be in [1, window={self.window}]", self.sample)
        require(self.key_window >= self.window, self, f"key_window must be at least window={self.window}", self.key_window)
        require(self.layer_scale >= 0, self, "layer_scale must be 0 or more", self.layer_scale)
        require(self.mlp_ratio > 0, self, "mlp_ratio must be positive", self.mlp_ratio)
        require(self.centers >= 0, self, "centers must be 0 or more", self.centers)

    def small(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the semantic tokens of a map."""
        require(min(grid) > 0 and not any(n % self.window for n in grid), self, f"grid must be multiples of window={self.window}", grid)
        return index(grid[0] // self.window * self.sample), index(grid[1] // self.window * self.sample)  # see `static`

    def tokens(self, grid: tuple[int, int]) -> int:
        """Semantic tokens of a map."""
        rows, columns = self.small(grid)
        return rows * columns


def window_maxima(x: Tensor, grid: tuple[int, int], window: int = 7, sample: int = 3) -> Tensor:
    """The maximum of each of sample x sample bins of every window; neighbouring bins share a row where sample does not divide window.

    Args:
        x: (B, h * w, C), rows one after the other; grid: (h, w), multiples of window.

    Returns:
        (B, windows, sample ** 2, C). The gradient goes to the first maximum of a bin.

    Example:
        >>> window_maxima(torch.arange(9.0).view(1, 9, 1), (3, 3), 3, 2).flatten()
        tensor([4., 5., 7., 8.])
    """
    window, sample, h, w = static(window, sample, *grid)
    small = (h // window * sample, w // window * sample)
    return windows_of(ops.pool_grid(x, (h, w), size=small, within=(window, window), kind="max"), small, sample)


def key_windows(grid: tuple[int, int], window: int = 7, key_window: int = 10, device: torch.device | str = "cpu") -> Tensor:
    """(windows, keys) int64 positions of the tokens around each window: a square about its middle, moved inside the map.

    Example:
        >>> key_windows((14, 14))[:, 0]
        tensor([ 0,  4, 56, 60])
    """
    window, key_window, h, w = static(window, key_window, *grid)
    sides = []
    for n in (h, w):
        size = min(key_window, n)
        start = torch.arange(0, n, window, device=device) - (key_window - window) // 2
        sides.append(start.clamp(0, n - size)[:, None] + torch.arange(size, device=device))
    down, across = sides
    return (down[:, None, :, None] * w + across[:, None]).flatten(2).flatten(0, 1)


def windows_of(x: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """(B, h * w, C) -> (B, windows, window ** 2, C), windows and their tokens by rows.

    Example:
        >>> windows_of(torch.arange(8).view(1, 8, 1), (2, 4), 2)[0, 1].flatten()
        tensor([2, 3, 6, 7])
    """
    window, h, w = static(window, *grid)
    require(h * w == x.shape[1], "stvit", f"grid must have the {x.shape[1]} tokens of x", grid)
    require(h % window == 0 and w % window == 0, "stvit", f"grid must be multiples of window={window}", grid)
    return x.unflatten(1, (h // window, window, w // window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def tile(windows: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `windows_of`: (B, windows, window ** 2, C) -> (B, h * w, C)."""
    window, h, w = static(window, *grid)
    cells = windows.unflatten(2, (window, window)).unflatten(1, (h // window, w // window))
    return cells.transpose(2, 3).flatten(1, 4)


def static(*numbers: int) -> list[int]:
    """Plain ints: torch.compile(dynamic=True) makes symbols of a method's numbers, and products of them take it 20 s."""
    return [index(number) for number in numbers]
