"""PAINT: attention to two streams of image tokens, local and summary, is turned up inside the decoder (arXiv 2501.12206)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers
from .positions import token_mask


@dataclass(frozen=True)
class PAINT(TensorMethod):
    """PAINT (arXiv 2501.12206): raise the last row's attention to local and summary image tokens in decoder layers 2 to 31.

    Summary tokens are the upper outliers of a late encoder layer's CLS attention, local ones the top quarter of the first layer's without
    them. No token leaves: a logit z of theirs becomes z + gain * |z|.

    Args:
        alpha: gain of local tokens; beta: gain of summary tokens.
        local_ratio: share of the image tokens that are taken as local, rounded down, summary tokens then removed from them.
        first_layer: first decoder layer that is changed.

    Differs from the official code: every sample and grouped-query attention work (there, item 0 and as many key heads as query heads); the
    spatial branch, which adds nothing at its fixed ratio of 0, is left out.

    Example:
        >>> PAINT().local_count(576)
        144
    """

    title = "PAINT"
    paper = "arXiv 2501.12206"
    hook = "dec"

    alpha: float = 0.7
    beta: float = 0.3
    local_ratio: float = 0.25
    first_layer: int = 2

    def __post_init__(self) -> None:
        require_numbers(self, alpha=self.alpha, beta=self.beta, local_ratio=self.local_ratio)
        require_ints(self, first_layer=self.first_layer)
        require(0 <= self.local_ratio <= 1, self, "local_ratio must be in [0, 1]", self.local_ratio)
        require(self.first_layer >= 0, self, "first_layer must be 0 or more", self.first_layer)

    def local_count(self, patches: int) -> int:
        """Tokens that the first layer's attention names, before summary tokens are removed."""
        return int(patches * self.local_ratio)


class Streams(NamedTuple):
    """(B, N) bool each: local and summary image tokens."""

    local: Tensor
    summary: Tensor


def cls_scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, N) attention of CLS to every patch, sum over heads; query (B, H, 1, D), key (B, H, N + 1, D) with CLS first."""
    return ops.attention_scores(query, key, key_range=(1, key.shape[2]), head_reduction="sum")


def streams(first: Tensor, late: Tensor, method: PAINT) -> Streams:
    """Which tokens are local and which are summary.

    Args:
        first, late: (B, N) `cls_scores` of the encoder's first and of its second to last layer.

    Example:
        >>> late = torch.tensor([[0.1, 0.1, 0.2, 0.1, 0.2, 9.0, 0.1, 0.1]])
        >>> found = streams(torch.tensor([[0.0, 5.0, 0.0, 0.0, 0.0, 6.0, 0.0, 0.0]]), late, PAINT())
        >>> found.local.int().tolist(), found.summary.int().tolist()
        ([[0, 1, 0, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 1, 0, 0]])
    """
    summary = late > ops.tukey_fence(late)[:, None]  # as many of the largest as there are outliers: the outliers themselves
    local = token_mask(ops.select_topk(first, method.local_count(first.shape[1])), first.shape[1])
    return Streams(local & ~summary, summary)


def key_gains(found: Streams, method: PAINT, start: int, keys: int) -> Tensor:
    """(B, keys) float32 gain of every key of the decoder, whose image tokens begin at `start`.

    Example:
        >>> found = Streams(torch.tensor([[True, False]]), torch.tensor([[False, True]]))
        >>> key_gains(found, PAINT(), 1, 4)
        tensor([[0.0000, 0.7000, 0.3000, 0.0000]])
    """
    gains = method.alpha * found.local.float() + method.beta * found.summary.float()
    return torch.nn.functional.pad(gains, (start, keys - start - gains.shape[1]))


def boosted_attention(query: Tensor, key: Tensor, value: Tensor, gains: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention of the last row with its logits z turned into z + gain * |z|: (B, H, 1, Dv) in the dtype of value.

    Args:
        query: (B, H, 1, D); key: (B, Hkv, N, D); value: (B, Hkv, N, Dv); gains: (B, N) float32; visible: (B, N) bool, False = padding.

    Example:
        >>> query, key, value = torch.ones(1, 1, 1, 1), torch.tensor([[[[0.0], [1.0]]]]), torch.eye(2)[None, None]
        >>> boosted_attention(query, key, value, torch.tensor([[0.0, 1.0]]))
        tensor([[[[0.1192, 0.8808]]]])
    """
    B, H, Hkv = query.shape[0], query.shape[1], key.shape[1]
    logits = ops.attention_scores(query, key, activation="logit", query_reduction=None, head_reduction=None)
    logits = logits + gains[:, None, None] * logits.abs()
    if visible is not None:
        logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
    weights = torch.softmax(logits, -1).view(B, Hkv, H // Hkv, -1)
    return torch.matmul(weights, value.float()).view(B, H, 1, -1).to(value.dtype)
