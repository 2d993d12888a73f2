"""FastV: after layer K most attention on image tokens is gone, so drop most of them there, once (arXiv 2403.06764, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .base import DecoderMethod, Stage, require, require_ints, require_numbers
from .step import Pruned, prune_span


@dataclass(frozen=True)
class FastV(DecoderMethod):
    """FastV (arXiv 2403.06764): before layer 2, drop half of the image tokens, ranked by the last token's attention in layer 1.

    Queries and keys are those that layer K-1 itself computed, so no layer runs in eager mode and no attention map exists.

    Args:
        layer: K, the 0-based layer at whose entrance tokens are dropped; layer K-1 ranks them. 1 or more.
        ratio: share of the image tokens that is dropped.
        budget: how n * (1 - ratio) becomes a count: "round", Python's round half to even (the authors' transformers fork), or "floor",
            int() (their lmms-eval file).
        count: explicit number of image tokens to keep; overrides ratio and budget (fast_v_attention_rank of their LLaMA fork).
        variant: "compact" removes the dropped tokens; "mask" keeps the sequence and hides them from layers >= K (their ablation).
        rerank: with "mask", choose again at every decode step from the newest token; False freezes the prompt's choice.
        renumber: False keeps the original positions (official); True renumbers the survivors 0..len-1.
        normalize: "row", softmax over the whole row (official), or "range", over the image tokens alone (FEATHER's baseline).

    Differs from the official code: every sample of a batch ranks its own tokens (there, sample 0 ranks for all), images of one prompt share
    the budget, ties go to the lowest position. The paper's text speaks of attention from all tokens; like all published code this uses
    the last token's row.

    Example:
        >>> FastV(ratio=0.75).keep_count(0, 334), FastV(ratio=0.75, budget="floor").keep_count(0, 334), FastV(count=72).keep_count(0, 576)
        (84, 83, 72)
    """

    title = "FastV"
    paper = "arXiv 2403.06764"

    layer: int = 2
    ratio: float = 0.5
    budget: str = "round"
    count: int | None = None
    variant: str = "compact"
    rerank: bool = False
    renumber: bool = False
    normalize: str = "row"

    def __post_init__(self) -> None:
        require_ints(self, layer=self.layer, **({} if self.count is None else {"count": self.count}))
        require_numbers(self, ratio=self.ratio)
        require(self.layer >= 1, self, "layer must be 1 or more, because layer - 1 ranks the tokens", self.layer)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)
        require(self.budget in ("round", "floor"), self, "budget must be 'round' or 'floor'", self.budget)
        require(self.count is None or self.count >= 0, self, "count must be 0 or more", self.count)
        require(self.variant in ("compact", "mask"), self, "variant must be 'compact' or 'mask'", self.variant)
        require(self.normalize in ("row", "range"), self, "normalize must be 'row' or 'range'", self.normalize)
        require(not self.rerank or self.masking, self, "rerank needs variant='mask'", self.variant)
        require(not self.renumber or not self.masking, self, "renumber needs variant='compact'", self.variant)

    @property
    def masking(self) -> bool:  # type: ignore[override]
        return self.variant == "mask"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.layer - 1),)

    def keep_count(self, stage: int, n_full: int) -> int:
        if self.count is not None:
            require(self.count <= n_full or n_full == 0, self, f"count must be at most the prompt's {n_full} image tokens", self.count)
            return min(self.count, n_full)  # 0 for a text-only sample
        kept = n_full * (1 - self.ratio)
        return round(kept) if self.budget == "round" else int(kept)


def rank_and_drop(query: Tensor, key: Tensor, tensors: Sequence[Tensor], k: int, span: tuple[int, int], normalize: str = "row") -> Pruned:
    """The FastV step on tensors of your own model, every sample with its image at the same place.

    Args:
        query: (B, H, 1, D) post-RoPE query of the last token in layer K-1; key: (B, Hkv, N, D) post-RoPE keys of that layer.
        tensors: sequence of (B, N, ...), such as hidden states and position ids.
        k: image tokens to keep. span: (start, end) of the image.
        normalize: as in `FastV`.

    Returns:
        Pruned(tensors, index, scores): the index is also the position ids from layer K on; scores are (B, end - start).

    Samples whose images lie elsewhere, padding or several images: `tokensieve.methods.step.prune_ragged`.

    Example:
        >>> import torch
        >>> key = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.0]).view(1, 1, 5, 1)
        >>> rank_and_drop(torch.ones(1, 1, 1, 1), key, [torch.arange(5).view(1, 5)], 1, (1, 4)).index
        tensor([[0, 1, 4]])
    """
    return prune_span(query, key, tensors, k, span, normalize=normalize)
