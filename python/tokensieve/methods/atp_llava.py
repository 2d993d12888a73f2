"""ATP-LLaVA: learned thresholds per layer and sample on redundancy and on a spatial grid (arXiv 2412.00447, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .atp_thresholds import Redundancy, margin
from .base import DecoderMethod, Stage, require, require_ints, require_numbers
from .views import StageView


@dataclass(frozen=True)
class ATPLLaVA(DecoderMethod):
    """ATP-LLaVA (arXiv 2412.00447): after chosen layers keep the image tokens above either of two learned thresholds.

    Args:
        layers: 0-based layers whose attention is read and after which tokens leave; the paper uses 4, 14 and 24.
        heads: a trained `Thresholds` for each of the layers, on the device of the decoder.
        rate: share of the tokens on the uniform grid of the spatial score.
        spatial_weight: lambda: grid tokens score 1 - rate * lambda, not below 0.
        sharpness: T of the soft masks in training.

    Differs from the official code: none was published; the formulas are the paper's as an unofficial module quotes them. Logits of keys
    that causal attention hides are left out of the mean (a mean with -inf would say nothing).

    Example:
        >>> from tokensieve.methods.atp_thresholds import Thresholds
        >>> ATPLLaVA(layers=(4,), heads=(Thresholds(8),)).stages[0].layer
        5
    """

    title = "ATP-LLaVA"
    paper = "arXiv 2412.00447"
    layers: tuple[int, ...] = ()
    heads: tuple[nn.Module, ...] = ()
    rate: float = 0.25
    spatial_weight: float = 3.0
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        require_ints(self, layers=self.layers)
        require_numbers(self, rate=self.rate, spatial_weight=self.spatial_weight, sharpness=self.sharpness)
        require(0 < self.rate <= 1, self, "rate must be in (0, 1]", self.rate)
        require(self.sharpness > 0, self, "sharpness must be positive", self.sharpness)
        object.__setattr__(self, "heads", tuple(self.heads))
        require(len(self.heads) == len(self.layers), self, f"heads must hold one for each of {len(self.layers)} layers", self.heads)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer + 1, layer, rows="all") for layer in self.layers)

    def select(self, view: StageView) -> Tensor:
        """The driver reads the counts on the host, once a stage."""
        assert view.query is not None
        assert view.key is not None
        require(view.side is not None, self, "images must be one grid each", view.side)
        assert view.side is not None
        N, M = view.hidden.shape[1], view.key.shape[2]
        behind = view.image_mask.flip(1).cumsum(1).flip(1) == 0
        text = behind if view.real is None else behind & view.real
        room = max((length - images for length, images in zip(view.lengths, view.images)), default=0)
        rows = ops.select_threshold(text.float(), 0.5, capacity=room).index
        at = ops.select_threshold(view.image_mask.float(), 0.5, capacity=max(view.images, default=0)).index
        asked = ops.gather_tokens(view.query.transpose(1, 2), rows).transpose(1, 2)
        visible = view.keys_visible()
        attention = ops.attention_scores(
            asked,
            view.key,
            causal=True,
            query_positions=torch.where(rows < 0, -1, rows + M - N),
            bias=None if visible is None else visible[:, None, None, :],
            key_range=(M - N, M),
        )
        query, key = (ops.gather_tokens(x.transpose(1, 2)[:, -N:], at).transpose(1, 2) for x in (view.query, view.key))
        scores = Redundancy(own_logits(query, key), ops.gather_tokens(attention, at))
        grid = spatial_score(view.side, self.rate, self.spatial_weight).to(at.device)
        number = ops.gather_tokens(view.patches()[0], at).clamp(0, len(grid) - 1)
        valid = at >= 0
        stays = margin(scores, grid[number], self.heads[view.stage](scores, valid)) > 0
        return torch.where(stays & valid, at, -1)


def own_logits(query: Tensor, key: Tensor) -> Tensor:
    """Mean logit of every image token over the image tokens that it sees, mean over heads: (B, H, N, D), (B, Hkv, N, D) -> (B, N).

    The mean of logits is the logit of the mean key, so no N x N map is made.

    Example:
        >>> own_logits(torch.ones(1, 1, 2, 1), torch.tensor([1.0, 3.0]).view(1, 1, 2, 1))
        tensor([[1., 2.]])
    """
    seen = torch.arange(1, key.shape[2] + 1, device=key.device)[:, None]
    mean_key = (key.float().cumsum(2) / seen).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query.float() * mean_key).sum(-1).mean(1) * query.shape[-1] ** -0.5


def redundancy(query: Tensor, key: Tensor, span: tuple[int, int], text_query: Tensor, text_positions: Tensor) -> Redundancy:
    """The two scores, for samples whose images lie at the same place; differentiable.

    Args:
        query: (B, H, N, D) of the image tokens; key: (B, Hkv, M, D) of all tokens; span: (start, end) of the image among the keys.
        text_query: (B, H, T, D) text rows; text_positions: (B, T) int64, their index among the keys, -1 = padding.

    Example:
        >>> q = torch.ones(1, 1, 2, 1)
        >>> key = torch.tensor([1.0, 3.0, 0.0]).view(1, 1, 3, 1)
        >>> redundancy(q, key, (0, 2), torch.zeros(1, 1, 1, 1), torch.tensor([[2]]))
        Redundancy(own=tensor([[1., 2.]]), text=tensor([[0.3333, 0.3333]]))
    """
    start, end = span
    text = ops.attention_scores(text_query, key, causal=True, query_positions=text_positions, key_range=span)
    return Redundancy(own_logits(query, key[:, :, start:end]), text)


def spatial_score(grid: tuple[int, int], rate: float, weight: float) -> Tensor:
    """(rows * columns,) float32: max(0, 1 - rate * weight) on a uniform grid of about that share of the tokens, 0 elsewhere.

    Example:
        >>> spatial_score((3, 3), 0.25, 3.0).view(3, 3)
        tensor([[0.2500, 0.0000, 0.2500],
                [0.0000, 0.0000, 0.0000],
                [0.2500, 0.0000, 0.2500]])
    """
    stride = max(round(rate**-0.5), 1)
    score = torch.zeros(grid)
    score[::stride, ::stride] = max(0.0, 1 - rate * weight)
    return score.flatten()
