"""DPC-KNN: tokens clustered around density peaks and averaged, as in TCFormer (arXiv 2204.08680, CVPR 2022)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

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


class Peaks(NamedTuple):
    """density (B, N) float32; distance (B, N) float32, to the nearest denser token; index (B, K) int64, best first; labels (B, N) int64."""

    density: Tensor
    distance: Tensor
    index: Tensor  # type: ignore[assignment]
    labels: Tensor


def density_peaks(x: Tensor, clusters: int, k: int = 5, *, noise: Tensor | None = None, mask: Tensor | None = None) -> Peaks:
    """Clusters tokens: centres are the tokens with the largest product of density and distance to the nearest denser token.

    Args:
        x: (B, N, C), a float dtype; clusters: 1 to N; k: neighbours of the density, the token itself among them, 1 to N.
        noise: (B, N) in [0, 1), times 1e-6 added to the density: breaks ties as the official code does with random numbers.
        mask: (B, N) bool, False = padding: density 0, and as a neighbour farther than any two tokens of the batch.

    Returns:
        `Peaks`. A token without a denser one has the largest distance of its image. Labels are rows of index; a centre has its own.

    Distances are Euclidean over sqrt(C), in float32 and without gradient, by `torch.cdist`: N x N of them are stored. Ties go to the lowest
    index.

    Example:
        >>> x = torch.tensor([[[0.0], [0.25], [5.0], [5.25], [6.0]]])
        >>> density_peaks(x, 2, k=2, noise=torch.tensor([[0.0, 0.5, 0.0, 0.9, 0.0]])).labels
        tensor([[1, 1, 0, 0, 0]])
    """
    B, N, C = x.shape
    require(1 <= clusters <= N, "density_peaks", f"clusters must be in [1, N={N}]", clusters)
    require(1 <= k <= N, "density_peaks", f"k must be in [1, N={N}]", k)
    with torch.no_grad():
        tokens = x.float()
        distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(C)
        if mask is not None:
            distance = torch.where(mask[:, None, :], distance, distance.max() + 1)
        density = (-distance.topk(k, largest=False).values.square().mean(-1)).exp()
        density = density if noise is None else density + noise * 1e-6
        density = density if mask is None else density * mask
        denser = density[:, None, :] > density[:, :, None]
        nearest = torch.where(denser, distance, distance.flatten(1).amax(1)[:, None, None]).amin(-1)
        index = ops.select_topk(density * nearest, clusters, order="score")
        labels = ops.gather_tokens(distance, index).argmin(1)
        labels = labels.scatter(1, index, torch.arange(clusters, device=x.device).expand(B, -1))
    return Peaks(density, nearest, index, labels)


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
