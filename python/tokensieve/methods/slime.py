"""SliME's router: keep the local tokens that hold most of a softmax over their similarity to the text (arXiv 2406.08487)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_numbers


@dataclass(frozen=True)
class SliME(TensorMethod):
    """SliME (arXiv 2406.08487): of all crops' tokens keep those that resemble the question most, until `top_p` of their softmax is held.

    A token's score is its cosine with every text token, added up. How many stay depends on the data: the result is padded to N, with a
    count on the device. The thumbnail is not touched. The crops' resampler is trained and not part of this.

    Args:
        top_p: the longest prefix of the falling softmax that holds at most this much stays, and one token more; 1 keeps all.
        temperature: of the softmax.

    Differs from the official code: batches; probabilities are added up in fixed point, so the cut does not depend on the order of the
    sum; ties go to the lowest position. In training, the authors add 0.1 * randn to the scores: do so between the two functions here.

    Example:
        >>> SliME(top_p=0.5)
        SliME(top_p=0.5, temperature=1.0)
    """

    title = "SliME"
    paper = "arXiv 2406.08487"
    hook = "enc"

    top_p: float = 0.95
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require_numbers(self, top_p=self.top_p, temperature=self.temperature)
        require(0 < self.top_p <= 1, self, "top_p must be in (0, 1]", self.top_p)
        require(self.temperature > 0, self, "temperature must be positive", self.temperature)


def text_scores(tokens: Tensor, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
    """Similarity of every image token to the text: (B, N) float32.

    Args:
        tokens: (B, N, C) local tokens after the projector; text: (B, L, C) embeddings of the prompt's text.
        text_mask: (B, L) bool, False = padding. With a mask the cosines are added up, without one averaged, as in the authors' code.

    Example:
        >>> tokens, text = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[3.0, 0.0], [1.0, 0.0]]])
        >>> text_scores(tokens, text), text_scores(tokens, text, torch.ones(1, 2, dtype=torch.bool))
        (tensor([[1., 0.]]), tensor([[2., 0.]]))
    """
    return ops.cosine_scores(tokens, text, reduction="mean" if text_mask is None else "sum", candidates=text_mask)


def probabilities(scores: Tensor, method: SliME) -> Tensor:
    """(B, N) float32 softmax of the scores over the tokens."""
    return torch.softmax(scores.float() / method.temperature, -1)


def select(scores: Tensor, method: SliME) -> tuple[Tensor, Tensor]:
    """The tokens that stay: ((B, N) int64 ascending, -1 padded, (B,) int64 how many).

    Example:
        >>> select(torch.tensor([[3.0, 0.0, 2.0, -1.0]]), SliME(top_p=0.8))
        (tensor([[ 0,  2, -1, -1]]), tensor([2]))
    """
    share = probabilities(scores, method)
    chosen = ops.select_mass(share, method.top_p, capacity=share.shape[1], inclusive="below", extra=1)
    return chosen.index, chosen.counts


def keep_relevant(tokens: Tensor, text: Tensor, method: SliME, text_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The SliME router: ((B, N, C) kept tokens in their order, zeros behind them, (B, N) index, (B,) how many).

    Args:
        tokens, text, text_mask: as in `text_scores`.

    Example:
        >>> tokens, text = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 0.1]]]), torch.tensor([[[3.0, 0.0]]])
        >>> keep_relevant(tokens, text, SliME(top_p=0.8, temperature=0.1))[1:]
        (tensor([[ 0,  2, -1]]), tensor([2]))
    """
    index, counts = select(text_scores(tokens, text, text_mask), method)
    return ops.gather_tokens(tokens, index), index, counts
