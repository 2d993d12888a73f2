"""LLaVA-OneVision and LLaVA-Video: pooled frames, newline tokens, and images cut down to a budget (arXiv 2408.03326)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints

KINDS = ("bilinear", "average", "max")
NEWLINES = ("grid", "frame", "one_token", "none")


@dataclass(frozen=True)
class LLaVAOneVision(TensorMethod):
    """LLaVA-OneVision pooling (arXiv 2408.03326): halve the sides of every video frame, and fit an image's crops into a budget.

    Args:
        stride: how much shorter a side becomes.
        kind: "bilinear" to the side over stride, rounded up; "average" or "max" of squares, rounded down.
        newline: "grid", a newline token behind every row; "frame", behind every frame; "one_token", behind the video; "none".
        crops: whole crops' worth of tokens that an image of any resolution may have (anyres_max); above 1.1 times its side it is resized.

    Differs from the official code: frames are never cast to NCHW in memory, and the two speeds of LLaVA-Video (every k-th frame pooled
    less) are two calls.

    Example:
        >>> LLaVAOneVision().side(27), LLaVAOneVision(kind="average").side(27), LLaVAOneVision().fit((135, 108), 27)
        (14, 13, (90, 72))
    """

    title = "LLaVA-OneVision pooling"
    paper = "arXiv 2408.03326"
    hook = "enc"

    stride: int = 2
    kind: str = "bilinear"
    newline: str = "grid"
    crops: int = 9

    def __post_init__(self) -> None:
        require_ints(self, stride=self.stride, crops=self.crops)
        require(self.stride >= 1, self, "stride must be 1 or more", self.stride)
        require(self.kind in KINDS, self, f"kind must be one of {', '.join(KINDS)}", self.kind)
        require(self.newline in NEWLINES, self, f"newline must be one of {', '.join(NEWLINES)}", self.newline)
        require(self.crops >= 1, self, "crops must be 1 or more", self.crops)

    def side(self, tokens: int) -> int:
        """Tokens of a side that had so many."""
        return math.ceil(tokens / self.stride) if self.kind == "bilinear" else tokens // self.stride

    def fit(self, grid: tuple[int, int], side: int) -> tuple[int, int]:
        """(h, w) that an image of so many tokens is resized to; side: tokens of a crop's side. Itself if it is within 1.1."""
        h, w = grid
        times = math.sqrt(h * w / (self.crops * side**2))
        return (int(h // times), int(w // times)) if times > 1.1 else grid


def pool_grid(x: Tensor, grid: tuple[int, int], size: tuple[int, int], kind: str = "bilinear", *, stride: int | None = None) -> Tensor:
    """Tokens of a grid, resized or pooled.

    Args:
        x: (B, h * w, C), rows one after the other, a float dtype; grid: (h, w); size: (rows, columns) of the result.
        kind: "bilinear", two taps a side without anti-aliasing; "average" and "max" over windows of h // rows by w // columns tokens, what
            is left at the far edges is dropped.
        stride: side of those windows where they do not fill the grid: 13 tokens by 5 are 2 windows of 5, not of 6.

    Returns:
        (B, rows * columns, C) of x's dtype. Gradients go to x.

    Example:
        >>> pool_grid(torch.arange(16.0).view(1, 16, 1), (4, 4), (2, 2))[0, :, 0]
        tensor([ 2.5000,  4.5000, 10.5000, 12.5000])
    """
    (h, w), (rows, columns) = grid, size
    require(h * w == x.shape[1], "pool_grid", f"grid must have the {x.shape[1]} tokens of x", grid)
    require(min(size) >= 1, "pool_grid", "size must be 1 or more", size)
    require(kind in KINDS, "pool_grid", f"kind must be one of {', '.join(KINDS)}", kind)
    if kind == "bilinear":
        return ops.pool_grid(x, grid, size=size, kind="bilinear")
    require(rows <= h and columns <= w, "pool_grid", f"size must be at most {grid}", size)
    down, across = (h // rows, w // columns) if stride is None else (stride, stride)
    out = ops.pool_grid(x, grid, window=(down, across), kind="mean" if kind == "average" else "max")
    return out.unflatten(1, (h // down, w // across))[:, :rows, :columns].flatten(1, 2)


def pool_frames(frames: Tensor, method: LLaVAOneVision, newline: Tensor | None = None) -> Tensor:
    """A video as the language model reads it: pooled frames with newline tokens, one after the other.

    Args:
        frames: (T, S * S, C) projected tokens of square frames; newline: (C,), for every setting but "none".

    Returns:
        (tokens, C): 27 x 27 tokens a frame become 14 x 14, and 14 x 15 with a newline behind every row. Gradients go to both.

    Example:
        >>> pool_frames(torch.zeros(8, 729, 4), LLaVAOneVision(), torch.zeros(4)).shape
        torch.Size([1680, 4])
    """
    T, N, C = frames.shape
    S = math.isqrt(N)
    require(S * S == N, "pool_frames", "frames must be square, got tokens", N)
    side = method.side(S)
    out = pool_grid(frames, (S, S), (side, side), method.kind, stride=method.stride)
    if method.newline == "none":
        return out.flatten(0, 1)
    require(newline is not None, "pool_frames", f"newline must be a tensor for newline={method.newline!r}", newline)
    assert newline is not None
    if method.newline == "grid":
        rows = out.view(T * side, side, C)
        return torch.cat([rows, newline.to(out.dtype).expand(T * side, 1, C)], 1).flatten(0, 1)
    if method.newline == "frame":
        return torch.cat([out, newline.to(out.dtype).expand(T, 1, C)], 1).flatten(0, 1)
    return torch.cat([out.flatten(0, 1), newline.to(out.dtype)[None]])
