"""ATS: adaptive token sampling by the inverse of the significance scores' distribution (arXiv 2111.15667, ECCV 2022)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .. import ops
from .base import TensorMethod, require, require_ints


@dataclass(frozen=True)
class ATS(TensorMethod):
    """ATS (arXiv 2111.15667): in blocks 3 to 11 sample patches where the cumulative significance rises, before attention is applied.

    Args:
        layers: 0-based blocks that sample.
        samples: R, points on the axis of the distribution; at most so many patches stay. None: one per patch at the start.

    Differs from the official code: no host sync (outputs have room for every sample point; there, the batch's largest count), ties go to
    the lowest position, padding is masked out of attention instead of keeping eps / N of the mass; the token budget that raises there
    (n_tokens < N) does not exist here.

    Example:
        >>> ATS(samples=98).samples
        98
    """

    title = "ATS"
    paper = "arXiv 2111.15667"
    hook = "vit"

    layers: tuple[int, ...] = tuple(range(3, 12))
    samples: int | None = None

    def __post_init__(self) -> None:
        require_ints(self, layers=self.layers, **({} if self.samples is None else {"samples": self.samples}))
        require(self.samples is None or self.samples >= 2, self, "samples must be 2 or more", self.samples)


def significance(query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
    """Significance of every patch: CLS's attention to it times the norm of its value, normalised to sum 1.

    Args:
        query: (B, H, 1, D) of CLS; key, value: (B, H, N + 1, D), token 0 = CLS; valid: (B, N + 1) bool, False = padding.

    Returns:
        (B, N) float32; 0 on padding.

    Example:
        >>> key = torch.zeros(1, 1, 3, 2)
        >>> significance(torch.ones(1, 1, 1, 2), key, torch.tensor([[[[9.0, 0.0], [3.0, 4.0], [0.0, 15.0]]]]))
        tensor([[0.2500, 0.7500]])
    """
    bias = None if valid is None else valid[:, None, None, :]
    attention = ops.attention_scores(query, key, head_reduction="sum", bias=bias, key_range=(1, key.shape[2]))
    norm = value[:, :, 1:].float().square().sum((1, 3)).sqrt()
    scores = attention * norm
    total = scores.sum(1, keepdim=True)
    return scores / total.where(total > 0, 1.0)  # all values zero: all scores zero, not NaN


def sample_tokens(scores: Tensor, samples: int, *, capacity: int | None = None) -> ops.Selection:
    """Inverse-cdf sampling: unique patches nearest to evenly spaced points of the distribution, in ascending order of their score.

    Example:
        >>> sample_tokens(torch.tensor([[0.5, 0.1, 0.4]]), 3).index
        tensor([[ 2,  0, -1]])
    """
    return ops.select_samples(scores, samples, capacity=min(samples, scores.shape[1]) if capacity is None else capacity)


def sampled_attention(
    query: Tensor, key: Tensor, value: Tensor, chosen: ops.Selection, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of CLS and the sampled patches over all keys: dropped tokens still give, they no longer ask.

    Args:
        query, key, value: (B, H, N + 1, D), token 0 = CLS; chosen: of `sample_tokens`; valid: (B, N + 1) bool.

    Returns:
        (rows (B, capacity + 1, H * D), zero on pads; index (B, capacity + 1) of all tokens, CLS = 0 first, -1 on pads).

    Example:
        >>> q = torch.zeros(1, 1, 3, 2)
        >>> sampled_attention(q, q, q + 1, ops.Selection(torch.tensor([[1, -1]]), torch.tensor([1]), torch.tensor([False])))[1]
        tensor([[ 0,  2, -1]])
    """
    patches = torch.where(chosen.index >= 0, chosen.index + 1, chosen.index)
    index = pad(patches, (1, 0))  # CLS is token 0
    rows = ops.gather_tokens(query.transpose(1, 2), index).transpose(1, 2)
    mask = None if valid is None else valid[:, None, None, :]
    out = scaled_dot_product_attention(rows, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
    return out.masked_fill(index[..., None] < 0, 0.0), index
