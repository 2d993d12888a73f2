"""LLaVolta: average pooling of image tokens inside the language model, in stages of training (arXiv 2406.20092, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints


@dataclass(frozen=True)
class LLaVolta(TensorMethod):
    """LLaVolta (arXiv 2406.20092): average every `stride` neighbouring image tokens before a layer, less and later as training goes on.

    Args:
        layers: the layer before which tokens are averaged, for each stage of training; -1 = the projector's output.
        strides: tokens in an average; 1 = none.
        pivots: the step at which each stage but the last ends.

    Differs from the official code: an image may have any number of tokens and start anywhere; samples without an image do not shift the
    images of those behind them.

    Example:
        >>> LLaVolta().stage(0), LLaVolta().stage(1300), LLaVolta().stage(5000)
        ((2, 8), (2, 2), (0, 1))
    """

    title = "LLaVolta"
    paper = "arXiv 2406.20092"
    hook = "dec"

    layers: tuple[int, ...] = (2, 2, 16, 0)
    strides: tuple[int, ...] = (8, 2, 2, 1)
    pivots: tuple[int, ...] = (1300, 2600, 3900)

    def __post_init__(self) -> None:
        require_ints(self, layers=self.layers, strides=self.strides, pivots=self.pivots)
        stages = len(self.layers)
        require(stages > 0 and min(self.layers) >= -1, self, "layers must be -1 or more", self.layers)
        require(len(self.strides) == stages and min(self.strides) >= 1, self, f"strides must be {stages} numbers, 1 or more", self.strides)
        ordered = len(self.pivots) == stages - 1 and list(self.pivots) == sorted(self.pivots)
        require(ordered, self, f"pivots must be {stages - 1} rising steps", self.pivots)

    def stage(self, step: int) -> tuple[int, int]:
        """(layer, stride) at a step of training."""
        at = sum(step >= pivot for pivot in self.pivots)
        return self.layers[at], self.strides[at]


def pool_sequence(hidden: Tensor, position_ids: Tensor, images: Sequence[Sequence[int]], length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Averages `stride` neighbours of every image, in reading order, and copies the text.

    Args:
        hidden: (B, S, C) packed sequences, a float dtype; position_ids: (B, S) or (1, S) int64.
        images: where the images of each sample start, ascending; every sample has as many; each has `length` tokens.
        length: tokens of an image; what is left behind its last whole average is dropped.

    Returns:
        hidden (B, S', C) and position_ids (B, S'): an average has the mean of its positions in float16, cut to an integer, as the
        official code has it (from 2048 on float16 holds even numbers only).

    Accumulated in float32. Gradients go to hidden.

    Example:
        >>> x = torch.arange(6.0).view(1, 6, 1)
        >>> pool_sequence(x, torch.arange(6)[None], [[1]], 4, 2)
        (tensor([[[0.0000],
                 [1.5000],
                 [3.5000],
                 [5.0000]]]), tensor([[0, 1, 3, 5]]))
    """
    B, S, _ = hidden.shape
    require(stride >= 1, "pool_sequence", "stride must be 1 or more", stride)
    require(len(images) == B, "pool_sequence", f"images must have a list for each of {B} samples", len(images))
    require(len({len(starts) for starts in images}) <= 1, "pool_sequence", "images must be as many in every sample", images)
    for starts in images:
        _check_starts(starts, S, length)
    count = len(images[0]) if B else 0
    at = torch.tensor([list(row) for row in images], dtype=torch.int64).view(B, count).to(hidden.device)
    out = ops.pool_runs(hidden, at, length, stride)
    if stride == 1:
        return out, position_ids.expand(B, -1).clone()
    ids = position_ids.expand(B, -1)
    both = torch.stack([ids.float(), ids.half().float()], -1)  # text exactly (to 2^24), images as the official code averages them
    exact, half = ops.pool_runs(both, at, length, stride).unbind(-1)
    kept = length // stride
    first = at - torch.arange(count, device=at.device) * (length - kept)  # where an image begins in the output
    after = torch.arange(out.shape[1], device=at.device)[:, None] - first[:, None]
    pooled = ((after >= 0) & (after < kept)).any(-1)
    return out, torch.where(pooled, half.half().long(), exact.long())


def pool_image(features: Tensor, stride: int) -> Tensor:
    """Averages of `stride` neighbours: (B, V, C) -> (B, V // stride, C); the rest is dropped.

    Example:
        >>> pool_image(torch.tensor([[[1.0], [3.0], [9.0]]]), 2)
        tensor([[[2.]]])
    """
    V = features.shape[1]
    return ops.pool_grid(features, (V,), window=stride) if stride <= V else features[:, :0]


def _check_starts(starts: Sequence[int], S: int, length: int) -> None:
    free = 0
    for start in starts:
        require(free <= start <= S, "pool_sequence", f"images must be in order and inside the {S} tokens, one start is", start)
        require(start + length <= S, "pool_sequence", f"images must end inside the {S} tokens, one starts at", start)
        free = start + length
