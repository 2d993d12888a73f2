"""DART: keep a few pivots, then what resembles each of them least (arXiv 2502.11494, EMNLP 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import DecoderMethod, Stage, require, require_ints, require_numbers
from .positions import on_device, token_mask
from .views import StageView


@dataclass(frozen=True)
class DART(DecoderMethod):
    """DART (arXiv 2502.11494): before layer 2 keep 4 image pivots and, for 8 pivots, the image tokens least similar to each.

    Args:
        layer: K, 0-based layer at whose entrance tokens leave; keys and hidden states are those of layer K - 1.
        tokens: image tokens wanted (max_num_trunction); 4 + 8 * (tokens // 8) are kept. None: take `ratio`.
        ratio: share of the image tokens that is dropped, where tokens is None.
        image_pivots, text_pivots: pivots, the tokens with the largest L1 norm of their key among the image and the text after it.

    Differs from the official code: pivots are walked image first, then text, each by falling norm; the official order is that of a CPython
    set, which `pick_different` takes as an argument. Ties go to the lowest position. Samples of a batch choose for themselves.

    Example:
        >>> DART().keep_count(0, 576), DART(tokens=None, ratio=0.85).keep_count(0, 301)
        (132, 44)
    """

    title = "DART"
    paper = "arXiv 2502.11494"
    layer: int = 2
    tokens: int | None = 128
    ratio: float = 0.778
    image_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        require_ints(self, layer=self.layer, image_pivots=self.image_pivots, text_pivots=self.text_pivots, tokens=self.tokens or 0)
        require_numbers(self, ratio=self.ratio)
        require(self.layer >= 1, self, "layer must be 1 or more, because layer - 1 ranks the tokens", self.layer)
        require(self.tokens is None or self.tokens >= 0, self, "tokens must be 0 or more", self.tokens)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)
        require(self.image_pivots >= 1, self, "image_pivots must be 1 or more", self.image_pivots)
        require(self.text_pivots >= 0, self, "text_pivots must be 0 or more", self.text_pivots)

    def per_pivot(self, n_image: int) -> int:
        """Image tokens that each pivot adds."""
        wanted = n_image * (1 - self.ratio) if self.tokens is None else self.tokens
        pivots = self.image_pivots + self.text_pivots
        return min(int(wanted // pivots), max(n_image - self.image_pivots, 0) // pivots)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(self.layer, self.layer - 1),)

    def keep_count(self, stage: int, n_full: int) -> int:
        return min(self.image_pivots, n_full) + (self.image_pivots + self.text_pivots) * self.per_pivot(n_full)

    def select(self, view: StageView) -> Tensor:
        assert view.norm is not None
        assert view.key is not None
        behind = view.image_mask.flip(1).cumsum(1).flip(1) == 0  # no image token here or later
        text = behind if view.real is None else behind & view.real
        key = view.key[:, :, view.key.shape[2] - view.hidden.shape[1] :]
        return keep_different(self, view.norm(view.hidden), key, view.image_mask, text, view.images)[0]


def key_norms(key: Tensor) -> Tensor:
    """L1 norm of every token's key over all heads: (B, Hkv, N, D) -> (B, N) float32.

    Example:
        >>> key_norms(torch.tensor([[[[1.0, -2.0]], [[3.0, 0.0]]]]))
        tensor([[6.]])
    """
    return torch.linalg.vector_norm(key, ord=1, dim=(1, 3), dtype=torch.float32)


def pick_different(hidden: Tensor, pivots: Tensor, per_pivot: Sequence[int], candidates: Tensor) -> Tensor:
    """For one pivot after another, the `per_pivot` candidates that resemble it least; a token is picked once.

    Args:
        hidden: (B, N, C) of all tokens, after the model's final norm. pivots: (B, P) int64 positions, in the order in which they choose.
        per_pivot: t of each sample (host ints); candidates: (B, N) bool, the tokens that may be picked (image tokens that are no pivots).

    Returns:
        (B, P * max(t)) int64, each pivot's picks together, ascending within a pivot, -1 padded. Ties go to the lowest position.

    Source: DART (arXiv 2502.11494, section 3).

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]])
        >>> pick_different(x, torch.tensor([[0, 2]]), [1], torch.tensor([[False, True, False, True]]))
        tensor([[3, 1]])
    """
    similarity = ops.cosine_scores(ops.gather_tokens(hidden, pivots), hidden, reduction=None)  # (B, P, N)
    picks, width = [], max(per_pivot, default=0)
    counts = None if min(per_pivot, default=0) == width else on_device(per_pivot, hidden.device)
    for pivot in range(pivots.shape[1]):
        far = -similarity[:, pivot]
        if counts is None:
            index = ops.select_topk(far, width, candidates=candidates)
        else:
            index = ops.select_topk(far, counts, max_k=width, candidates=candidates)
        candidates = candidates & ~token_mask(index, candidates.shape[1])
        picks.append(index)
    return torch.cat(picks, 1) if picks else pivots.new_empty((pivots.shape[0], 0))


def keep_different(
    method: DART,
    hidden: Tensor,
    key: Tensor,
    image_mask: Tensor,
    text_mask: Tensor,
    n_image: Sequence[int],
    *,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DART step: (kept image tokens (B, K) ascending, image pivots (B, pi) by norm, text pivots (B, pt) by norm).

    Args:
        hidden: (B, N, C) entering layer K, after the model's final norm; key: (B, Hkv, N, D) of layer K - 1.
        image_mask: (B, N) bool, the image tokens; text_mask: (B, N) bool, the tokens after the image.
        n_image: image tokens of each sample (host ints).
        order: (B, pi + pt) the order in which pivots choose; image by norm, then text by norm, where None.

    A sample with too little text lets its first image pivot choose again.

    Example:
        >>> x, key = torch.randn(1, 9, 4), torch.randn(1, 2, 9, 3)
        >>> image = torch.arange(9)[None] < 6
        >>> keep_different(DART(tokens=4, image_pivots=1, text_pivots=1), x, key, image, ~image, [6])[0].shape
        torch.Size([1, 5])
    """
    norms = key_norms(key)
    of_image = ops.select_topk(norms, method.image_pivots, candidates=image_mask, order="score")
    of_text = ops.select_topk(norms, method.text_pivots, candidates=text_mask, order="score")
    pivots = torch.cat([of_image, of_text], 1) if order is None else order
    pivots = torch.where(pivots < 0, of_image[:, :1], pivots)
    image_pivots = token_mask(of_image, image_mask.shape[1])
    picks = pick_different(hidden, pivots, [method.per_pivot(n) for n in n_image], image_mask & ~image_pivots)
    kept = image_pivots | token_mask(picks, image_mask.shape[1])
    width = max((method.keep_count(0, n) for n in n_image), default=0)
    return ops.select_topk(kept.float(), width, candidates=kept), of_image, of_text
