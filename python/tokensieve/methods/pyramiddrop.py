"""PyramidDrop: drop image tokens in stages between decoder layers (arXiv 2410.17247, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .base import DecoderMethod, Stage, require, require_ints, require_numbers
from .positions import on_device
from .step import IGNORE, prune_ragged, prune_span


@dataclass(frozen=True)
class PyramidDrop(DecoderMethod):
    """PyramidDrop (arXiv 2410.17247): before layers 8, 16 and 24 keep 50, 25 and 12.5 % of the image tokens.

    The prompt's last token ranks them with the query and key projections of the layer about to run; in training (labels given) the token
    before every answer ranks, and labels are shortened with the sequence. Works at inference without training, and in training.

    Args:
        layers: 1-based counts as in the official layer_list: tokens leave after so many layers have run.
        keep: share of the ORIGINAL image tokens that is left after each stage, truncated to an integer as int(n * share).
        renumber: give the survivors positions 0..len-1 (official); False keeps their original positions (as FastV).
        normalize: "row", softmax over the whole row (official), or "range", over the image tokens alone.
        max_length: cut samples after so many tokens once dropped; the official code uses the tokenizer's limit, 2048 where it has none.
            None here: a long prompt never loses its question in silence.

    Differs from the official code: scores come from a fused kernel (float32 accumulation, no attention map, no v_proj); ties go to the
    lowest position; eager, padded batches, grouped-query attention, batched decode, several images (they share one budget) all work.

    Example:
        >>> [PyramidDrop().keep_count(stage, 576) for stage in range(3)]
        [288, 144, 72]
    """

    title = "PyramidDrop"
    paper = "arXiv 2410.17247"
    answers_rank = True

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    renumber: bool = True
    normalize: str = "row"
    max_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "keep"):
            values: Any = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise TypeError(f"tokensieve.PyramidDrop: {name} must be a sequence, one value a stage, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        require_ints(self, layers=self.layers)
        require_numbers(self, **{f"keep[{i}]": share for i, share in enumerate(self.keep)})
        require_ints(self, **({} if self.max_length is None else {"max_length": self.max_length}))
        require(len(self.layers) > 0 and min(self.layers) >= 1, self, "layers must be 1 or more", self.layers)
        require(list(self.layers) == sorted(set(self.layers)), self, "layers must increase", self.layers)
        require(len(self.keep) == len(self.layers), self, f"keep must have one share for each of {len(self.layers)} layers", self.keep)
        require(all(0 <= share <= 1 for share in self.keep), self, "keep must hold shares in [0, 1]", self.keep)
        require(list(self.keep) == sorted(self.keep, reverse=True), self, "keep must not increase", self.keep)
        require(self.normalize in ("row", "range"), self, "normalize must be 'row' or 'range'", self.normalize)
        require(self.max_length is None or self.max_length > 0, self, "max_length must be positive or None", self.max_length)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer, layer) for layer in self.layers)

    def keep_count(self, stage: int, n_full: int) -> int:
        return int(n_full * self.keep[stage])


class Dropped(NamedTuple):
    """Result of `rank_and_drop`: right-padded tensors with zeros (labels -100, positions 0), lengths per sample, index and scores."""

    features: Tensor
    position_ids: Tensor
    labels: Tensor | None
    lengths: list[int]
    index: Tensor  # type: ignore[assignment]
    scores: Tensor


def rank_and_drop(
    query: Tensor,
    key: Tensor,
    features: Tensor,
    *,
    image_start: Sequence[int],
    image_count: Sequence[int],
    keep: Sequence[int],
    lengths: Sequence[int],
    query_positions: Tensor | None = None,
    labels: Tensor | None = None,
    normalize: str = "row",
    max_length: int | None = None,
) -> Dropped:
    """One PyramidDrop stage on right-padded tensors of your own model.

    Args:
        query: (B, H, T, D) post-RoPE queries of the ranking rows; key: (B, Hkv, N, D) post-RoPE keys of all tokens.
        features: (B, N, C) hidden states that enter the layer; labels: (B, N) int, -100 = ignored.
        image_start, image_count: first image token and image tokens of each sample; a start of -1 marks a text-only sample.
        keep: image tokens to keep of each sample; lengths: real tokens of each sample.
        query_positions: (B, T) int64 position of each ranking row, -1 = unused; the last real token of each sample where None.
        normalize, max_length: as in `PyramidDrop`.

    Returns:
        Dropped, with scores (B, max(image_count)). A sample without ranking rows is for the caller to pass unchanged: keep = image_count.

    Example:
        >>> key = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0]).view(1, 1, 5, 1)
        >>> step = rank_and_drop(torch.ones(1, 1, 1, 1), key, torch.arange(5.0).view(1, 5, 1),
        ...                      image_start=[1], image_count=[3], keep=[2], lengths=[5])
        >>> step.index, step.position_ids
        (tensor([[0, 1, 3, 4]]), tensor([[0, 1, 2, 3]]))
    """
    B, N = features.shape[:2]
    counts = [0 if start < 0 else count for start, count in zip(image_start, image_count)]
    kept = [wanted if count else 0 for wanted, count in zip(keep, counts)]  # a text-only sample has nothing to keep
    totals = [length - count + k for length, count, k in zip(lengths, counts, kept)]
    if query_positions is None:
        query_positions = on_device([length - 1 for length in lengths], features.device)[:, None]
    tensors = [features] if labels is None else [features, labels]
    same = len({*zip(image_start, counts, kept, lengths)}) == 1
    if same and lengths[0] == N and counts[0] > 0 and (max_length is None or totals[0] <= max_length):
        span = (image_start[0], image_start[0] + counts[0])
        step = prune_span(query, key, tensors, kept[0], span, normalize=normalize, query_positions=query_positions)
        scores = step.scores
    else:
        column = torch.arange(N, device=features.device)
        first = on_device(image_start, features.device)[:, None]
        image = (column >= first) & (column < first + on_device(counts, features.device)[:, None])
        valid = column < on_device(lengths, features.device)[:, None]
        options: Any = {"query_positions": query_positions, "normalize": normalize, "max_length": max_length}
        step = prune_ragged(query, key, tensors, totals, image_mask=image, valid_mask=valid, **options)
        scores = ops.gather_tokens(step.scores, ops.select_topk(step.scores, max(counts), candidates=image))
    left = step.index < 0
    positions = torch.arange(step.index.shape[1], device=features.device).expand(B, -1).masked_fill(left, 0)
    new_labels = None if labels is None else step.tensors[1].masked_fill(left, IGNORE)
    new_lengths = [total if max_length is None else min(total, max_length) for total in totals]
    return Dropped(step.tensors[0], positions, new_labels, new_lengths, step.index, scores)
