"""AIM's merging before the language model: pairs of alike tokens, several times (arXiv 2412.03248, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_ints
from .tome import capped
from .views import ImageView


@dataclass(frozen=True)
class AIMMerge(EncoderMethod):
    """AIM merging (arXiv 2412.03248): before the language model, merge every second image token into its most similar one, again and again.

    Works on the tokens as the language model gets them, after the projector, so it fits any encoder; any resolution, with newlines, as one
    sequence. Even tokens look for the most similar odd one; the r best merge, plain means, sizes are forgotten. What is left goes round
    again. Order: sources that stayed, most similar first, then the receivers. `AIM` is the paper's other half, inside the decoder.

    Args:
        r: tokens that leave in each round, at most half: 576 -> 72 in LLaVA-1.5. For video (98, 49): 196 -> 49 in every frame.

    Differs from the official code: a round of 0 tokens changes nothing (there, it fails); a norm of 0 has similarity 0; ties go to the
    lowest position.

    Example:
        >>> AIMMerge().keep_count(576), AIMMerge(r=(98, 49)).keep_count(196)
        (72, 49)
    """

    title = "AIM merging"
    paper = "arXiv 2412.03248"
    scope = "stream"
    ordered = True

    r: tuple[int, ...] = (288, 144, 72)

    def __post_init__(self) -> None:
        require_ints(self, r=self.r)
        require(min(self.r, default=0) >= 0, self, "r must be 0 or more", self.r)

    def keep_count(self, candidates: int) -> int:
        return candidates - sum(self.rounds(candidates))

    def rounds(self, tokens: int) -> tuple[int, ...]:
        """Tokens that leave in each round, of so many; at most half, with a warning the first time."""
        leave: list[int] = []
        for r in self.r:
            leave.append(capped(self, r, tokens - sum(leave), 0))
        return tuple(leave)

    def select(self, view: ImageView) -> Tensor | None:
        assert view.projected is not None
        plans = merge_rounds(view.projected, self.rounds(view.projected.shape[1]))[1]
        if not plans:
            return None
        view.state["aim_merge"] = plans
        index = plans[0].index
        for plan in plans[1:]:
            index = index.gather(1, plan.index)
        return index

    def replace(self, view: ImageView, index: Tensor) -> Tensor:
        assert view.projected is not None
        return merge_planned(view.projected, view.state.pop("aim_merge"))


def merge_rounds(tokens: Tensor, r: tuple[int, ...]) -> tuple[Tensor, list[ops.MergePlan]]:
    """Rounds of merging: ((F, N - sum(r), C), the plan of each round that merges).

    Args:
        tokens: (F, N, C), such as the frames of a video; r: tokens that leave in each round, at most half of those that are there.

    Example:
        >>> import torch
        >>> merge_rounds(torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 4.0]]]), (2,))[0]
        tensor([[[2., 0.],
                 [0., 3.]]])
    """
    plans = []
    for most in r:
        count = min(most, tokens.shape[1] // 2)
        if count > 0:
            plans.append(ops.bipartite_match(tokens.detach(), count, order="score"))
            tokens = merge_planned(tokens, plans[-1:])
    return tokens, plans


def merge_planned(tokens: Tensor, plans: list[ops.MergePlan]) -> Tensor:
    """The tokens after rounds whose plans are known: plain means, with gradients."""
    for plan in plans:
        tokens = ops.merge_tokens(tokens, plan).tensors
    return tokens
