"""Chat-UniVi: three levels of density-peak clusters for an image, and events of a video found alike (arXiv 2311.08046, CVPR 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers
from .dpcknn import merge_clusters


@dataclass(frozen=True)
class ChatUniVi(TensorMethod):
    """Chat-UniVi (arXiv 2311.08046): cluster an image's tokens into 64, those into 32 and those into 16, and hand over all three levels.

    Args:
        levels: clusters of each level; a number up to 1 is a share of the level before, rounded up.
        neighbors: tokens of a density, itself among them, for each level; a level of fewer clusters takes min(3, max(clusters // 2, 1)).
        events: events of a video per frame, rounded up.

    Differs from the official code: no noise unless it is given. With up to three clusters one neighbour is left, every density is 1, and
    there the noise alone picks the centres; here it is the lowest tokens.

    Example:
        >>> ChatUniVi().neighbors_of(0, 64), ChatUniVi().event_count(40)
        (5, 3)
    """

    title = "Chat-UniVi"
    paper = "arXiv 2311.08046"
    hook = "enc"

    levels: tuple[float, ...] = (64, 32, 16)
    neighbors: tuple[int, ...] = (5, 3, 3)
    events: float = 1 / 16

    def __post_init__(self) -> None:
        require_ints(self, neighbors=self.neighbors)
        require_numbers(self, events=self.events)
        require(len(self.levels) > 0 and min(self.levels) > 0, self, "levels must be above 0", self.levels)
        require(
            len(self.neighbors) == len(self.levels),
            self,
            f"neighbors must have one count for each of {len(self.levels)} levels",
            self.neighbors,
        )
        require(min(self.neighbors) >= 1, self, "neighbors must be 1 or more", self.neighbors)
        require(0 < self.events <= 1, self, "events must be in (0, 1]", self.events)

    def neighbors_of(self, level: int, clusters: int) -> int:
        """Neighbours of the density at a level of so many clusters."""
        k = self.neighbors[level]
        return min(3, max(clusters // 2, 1)) if k > clusters else k

    def event_count(self, frames: int) -> int:
        """Events of a video of so many frames."""
        return cluster_count(self.events, frames)


def cluster_count(ratio: float, tokens: int) -> int:
    """Clusters of so many tokens: the ratio itself above 1, else a share; both rounded up, from 1 to the number of tokens.

    Example:
        >>> cluster_count(64, 576), cluster_count(0.25, 65)
        (64, 17)
    """
    return min(max(math.ceil(ratio) if ratio > 1 else math.ceil(tokens * ratio), 1), tokens)


def merge_levels(x: Tensor, method: ChatUniVi, *, noise: tuple[Tensor, ...] | None = None) -> Tensor:
    """All levels of every image, one after the other, clusters by falling centre score.

    Args:
        x: (B, N, C) tokens, a float dtype; noise: for each level (B, tokens of the level before) in [0, 1), as in `cluster_tokens`.

    Returns:
        (B, sum of the levels, C) of x's dtype. Gradients go to x.

    Example:
        >>> merge_levels(torch.randn(2, 256, 8), ChatUniVi()).shape
        torch.Size([2, 112, 8])
    """
    out = []
    for level, ratio in enumerate(method.levels):
        clusters = cluster_count(ratio, x.shape[1])
        k = min(method.neighbors_of(level, clusters), x.shape[1])
        labels = ops.cluster_tokens(x.detach(), clusters, k=k, noise=None if noise is None else noise[level]).labels
        x = merge_clusters(x, labels, clusters)[0]
        out.append(x)
    return torch.cat(out, 1)


def frame_events(frames: Tensor, method: ChatUniVi, *, noise: Tensor | None = None) -> Tensor:
    """The event of every frame: mean features clustered alike. Events count from 0 by their first frame; one may come back later.

    Args:
        frames: (B, T, N, C) tokens of T frames; noise: (B, T) in [0, 1).

    Returns:
        (B, T) int64.

    Example:
        >>> frames = torch.tensor([0.0, 0.0, 9.0, 9.1]).view(1, 4, 1, 1)
        >>> frame_events(frames, ChatUniVi(events=0.5), noise=torch.tensor([[0.9, 0.0, 0.5, 0.0]]))
        tensor([[0, 0, 1, 1]])
    """
    T = frames.shape[1]
    events = method.event_count(T)
    k = min(method.neighbors_of(0, events), T)
    labels = ops.cluster_tokens(frames.mean(2), events, k=k, noise=noise).labels
    same = labels[:, :, None] == labels[:, None, :]
    first = same.int().argmax(2)  # the first frame of each frame's event
    begins = first == torch.arange(T, device=labels.device)
    return (begins.cumsum(1) - 1).gather(1, first)
