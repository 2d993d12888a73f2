"""Text that looks at the image ranks its tokens: the scores of SparseVLM and SparseVLM+ (arXiv 2410.04417), as pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops


def rater_weights(image: Tensor, text: Tensor, text_mask: Tensor | None = None, image_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which text tokens look at the image: (share of the image's attention (B, T) float32, rater weight 0 or 1 (B, T)).

    Args:
        image: (B, N, C), text: (B, T, C) input embeddings; text_mask: (B, T), image_mask: (B, N) bool, False = padding.

    The share is softmax over the text of the plain dot products, mean over the image tokens; raters lie above the mean share.

    Example:
        >>> rater_weights(torch.ones(1, 2, 1), torch.tensor([[[0.0], [0.0], [2.0]]]))[1]
        tensor([[0., 0., 1.]])
    """
    logits = image.float() @ text.float().transpose(1, 2)  # (B, N, T), once a prompt and small: 576 x 40
    if text_mask is not None:
        logits = logits.masked_fill(~text_mask[:, None], -torch.inf)
    rows = torch.ones(image.shape[:2], device=image.device) if image_mask is None else image_mask.float()
    share = (logits.softmax(-1).nan_to_num(0) * rows[..., None]).sum(1) / rows.sum(1, keepdim=True).clamp(min=1)
    count = share.shape[1] if text_mask is None else text_mask.sum(1, keepdim=True)
    return share, (share > share.sum(1, keepdim=True) / count).float()


def rater_scores(
    query: Tensor, key: Tensor, span: tuple[int, int], weights: Tensor, positions: Tensor, visible: Tensor | None = None
) -> Tensor:
    """Mean attention of the raters to each image token: (B, end - start) float32.

    Args:
        query: (B, H, T, D) text rows, key: (B, Hkv, N, D), after RoPE, of the layer just run; span: (start, end) of the image.
        weights: (B, T) of `rater_weights`; positions: (B, T) int64, index of each text row among the keys, -1 = padding.
        visible: (B, N) bool, keys that are no padding; all where None.

    Example:
        >>> one = torch.ones(1, 1)
        >>> rater_scores(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 4, 1), (1, 3), one, 3 * one.long())
        tensor([[0.2500, 0.2500]])
    """
    bias = None if visible is None else visible[:, None, None, :]
    return ops.attention_scores(query, key, causal=True, query_positions=positions, bias=bias, key_range=span, row_weights=weights)


def distance_decay(query_ids: Tensor, key_ids: Tensor, head_dim: int, *, theta: float = 10000.0) -> Tensor:
    """What RoPE alone makes of two tokens: (B, T), (B, N) position ids -> (B, T, N) float32, the product of rotated vectors of ones.

    Example:
        >>> distance_decay(torch.tensor([[5]]), torch.tensor([[5]]), 128)
        tensor([[[11.3137]]])
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=key_ids.device).float() / head_dim)
    distance = (query_ids[:, :, None] - key_ids[:, None, :]).double()  # it is divided by, and passes through 0
    table = torch.zeros_like(distance)
    for value in frequency.tolist():  # one (T, N) plane at a time: 64 frequencies at once would be 64 times the memory
        table += torch.cos(distance * value)
    return (table * (2 / math.sqrt(head_dim))).float()


def corrected_scores(
    query: Tensor,
    key: Tensor,
    span: tuple[int, int],
    weights: Tensor,
    positions: Tensor,
    decay: Tensor,
    heads: int,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """SparseVLM+: attention divided by the distance decay, mean over the `heads` heads that look at the image most.

    Args:
        query, key, span, weights, positions, visible: as in `rater_scores`;
        decay: (B, T, end - start) of `distance_decay`; heads: at most H.

    Returns:
        (scores (B, end - start), mass per head (B, H), chosen heads (B, heads) ascending). A negative decay counts negative, as there.

    Example:
        >>> one = torch.ones(1, 1)
        >>> corrected_scores(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 4, 1), (1, 3), one, 3 * one.long(), 2 * torch.ones(1, 1, 2), 1)[0]
        tensor([[0.1250, 0.1250]])
    """
    shown = None if visible is None else visible[:, None, None, :]
    lse = ops.attention_lse(query, key, causal=True, query_positions=positions, bias=shown)
    per_head = query.new_zeros((query.shape[0], query.shape[1], span[1] - span[0]), dtype=torch.float32)
    start, end = span
    for sign in (1.0, -1.0):  # p / g = exp(logit - log |g| - lse), with the sign of g outside
        bias = torch.where(decay * sign > 0, -torch.log(decay * sign), -torch.inf)[:, None]
        bias = torch.nn.functional.pad(bias, (start, key.shape[2] - end))  # keys outside the span are not scored
        bias = bias if shown is None else bias.masked_fill(~shown, -torch.inf)
        part = ops.attention_scores(
            query,
            key,
            causal=True,
            query_positions=positions,
            bias=bias,
            lse=lse,
            key_range=span,
            row_weights=weights,
            head_reduction=None,
        )
        per_head = per_head + sign * part
    mass = per_head.sum(-1) * weights.sum(1, keepdim=True)
    chosen = ops.select_topk(mass, min(heads, mass.shape[1]))
    return ops.gather_tokens(per_head, chosen).mean(1), mass, chosen
