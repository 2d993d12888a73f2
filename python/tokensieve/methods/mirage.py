"""MIRAGE: of many images, only those that a retriever finds relevant reach the language model (Visual Haystacks, arXiv 2407.13766)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers
from .positions import token_mask


@dataclass(frozen=True)
class MIRAGE(TensorMethod):
    """MIRAGE (arXiv 2407.13766): of many images keep the `top_k` that a retriever scores best, or the best one where none passes.

    Whole images leave, each already compressed to 32 tokens by a Q-Former. The retriever and the Q-Former are trained; this is the rule.

    Args:
        top_k: images kept if any scores at least `threshold`, also those below it.
        threshold: of the retriever's sigmoid score. Where no image reaches it, only the best one stays.

    Differs from the official code: fewer images than top_k are all kept (there, an error); ties go to the first image. Its comment speaks
    of min(5, n) images, its code of top_k; this follows the code.

    Example:
        >>> MIRAGE(top_k=5).width(3)
        3
    """

    title = "MIRAGE"
    paper = "arXiv 2407.13766"
    hook = "enc"

    top_k: int = 1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        require_ints(self, top_k=self.top_k)
        require_numbers(self, threshold=self.threshold)
        require(self.top_k >= 1, self, "top_k must be 1 or more", self.top_k)

    def width(self, images: int) -> int:
        """The most images that can be kept of so many."""
        return min(self.top_k, images)


def relevant_images(confidence: Tensor, method: MIRAGE, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The images that stay.

    Args:
        confidence: (B, N) retriever scores after the sigmoid, a float dtype; candidates: (B, N) bool, False = no image there.

    Returns:
        ((B, min(top_k, N)) int64 kept images in input order, -1 padded, (B, N) bool, the same as a mask).

    Example:
        >>> scores = torch.tensor([[0.2, 0.9, 0.1, 0.4], [0.2, 0.3, 0.1, 0.4]])
        >>> relevant_images(scores, MIRAGE(top_k=2))[0].tolist()
        [[1, 3], [3, -1]]
    """
    N = confidence.shape[1]
    passing = confidence >= method.threshold
    if candidates is not None:
        passing = passing & candidates
    width = method.width(N)
    k = torch.where(passing.any(1), width, min(1, width))
    index = ops.select_topk(confidence, k, max_k=width, candidates=candidates)
    return index, token_mask(index, N)


def keep_images(images: Tensor, confidence: Tensor, method: MIRAGE, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Drops the irrelevant images: ((B, min(top_k, N), T, C) blocks in input order, zeros behind the last, and their index).

    Args:
        images: (B, N, T, C) tokens of every image; confidence, candidates: as in `relevant_images`.

    Example:
        >>> keep_images(torch.arange(6.0).view(1, 3, 2, 1), torch.tensor([[0.7, 0.1, 0.8]]), MIRAGE(top_k=2))[0].flatten()
        tensor([0., 1., 4., 5.])
    """
    index, _ = relevant_images(confidence, method, candidates)
    return ops.gather_tokens(images, index), index
