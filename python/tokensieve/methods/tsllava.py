"""TS-LLaVA: a picture of a few frames and tokens sampled evenly from all of them (arXiv 2411.11066)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints
from .positions import to_device


@dataclass(frozen=True)
class TSLLaVA(TensorMethod):
    """TS-LLaVA (arXiv 2411.11066): show an image model a video as one picture of a few frames and evenly sampled tokens of all frames.

    Training free, no scores. Every frame is encoded; `sample_tokens` thins their tokens, `thumbnails` makes the pictures to encode.

    Args:
        frames: frames in a picture: 4, 6 or 8 in the authors' methods 1, 2 and 3.
        tokens: tokens sampled from all frames; 0 for the pictures alone (X and Z methods).
        thumbnail_first: the pictures' tokens come first (Y and W methods) or last (V and U, the default V2).
        pictures: how many, of evenly chosen frames (W and U: 2 or 3); None: all frames in turn, what fills no picture is left out (Z).
        size: side of the square picture in pixels, the encoder's input.

    Differs from the official code: positions are always those of torch.linspace in float32 on an x86 processor with FMA; other devices
    move one or two of 2880 to the neighbour. A video with fewer frames than the pictures want shows some twice (there, an error).

    Example:
        >>> TSLLaVA().grid()
        (3, 2)
    """

    title = "TS-LLaVA"
    paper = "arXiv 2411.11066"
    hook = "vid"

    frames: int = 6
    tokens: int = 2880
    thumbnail_first: bool = False
    pictures: int | None = 1
    size: int = 336

    def __post_init__(self) -> None:
        require_ints(self, frames=self.frames, tokens=self.tokens, size=self.size)
        require_ints(self, **({} if self.pictures is None else {"pictures": self.pictures}))
        require(self.pictures is None or self.pictures >= 1, self, "pictures must be 1 or more, or None", self.pictures)
        require(self.frames >= 1, self, "frames must be 1 or more", self.frames)
        require(self.tokens >= 0, self, "tokens must be 0 or more", self.tokens)
        require(self.size >= 1, self, "size must be 1 or more", self.size)

    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the picture: the two nearest factors of its frames, more rows than columns."""
        columns = max(n for n in range(1, self.frames + 1) if self.frames % n == 0 and n * n <= self.frames)
        return self.frames // columns, columns


def even_index(total: int, count: int) -> Tensor:
    """(count,) int64 on the host: `count` positions spread evenly over 0..total-1, both ends included, halves rounded to even.

    Example:
        >>> even_index(10, 4), even_index(4, 1)
        (tensor([0, 3, 6, 9]), tensor([0]))
    """
    require(total > 0 or count == 0, "even_index", "total must be positive", total)
    last, place = max(total - 1, 0), torch.arange(count, dtype=torch.float64)
    step = float(torch.tensor(last / max(count - 1, 1), dtype=torch.float32))  # of float32, as in torch.linspace
    exact = torch.where(place < count // 2, place * step, last - (count - 1 - place) * step) if count > 1 else place
    return exact.float().round().long()  # one rounding of the fused product and sum


def picture_frames(total: int, method: TSLLaVA) -> Tensor:
    """(pictures * frames,) int64 on the host: which of a video's frames its pictures show, in order.

    Example:
        >>> picture_frames(9, TSLLaVA(frames=4)), picture_frames(9, TSLLaVA(frames=4, pictures=None))
        (tensor([0, 3, 5, 8]), tensor([0, 1, 2, 3, 4, 5, 6, 7]))
    """
    if method.pictures is None:
        return torch.arange(total // method.frames * method.frames)
    return even_index(total, method.frames * method.pictures)


def thumbnails(frames: Tensor, method: TSLLaVA) -> Tensor:
    """The pictures of a video: chosen frames, each resized into its cell of a grid, row by row.

    Args:
        frames: (T, 3, h, w), a float dtype; resized in float32: area where a side shrinks, else bilinear. The aspect ratio is not kept.

    Returns:
        (pictures, 3, H, W) in the dtype of frames; H = W = size where the grid divides it, less otherwise.

    Example:
        >>> thumbnails(torch.ones(9, 3, 8, 8), TSLLaVA(frames=6, size=12)).shape
        torch.Size([1, 3, 12, 12])
    """
    require(frames.dim() == 4 and frames.shape[0] > 0, "thumbnails", "frames must be (T, C, h, w) with T > 0", tuple(frames.shape))
    rows, columns = method.grid()
    cell = (method.size // rows, method.size // columns)
    require(min(cell) > 0, "thumbnails", f"size must be at least the {rows} x {columns} grid", method.size)
    index = picture_frames(frames.shape[0], method)
    require(len(index) > 0, "thumbnails", f"frames must fill a picture of {method.frames}", frames.shape[0])
    shrinks = cell[0] < frames.shape[2] or cell[1] < frames.shape[3]
    options: dict[str, Any] = {"mode": "area"} if shrinks else {"mode": "bilinear", "align_corners": False}
    small = torch.nn.functional.interpolate(frames[to_device(index, frames.device)].float(), size=cell, **options)
    tiled = small.unflatten(0, (-1, rows, columns)).permute(0, 3, 1, 4, 2, 5)
    return tiled.reshape(-1, frames.shape[1], rows * cell[0], columns * cell[1]).to(frames.dtype)


def sample_tokens(features: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced tokens of all frames, in the order of time and raster: (features (1, tokens, C), index (1, tokens)).

    Args:
        features: (T, N, C) tokens of every frame; tokens: how many to keep, at most T * N.

    Example:
        >>> sample_tokens(torch.arange(6.0).view(3, 2, 1), 3)[1]
        tensor([[0, 2, 5]])
    """
    total = features.shape[0] * features.shape[1]
    require(0 <= tokens <= total, "sample_tokens", f"tokens must be in [0, T * N = {total}]", tokens)
    index = to_device(even_index(total, tokens), features.device)[None]
    return ops.gather_tokens(features.reshape(1, total, -1), index), index


def aggregate(features: Tensor, picture: Tensor, method: TSLLaVA) -> Tensor:
    """The visual sequence of a video: (1, tokens + pictures * M, C).

    Args:
        features: (T, N, C) tokens of every frame; picture: (pictures, M, C) tokens of the encoded `thumbnails`.

    Example:
        >>> aggregate(torch.arange(6.0).view(3, 2, 1), torch.full((1, 1, 1), 9.0), TSLLaVA(tokens=3)).flatten()
        tensor([0., 2., 5., 9.])
    """
    sampled, shown = sample_tokens(features, method.tokens)[0], picture.reshape(1, -1, picture.shape[2])
    return torch.cat([shown, sampled] if method.thumbnail_first else [sampled, shown], 1)
