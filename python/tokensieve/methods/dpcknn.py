"""DPC-KNN: tokens clustered around density peaks and averaged, as in TCFormer (arXiv 2204.08680, CVPR 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers


@dataclass(frozen=True)
class DPCKNN(TensorMethod):
    """DPC-KNN (arXiv 2204.08680): cluster tokens around the densest ones that lie far from any denser one, and average the clusters.

    Args:
        ratio: clusters per token, rounded up; at least one cluster.
        neighbors: nearest tokens, the token itself among them, that give a density.

    Differs from the official code: no noise unless it is given, so clusterings repeat; its last line, which would renormalise the
    aggregation weights, discards its result there and is not here.

    Example:
        >>> DPCKNN().clusters(3136), DPCKNN(ratio=0.4).clusters(145)
        (784, 58)
    """

    title = "DPC-KNN"
    paper = "arXiv 2204.08680"
    hook = "vit"

    ratio: float = 0.25
    neighbors: int = 5

    def __post_init__(self) -> None:
        require_ints(self, neighbors=self.neighbors)
        require_numbers(self, ratio=self.ratio)
        require(0 < self.ratio <= 1, self, "ratio must be in (0, 1]", self.ratio)
        require(self.neighbors >= 1, self, "neighbors must be 1 or more", self.neighbors)

    def clusters(self, tokens: int) -> int:
        """Clusters of so many tokens."""
        return max(math.ceil(tokens * self.ratio), 1)


def merge_clusters(x: Tensor, labels: Tensor, clusters: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weighted mean of every cluster: (merged (B, K, C), share (B, N) of each token in its mean).

    Args:
        x: (B, N, C); labels: (B, N) int64 in [0, clusters); scores: (B, N) log weights of the tokens, None = equal weights.

    The divisor has 1e-6 more than the weights. Gradients go to x and scores.

    Example:
        >>> x = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> merge_clusters(x, torch.tensor([[0, 0, 1]]), 2)[1]
        tensor([[0.5000, 0.5000, 1.0000]])
    """
    weights = torch.ones_like(labels, dtype=torch.float32) if scores is None else scores.float().exp()
    merged = ops.merge_by_label(x, labels, clusters, weights=weights, epsilon=1e-6)[0]
    total = weights.new_zeros((labels.shape[0], clusters)).scatter_add(1, labels, weights) + 1e-6
    return merged, weights / total.gather(1, labels)
