"""One drop step as pure functions of tensors, shared by every method that drops tokens inside a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .positions import on_device

IGNORE = -100  # label that the loss skips


class Pruned(NamedTuple):
    """What a drop step gives: tensors (B, K, ...), their index (B, K) with -1 on pads, float32 scores of the ranked keys."""

    tensors: tuple[Tensor, ...]
    index: Tensor  # type: ignore[assignment]
    scores: Tensor


def prune_span(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    k: int,
    span: tuple[int, int],
    *,
    normalize: str = "row",
    query_positions: Tensor | None = None,
) -> Pruned:
    """One drop step of a uniform batch, every sample with its image at `span` = (start, end): the fused hot path.

    Example:
        >>> import torch
        >>> key = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0]).view(1, 1, 5, 1)
        >>> prune_span(torch.ones(1, 1, 1, 1), key, [torch.arange(5).view(1, 5)], 2, (1, 4)).index
        tensor([[0, 1, 3, 4]])
    """
    causal = query_positions is not None
    result = ops.prune_tokens(query, key, tensors, k, key_range=span, normalize=normalize, causal=causal, query_positions=query_positions)
    return Pruned(*result)


def prune_ragged(
    query: Tensor,
    key: Tensor,
    tensors: Sequence[Tensor],
    totals: Sequence[int],
    *,
    image_mask: Tensor,
    valid_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    normalize: str = "row",
    max_length: int | None = None,
    pad_side: str = "right",
) -> Pruned:
    """One drop step where samples differ: padding, several images, other budgets, cached keys before the tokens.

    Args:
        query: (B, H, L, D) rows that rank; key: (B, Hkv, M, D), whose last N keys are the tokens.
        tensors: sequence of (B, N, ...).
        totals: tokens left of each sample, its text plus its image budget (host ints: they size the output).
        image_mask: (B, N) bool, the tokens that compete. valid_mask: (B, M) bool, True = real token; all real where None.
        query_positions: (B, L) int64, last key that a row sees, -1 = unused row.
        normalize: "row", softmax over all visible keys, or "range", over the image tokens alone.
        max_length: cut every sample after so many tokens. pad_side: where shorter samples get their -1.

    Example:
        >>> import torch
        >>> key = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0]).view(1, 1, 5, 1).expand(2, 1, 5, 1)
        >>> mask = torch.tensor([[False, True, True, True, False], [False, True, True, False, False]])
        >>> prune_ragged(torch.ones(2, 1, 1, 1), key, [mask], [4, 4], image_mask=mask).index
        tensor([[0, 1, 3, 4],
                [0, 1, 3, 4]])
    """
    N, M = image_mask.shape[1], key.shape[2]
    visible = valid_mask if normalize == "row" else torch.nn.functional.pad(image_mask, (M - N, 0))
    scores = ops.attention_scores(
        query.detach(),  # scores only select here: a graph would keep queries and keys alive for nothing
        key.detach(),
        causal=query_positions is not None,
        query_positions=query_positions,
        bias=None if visible is None else visible[:, None, None, :],
        key_range=(M - N, M),
    )
    real = None if valid_mask is None else valid_mask[:, M - N :]
    index = select_sequence(scores, image_mask, real, totals, max_length=max_length, pad_side=pad_side)
    return Pruned(ops.gather_tokens(tuple(tensors), index), index, scores)


def select_sequence(
    scores: Tensor,
    image_mask: Tensor,
    valid_mask: Tensor | None,
    totals: Sequence[int],
    *,
    max_length: int | None = None,
    pad_side: str = "right",
) -> Tensor:
    """All real text tokens plus the best image tokens of each sample, ascending: (B, max(totals)) int64, -1 on pads."""
    text = ~image_mask if valid_mask is None else valid_mask & ~image_mask
    width = max(totals)
    if min(totals) == width:
        index = ops.select_topk(scores, width, candidates=image_mask, always_keep=text)
    else:
        counts = on_device(totals, scores.device)
        index = ops.select_topk(scores, counts, max_k=width, candidates=image_mask, always_keep=text)
    if max_length is not None:
        index, totals = index[:, :max_length].contiguous(), [min(total, max_length) for total in totals]
    if pad_side == "left" and min(totals) < index.shape[1]:
        width = index.shape[1]
        empty = on_device([width - total for total in totals], index.device)
        column = torch.arange(width, device=index.device) - empty[:, None]
        index = index.gather(1, column.clamp(min=0)).masked_fill(column < 0, -1)
    return index


def answer_rows(labels: Tensor, max_rows: int, valid_mask: Tensor | None = None) -> Tensor:
    """(B, max_rows) positions of the tokens before each answer (label -100, next label real), ascending, -1 on unused slots.

    Example:
        >>> answer_rows(torch.tensor([[-100, -100, 5, 6, -100, 7]]), 3)
        tensor([[ 1,  4, -1]])
    """
    before = (labels[:, :-1] == IGNORE) & (labels[:, 1:] != IGNORE)
    if valid_mask is not None:
        before = before & valid_mask[:, :-1]
    before = torch.nn.functional.pad(before, (0, 1))
    return ops.select_topk(before.float(), max_rows, candidates=before)
