"""AIM, pruning half: PageRank over a layer's attention says which visual tokens the next one may see (arXiv 2412.03248, ICCV 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import DecoderMethod, Stage, require, require_ints, require_numbers
from .positions import on_device, token_mask
from .views import StageView


@dataclass(frozen=True)
class AIM(DecoderMethod):
    """AIM's pruning (arXiv 2412.03248): from layer 14 on, each layer's PageRank takes another 12.5 % of the image tokens from the next.

    Args:
        first: 0-based layer that first prunes: with step 0.125 layer `first` leaves 87.5 % to the next one.
        step: share of the visual tokens that each further layer takes away.
        temperature: of the softmax; 0.1 sharpens the logits tenfold.
        iterations: of v <- v M.
        variant: "mask" hides tokens and lets them spread their own start mass, as the official code does; "compact" removes them.

    Differs from the official code: every sample counts its own text; the cache of `generate()` keeps its mask (there, an in-place write
    hides all visual tokens from the second decoded token on). The merging half of AIM is a method of its own.

    Example:
        >>> [AIM().rate(layer) for layer in (13, 14, 15, 20, 21, 27)]
        [1.0, 0.875, 0.75, 0.125, 0.0, 0.0]
    """

    title = "AIM (pruning)"
    paper = "arXiv 2412.03248"
    first: int = 14
    step: float = 0.125
    temperature: float = 0.1
    iterations: int = 5
    variant: str = "mask"

    def __post_init__(self) -> None:
        require_ints(self, first=self.first, iterations=self.iterations)
        require_numbers(self, step=self.step, temperature=self.temperature)
        require(self.first >= 0, self, "first must be 0 or more", self.first)
        require(0 < self.step <= 1, self, "step must be in (0, 1]", self.step)
        require(self.temperature > 0, self, "temperature must be positive", self.temperature)
        require(self.iterations >= 0, self, "iterations must be 0 or more", self.iterations)
        require(self.variant in ("mask", "compact"), self, "variant must be 'mask' or 'compact'", self.variant)

    @property
    def masking(self) -> bool:  # type: ignore[override]
        return self.variant == "mask"

    @property
    def stages(self) -> tuple[Stage, ...]:
        last = self.first + math.ceil(1 / self.step) - 1  # the first layer behind which nothing is left
        return tuple(Stage(layer + 1, layer, rows="all") for layer in range(self.first, last + 1))

    def rate(self, layer: int) -> float:
        """Share of the visual tokens that layer + 1 sees."""
        return max(0.0, 1.0 - max(0, layer - self.first + 1) * self.step)

    def keep_count(self, stage: int, n_full: int) -> int:
        return int(n_full * self.rate(self.first + stage))

    def select(self, view: StageView) -> Tensor:
        assert view.query is not None
        assert view.key is not None
        N, M = view.hidden.shape[1], view.key.shape[2]
        start = None
        if view.real is not None:  # padding has no mass to spread
            start = view.real / on_device(view.lengths, view.hidden.device)[:, None]
        mask = None if view.visible is None else view.visible[:, M - N :]
        options = {"temperature": self.temperature, "iterations": self.iterations}
        return view.topk(importance(view.query, view.key[:, :, M - N :], mask, start=start, **options))  # type: ignore[arg-type]


def importance(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    *,
    start: Tensor | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
) -> Tensor:
    """PageRank of every token over a layer's causal attention, root mean square over heads; the map is never stored.

    Args:
        query: (B, H, N, D), key: (B, Hkv, N, D), all rows, after RoPE; mask: (B, N) bool, False = no row sees this key.
        start: (B, N) float32 mass that each token begins with; 1 / N where None.

    Returns:
        (B, N) float32. Masked tokens still spread their own start mass 1 / N, as in the official code.

    Source: AIM (arXiv 2412.03248, section 3.3).

    Example:
        >>> import torch
        >>> importance(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), iterations=1)
        tensor([[0.7500, 0.2500]])
    """
    rank = ops.attention_pagerank(query, key, temperature=temperature, causal=True, mask=mask, start=start, iterations=iterations)
    return rank.square().mean(1).sqrt()


def next_mask(scores: Tensor, mask: Tensor, text: Tensor, keep: int | Tensor, *, max_keep: int | None = None) -> Tensor:
    """The keys that the next layer sees: all text, then the visible visual tokens of the highest importance.

    Args:
        scores: (B, N) importance; mask: (B, N) bool, visible now; text: (B, N) bool; keep: tokens in all, an int or (B,) with max_keep.

    Returns:
        (B, N) bool, never True where mask is not. Ties go to the lowest position.

    Example:
        >>> import torch
        >>> next_mask(torch.tensor([[0.1, 0.5, 0.4]]), torch.ones(1, 3).bool(), torch.tensor([[True, False, False]]), 2)
        tensor([[ True,  True, False]])
    """
    return token_mask(ops.select_topk(scores, keep, max_k=max_keep, candidates=mask, always_keep=text & mask), mask.shape[1])
