"""Density peaks (DPC-KNN) in float64, from the matrix of all distances."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distances(x: Tensor) -> Tensor:
    """(B, N, N) float64: Euclidean over sqrt(C), by differences; infinite from a token that is not finite, 0 from itself."""
    y = x.cpu().double()
    d = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(max(y.shape[2], 1))
    d = d.nan_to_num(nan=math.inf, posinf=math.inf)
    d.diagonal(dim1=1, dim2=2).zero_()
    return d


def largest_finite(d: Tensor) -> Tensor:
    """(B,): the largest finite distance of each image."""
    return d.masked_fill(d.isinf(), 0.0).flatten(1).amax(1)


def with_padding(d: Tensor, mask: Tensor | None) -> Tensor:
    """The distances of padded columns become the largest finite one of the batch + 1."""
    return d if mask is None else torch.where(mask.cpu()[:, None, :], d, largest_finite(d).max() + 1)


def density(x: Tensor, k: int, noise: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """(B, N) float64."""
    near = with_padding(distances(x), mask).sort(-1).values[..., :k]
    value = (-near.square().mean(-1)).exp()
    value = value if noise is None else value + noise.cpu().double() * 1e-6
    return value if mask is None else value * mask.cpu()


def denser_distance(x: Tensor, density: Tensor, mask: Tensor | None = None, first_leads: bool = True) -> Tensor:
    """(B, N) float64, for the given densities; first_leads: of equal densities, as without noise."""
    d, value = distances(x), density.cpu()
    denser = value[:, None, :] > value[:, :, None]
    if first_leads:
        denser |= (value[:, None, :] == value[:, :, None]) & torch.ones_like(denser).tril(-1)
    if mask is not None:
        denser &= mask.cpu()[:, None, :]
    most = with_padding(d, mask)
    most = torch.where(most.isinf(), torch.zeros_like(most), most).flatten(1).amax(1)[:, None]
    nearest = torch.where(denser, d, math.inf).amin(-1)
    return torch.minimum(nearest, most)


def nearest_center(x: Tensor, centers: Tensor) -> Tensor:
    """(B, N) int64: the first of the nearest centres; the place of a centre is its own, of one listed twice the first."""
    d, labels = distances(x), torch.full(x.shape[:2], -1)
    for b, row in enumerate(centers.tolist()):
        places = [place for place, token in enumerate(row) if token >= 0]
        for token in range(x.shape[1]):
            if token in row:
                labels[b, token] = row.index(token)
            elif places:
                labels[b, token] = min(places, key=lambda place: float(d[b, token, row[place]]))
    return labels
