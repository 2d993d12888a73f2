"""RED-VILLM: a video for an image model, as the mean over its frames and the mean of every frame (arXiv 2404.11865)."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .base import TensorMethod


@dataclass(frozen=True)
class REDVILLM(TensorMethod):
    """RED-VILLM (arXiv 2404.11865): T frames of N tokens become N means over time and T means over space, for an image model.

    The means over time go through the image model's own projector, those over space through a copy of it that is trained.

    Args:
        temporal_first: the means of the frames come before those of the places.

    Differs from the official code: none was at hand, this is written from the paper's description. Uncertain: which part comes first.

    Example:
        >>> REDVILLM().tokens(100, 256)
        356
    """

    title = "RED-VILLM"
    paper = "arXiv 2404.11865"
    hook = "vid"

    temporal_first: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.temporal_first, bool):
            raise TypeError(f"tokensieve.REDVILLM: temporal_first must be a bool, got {self.temporal_first!r}")

    def tokens(self, frames: int, patches: int) -> int:
        """Tokens of a video."""
        return frames + patches


def pool_axes(frames: Tensor) -> tuple[Tensor, Tensor]:
    """What is where, and what happens when.

    Args:
        frames: (B, T, N, C), T and N 1 or more.

    Returns:
        (means over time (B, N, C), means over space (B, T, C)), summed in float32, in the dtype of frames. Gradients go to frames.

    Example:
        >>> pool_axes(torch.tensor([[[[1.0], [3.0]], [[5.0], [7.0]]]]))
        (tensor([[[3.],
                 [5.]]]), tensor([[[2.],
                 [6.]]]))
    """
    over_space, over_time = ops.row_column_means(frames)
    return over_time, over_space


class VideoAligner(nn.Module):
    """The image model's projector for the means over time, and a copy of it, to be trained, for the means over space.

    Args:
        projector: (B, n, C) -> (B, n, C'), any n.

    Example:
        >>> VideoAligner(nn.Linear(8, 12))(torch.randn(2, 5, 9, 8)).shape
        torch.Size([2, 14, 12])
    """

    def __init__(self, projector: nn.Module, method: REDVILLM | None = None) -> None:
        super().__init__()
        self.method = REDVILLM() if method is None else method
        self.spatial, self.temporal = projector, copy.deepcopy(projector)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, N, C) frames -> (B, N + T, C')."""
        over_time, over_space = pool_axes(frames)
        parts = [self.spatial(over_time), self.temporal(over_space)]
        return torch.cat(parts[::-1] if self.method.temporal_first else parts, 1)
