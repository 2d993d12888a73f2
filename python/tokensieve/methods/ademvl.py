"""ADEM-VL: vision joins every layer through an attention without softmax that drops each row's weakest scores (arXiv 2410.17779)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from .. import ops
from .base import TensorMethod, require, require_numbers


@dataclass(frozen=True)
class ADEMVL(TensorMethod):
    """ADEM-VL (arXiv 2410.17779): add vision beside every layer's FFN by a parameter-free attention; each row drops its weakest tenth.

    The scores silu(h) silu(v + e1)^T have no scale and no softmax; the lowest of every text row are set to zero before they weigh v + e2.
    Visual tokens are never in the sequence.

    Args:
        drop: share of the visual tokens that each row drops, rounded down.
        weight: s, the factor of what is added to the layer's output.

    Differs from the official code: one order statistic per row instead of a sort; scores and sums are float32. Scores that tie with the
    lowest kept one are kept too, as there.

    Example:
        >>> ADEMVL().dropped(320), ADEMVL(drop=0.05).dropped(17)
        (32, 0)
    """

    title = "ADEM-VL"
    paper = "arXiv 2410.17779"
    hook = "dec"

    drop: float = 0.1
    weight: float = 0.1

    def __post_init__(self) -> None:
        require_numbers(self, drop=self.drop, weight=self.weight)
        require(0 <= self.drop < 1, self, "drop must be in [0, 1)", self.drop)

    def dropped(self, visual: int) -> int:
        """Visual tokens that each row drops, of so many."""
        return int(self.drop * visual)


def fusion_scores(hidden: Tensor, visual: Tensor, key_bias: Tensor) -> Tensor:
    """silu(h) silu(v + e1)^T: (B, L, N) float32.

    Args:
        hidden: (B, L, C) normed hidden states; visual: (B, N, C) projected multi-scale features times beta; key_bias: (1, N, C), e1.

    Example:
        >>> fusion_scores(torch.zeros(1, 2, 4), torch.ones(1, 3, 4), torch.zeros(1, 3, 4)).shape
        torch.Size([1, 2, 3])
    """
    query, key = silu(hidden.float())[:, None], silu(visual.float() + key_bias.float())[:, None]
    return ops.attention_scores(query, key, scale=1.0, activation="logit", query_reduction=None, head_reduction=None)[:, 0]


def drop_lowest(scores: Tensor, count: int) -> Tensor:
    """Zeroes the `count` lowest of every row; scores that tie with the lowest kept one are kept.

    Args:
        scores: (B, L, N) float32; count: 0 <= count < N.

    Example:
        >>> drop_lowest(torch.tensor([[[3.0, -1.0, 2.0, -4.0]]]), 2)
        tensor([[[3., 0., 2., 0.]]])
    """
    B, L, N = scores.shape
    require(0 <= count < max(N, 1), "drop_lowest", f"count must be in [0, N={N})", count)
    if count == 0 or scores.numel() == 0:
        return scores
    flat = scores.reshape(B * L, N)
    last = ops.select_topk(flat, N - count, order="score")[:, -1:]  # the lowest that stays
    return flat.masked_fill(flat < flat.gather(1, last), 0.0).view(B, L, N)


def fuse(hidden: Tensor, visual: Tensor, key_bias: Tensor, value_bias: Tensor, method: ADEMVL) -> Tensor:
    """What ADEM-VL adds beside an FFN, before the factor `weight`: (B, L, C) in the dtype of hidden.

    Args:
        hidden, visual, key_bias: as in `fusion_scores`; value_bias: (1, N, C), e2.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> fuse(one, one, 0 * one, one, ADEMVL())
        tensor([[[2.1378, 2.1378]]])
    """
    scores = drop_lowest(fusion_scores(hidden, visual, key_bias), method.dropped(visual.shape[1]))
    return torch.bmm(scores, visual.float() + value_bias.float()).to(hidden.dtype)
