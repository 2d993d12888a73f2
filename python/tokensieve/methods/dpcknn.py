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

    Distances are Euclidean over sqrt(C), in float32 and without gradient. All pairs come from products (N x N are stored); those that make
    a density or a distance are computed again from differences, so equal tokens are at 0. Ties go to the lowest index.

    Example:
        >>> x = torch.tensor([[[0.0], [0.25], [5.0], [5.25], [6.0]]])
        >>> density_peaks(x, 2, k=2, noise=torch.tensor([[0.0, 0.5, 0.0, 0.9, 0.0]])).labels
        tensor([[1, 1, 0, 0, 0]])
    """
    B, N, C = x.shape
    require(1 <= clusters <= N, "density_peaks", f"clusters must be in [1, N={N}]", clusters)
    require(1 <= k <= N, "density_peaks", f"k must be in [1, N={N}]", k)
    with torch.no_grad():
        tokens = x.float() - x.float().mean(1, keepdim=True)  # products lose what the tokens have in common
        distance = torch.cdist(tokens, tokens, compute_mode="use_mm_for_euclid_dist") / math.sqrt(C)
        distance.diagonal(dim1=1, dim2=2).zero_()
        far = distance.max() + 1
        if mask is not None:
            distance = torch.where(mask[:, None, :], distance, far)
        near = distance.topk(k, largest=False).indices.flatten(1)
        exact = _distances(tokens, near).view(B, N, k)
        if mask is not None:
            exact = torch.where(mask.gather(1, near).view(B, N, k), exact, far)
        density = (-exact.square().mean(-1)).exp()
        density = density if noise is None else density + noise * 1e-6
        density = density if mask is None else density * mask
        most = distance.flatten(1).amax(1)[:, None]
        found, at = torch.where(density[:, None, :] > density[:, :, None], distance, math.inf).min(-1)
        nearest = torch.where(found == math.inf, most, torch.minimum(_distances(tokens, at), most))
        index = ops.select_topk(density * nearest, clusters, order="score")
        labels = ops.gather_tokens(distance, index).argmin(1)
        labels = labels.scatter(1, index, torch.arange(clusters, device=x.device).expand(B, -1))
    return Peaks(density, nearest, index, labels)


def _distances(x: Tensor, index: Tensor) -> Tensor:
    """From each token of x (B, N, C) to its tokens in index (B, N * k), by differences: exactly 0 between equal tokens. (B, N * k)."""
    B, N, C = x.shape
    others = ops.gather_tokens(x, index).view(B, N, -1, C)
    return torch.linalg.vector_norm(others - x[:, :, None], dim=-1).flatten(1) / math.sqrt(C)


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
