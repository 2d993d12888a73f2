"""DivPrune: keep the subset of tokens whose nearest pair is farthest apart (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_numbers
from .views import ImageView


@dataclass(frozen=True)
class DivPrune(EncoderMethod):
    """DivPrune (arXiv 2503.02175): keep the tenth of an image's tokens that is most diverse, picked greedily by cosine distance.

    Needs neither attention nor text, so it fits any encoder. Works on the tokens as the language model gets them: after the projector, any
    resolution with its newline tokens. First the token whose nearest other is farthest, then always the one farthest from all picks.

    Args:
        ratio: share of the tokens that is kept, rounded half to even (SUBSET_RATIO; 0.098 for images: 56 of 576, 0.1 for video).

    Differs from the official code: every sample of a batch picks for itself (there, sample 0 for all); a token of norm 0 is at distance 1
    from all (there, NaN); a token is never picked twice; ties go to the lowest position.

    Example:
        >>> DivPrune().keep_count(576)
        56
    """

    title = "DivPrune"
    paper = "arXiv 2503.02175"
    scope = "stream"

    ratio: float = 0.098

    def __post_init__(self) -> None:
        require_numbers(self, ratio=self.ratio)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)

    def keep_count(self, candidates: int) -> int:
        return round(self.ratio * candidates)

    def select(self, view: ImageView) -> Tensor:
        assert view.projected is not None
        return ops.select_diverse(view.projected, self.keep_count(view.projected.shape[1]))


def nearest_distance(tokens: Tensor) -> Tensor:
    """(B, N) float32 cosine distance of every token to its nearest other one: what the first pick maximises.

    Example:
        >>> import torch
        >>> nearest_distance(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]))
        tensor([[0., 0., 1.]])
    """
    return 1 - ops.cosine_match(tokens, tokens, exclude_self=True)[0]


def keep_diverse(tokens: Tensor, k: int, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The DivPrune step: ((B, k, C) kept tokens in their order, (B, k) index ascending, -1 padded).

    Args:
        tokens: (B, N, C) image tokens, a float dtype; k: kept of each sample; candidates: (B, N) bool, False = does not compete.

    Example:
        >>> import torch
        >>> keep_diverse(torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]]), 3)[1]
        tensor([[0, 2, 3]])
    """
    require(0 <= k <= tokens.shape[1], "keep_diverse", f"k must be in [0, N={tokens.shape[1]}]", k)
    index = ops.select_diverse(tokens, k, candidates=candidates)
    return ops.gather_tokens(tokens, index), index
