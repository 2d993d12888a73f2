"""VisPruner: half of the kept patches by CLS attention, half by diversity (arXiv 2412.01818 v2, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_ints, require_numbers
from .views import ImageView

STEP = 8  # duplicates that leave per round


@dataclass(frozen=True)
class VisPruner(EncoderMethod):
    """VisPruner (arXiv 2412.01818): keep the patches that CLS attends to most, and of the rest those that have no near duplicate.

    The rest, in order of falling attention, loses up to eight patches a round: it is split in turns into two halves, and the patches of the
    first half that resemble one of the second most leave. About (N - tokens) / 8 rounds, their sizes known beforehand: no host sync.

    Args:
        tokens: kept per image and per crop (visual_token_num).
        important: share of them chosen by attention alone (important_ratio), rounded down; 0.5 for 128 tokens, 0.75 for 64.
        keep_newlines: any-resolution models: keep the newline tokens of the mosaic; the official code has none.

    Any resolution: padding of the mosaic competes, as in the official code, and is lost where transformers cuts it off.

    Differs from the official code: an odd rest works (there, an index error); ties go to the more important patch. A last-bit difference of
    two scores may change who meets whom, and so a few of the diverse patches: the attention part is exact, the rest is not reproducible
    across implementations on every input.

    Example:
        >>> VisPruner(tokens=64, important=0.75).split()
        (48, 16)
    """

    title = "VisPruner"
    paper = "arXiv 2412.01818"
    features = ("patches",)

    tokens: int = 128
    important: float = 0.5
    keep_newlines: bool = False

    def __post_init__(self) -> None:
        require_ints(self, tokens=self.tokens)
        require_numbers(self, important=self.important)
        require(self.tokens >= 0, self, "tokens must be 0 or more", self.tokens)
        require(0 <= self.important <= 1, self, "important must be in [0, 1]", self.important)

    def select(self, view: ImageView) -> Tensor:
        assert view.patches is not None
        scores = ops.attention_scores(view.layers[0].query, view.layers[0].key, key_range=(1, view.layers[0].key.shape[2]))
        return select(scores, view.patches, self)

    def split(self) -> tuple[int, int]:
        """(patches by attention, patches by diversity)."""
        important = int(self.tokens * self.important)
        return important, self.tokens - important


def drop_duplicates(similarity: Tensor, rest: Tensor, k: int) -> Tensor:
    """Rounds of dropping what resembles another most, until k are left.

    Args:
        similarity: (B, N, N) float32; rest: (B, R) int64 unique positions, the most important first; k: 0 <= k <= R.

    Returns:
        (B, k) int64, in no particular order; all of them leave for k = 0.

    Example:
        >>> similarity = torch.tensor([[[1.0, 0.9, 0.1, 0.0], [0.9, 1.0, 0.2, 0.0], [0.1, 0.2, 1.0, 0.3], [0.0, 0.0, 0.3, 1.0]]])
        >>> drop_duplicates(similarity, torch.tensor([[0, 1, 2, 3]]), 3)
        tensor([[2, 1, 3]])
    """
    B, N = similarity.shape[:2]
    if k == 0:
        return rest[:, :0]
    flat = similarity.reshape(B, N * N)
    while rest.shape[1] > k:
        first, second = rest[:, 0::2], rest[:, 1::2]
        pairs = first[:, :, None] * N + second[:, None, :]
        nearest = flat.gather(1, pairs.flatten(1)).view(pairs.shape).amax(2)
        order = ops.select_topk(nearest, nearest.shape[1], order="score")
        rest = torch.cat([first.gather(1, order[:, min(STEP, rest.shape[1] - k) :]), second], 1)
    return rest


def select(scores: Tensor, features: Tensor, method: VisPruner) -> Tensor:
    """The patches that VisPruner keeps: (B, tokens) int64, ascending.

    Args:
        scores: (B, N) CLS attention; features: (B, N, C) patches before the projector, without CLS.

    Example:
        >>> scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
        >>> select(scores, torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [-1.0, 1.0]]]), VisPruner(tokens=3, important=0.4))
        tensor([[0, 2, 3]])
    """
    N = scores.shape[1]
    require(method.tokens <= N, "VisPruner", f"tokens must be at most N={N} patches", method.tokens)
    important, diverse = method.split()
    order = ops.select_topk(scores, N, order="score")
    rest = order[:, important:]
    if 0 < diverse < rest.shape[1]:
        rest = drop_duplicates(ops.cosine_scores(features, features, reduction=None), rest, diverse)
    return torch.cat([order[:, :important], rest[:, :diverse]], 1).sort(1).values


def keep_patches(query: Tensor, key: Tensor, features: Tensor, method: VisPruner) -> tuple[Tensor, Tensor, Tensor]:
    """The VisPruner step on tensors of your own encoder: (features (B, tokens, C), index (B, tokens) ascending, scores (B, N)).

    Args:
        query: (B, H, 1, D) CLS query; key: (B, H, N + 1, D), key 0 = CLS; features: (B, N, C) patches without CLS.

    Example:
        >>> key = torch.tensor([0.0, 1.0, 3.0, 2.0]).view(1, 1, 4, 1)
        >>> keep_patches(torch.ones(1, 1, 1, 1), key, torch.arange(3.0).view(1, 3, 1), VisPruner(tokens=1, important=1.0))[1]
        tensor([[1]])
    """
    scores = ops.attention_scores(query, key, key_range=(1, key.shape[2]))
    index = select(scores, features, method)
    return ops.gather_tokens(features, index), index, scores
