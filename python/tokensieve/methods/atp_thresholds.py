"""The learned part of ATP-LLaVA (arXiv 2412.00447): two thresholds from the scores of a sample, soft masks and losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Redundancy(NamedTuple):
    """Scores of every image token, (B, N) float32: mean logit over the image, mean attention of the text."""

    own: Tensor
    text: Tensor


class Thresholds(nn.Module):
    """Two thresholds in (0, 1) from the mean scores of a sample: the module that is trained.

    Example:
        >>> Thresholds(8)(Redundancy(torch.zeros(2, 5), torch.zeros(2, 5))).shape
        torch.Size([2, 2])
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(2, width)
        self.heads = nn.Linear(width, 2)

    def forward(self, scores: Redundancy, valid: Tensor | None = None) -> Tensor:
        """Scores and (B, N) bool, False = padding -> (B, 2): theta of redundancy, theta of space."""
        weight = torch.ones_like(scores.own) if valid is None else valid.to(scores.own.dtype)
        means = [(score * weight).sum(1) / weight.sum(1).clamp(min=1) for score in scores]
        return torch.sigmoid(self.heads(self.embed(torch.stack(means, -1))))


def margin(scores: Redundancy, spatial: Tensor, thresholds: Tensor) -> Tensor:
    """(B, N): how far the better of the two scores is above its threshold; a token stays where it is positive.

    Example:
        >>> margin(Redundancy(torch.tensor([[1.0]]), torch.tensor([[0.0]])), torch.zeros(1), torch.tensor([[0.2, 0.5]]))
        tensor([[0.3000]])
    """
    redundant = (scores.own + scores.text) / 2
    return torch.maximum(redundant - thresholds[:, :1], spatial.to(redundant.device) - thresholds[:, 1:])


def soft_mask(scores: Redundancy, spatial: Tensor, thresholds: Tensor, sharpness: float = 10.0) -> Tensor:
    """The mask of training, in (0, 1): sigmoid of the margin times T, so the larger of the two soft masks.

    Example:
        >>> soft_mask(Redundancy(torch.zeros(1, 1), torch.zeros(1, 1)), torch.zeros(1), torch.zeros(1, 2))
        tensor([[0.5000]])
    """
    return torch.sigmoid(margin(scores, spatial, thresholds) * sharpness)


def budget_loss(masks: list[Tensor], layers: tuple[int, ...], target: float = 144.0, *, atp: float = 0.05, aim: float = 0.2) -> Tensor:
    """lambda_atp * sum of layer * kept share + lambda_target * |mean kept - target|, of soft or hard (B, N) masks.

    Example:
        >>> budget_loss([torch.ones(1, 4)], (2,), target=1.0)
        tensor(0.7000)
    """
    kept = torch.stack([mask.sum(1).mean() for mask in masks])
    share = torch.stack([mask.mean() for mask in masks])
    return atp * (share * share.new_tensor(layers)).sum() + aim * (kept.mean() - target).abs()
