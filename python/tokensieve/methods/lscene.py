"""LSceneLLM: attention to coarse scene tokens opens their dense tokens to the next layer (arXiv 2412.01292, CVPR 2025): the selector."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_numbers


@dataclass(frozen=True)
class LSceneLLM(TensorMethod):
    """LSceneLLM's selector (arXiv 2412.01292): a text row sees the dense tokens of those scene tokens that it looks at in this layer.

    Args:
        threshold: of 255 times the row's min-max normalised attention; above it a scene token opens.

    Differs from the official code: rows start where you say, not where sample 0's text starts; a constant row opens nothing, by rule
    and not by NaN. Attention to the opened tokens needs a kernel with a key set per row, which is not built yet.

    Example:
        >>> LSceneLLM().threshold
        96.0
    """

    title = "LSceneLLM (selector)"
    paper = "arXiv 2412.01292"
    hook = "dec"

    threshold: float = 96.0

    def __post_init__(self) -> None:
        require_numbers(self, threshold=self.threshold)
        require(0 <= self.threshold <= 255, self, "threshold must be in [0, 255]", self.threshold)


def open_scenes(query: Tensor, key: Tensor, scene: tuple[int, int], *, threshold: float = 96.0) -> Tensor:
    """(B, L, V) bool: the scene tokens whose dense tokens a row may see in the next layer.

    Args:
        query: (B, H, L, D) the last L rows, which begin with the first text row; key: (B, Hkv, N, D), after RoPE.
        scene: (start, end) of the V scene tokens.

    Example:
        >>> import torch
        >>> open_scenes(torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1.0, 3.0, 0.0]).view(1, 1, 4, 1), (0, 3))
        tensor([[[False, False,  True]]])
    """
    scores = ops.attention_scores(query, key, causal=True, key_range=scene, query_reduction=None, head_reduction="sum")
    low, high = scores.aminmax(dim=-1, keepdim=True)
    return (scores - low) * 255 > threshold * (high - low)
