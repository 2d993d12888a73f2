"""FasterVLM: keep the patches that the vision encoder's CLS token attends to (arXiv 2412.01818)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_ints
from .views import ImageView


@dataclass(frozen=True)
class FasterVLM(EncoderMethod):
    """FasterVLM (arXiv 2412.01818): keep the `tokens` patches of every image and crop that CLS attends to most, in raster order.

    Scores come from the encoder layer that makes the features (second to last in LLaVA); tokens leave before the language model, which
    sees a normal, shorter prompt with contiguous positions. Training free, reads no text.

    Args:
        tokens: kept per image and per crop; the README's budgets for 576 patches are 144 (75 %), 58 (90 %) and 29 (95 %).
        keep_newlines: any-resolution models: keep the newline tokens of the mosaic; the official code has none.

    Differs from the official code: scores accumulate in float32; ties go to the lowest patch; on LLaVA-NeXT in transformers, which cuts
    padding out of the mosaic, only patches that reach the language model compete, so no budget is spent on padding.

    Example:
        >>> FasterVLM(tokens=58).keep_count(576)
        58
    """

    title = "FasterVLM"
    paper = "arXiv 2412.01818"

    tokens: int = 144
    keep_newlines: bool = False

    def __post_init__(self) -> None:
        require_ints(self, tokens=self.tokens)
        require(self.tokens >= 0, self, "tokens must be 0 or more", self.tokens)

    def keep_count(self, candidates: int) -> int:
        return min(self.tokens, candidates)  # a crop may hold fewer candidates than the budget once its padding is cut

    def select(self, view: ImageView) -> Tensor:
        layer = view.layers[0]
        require(self.tokens < layer.key.shape[2], self, f"tokens must be at most N={layer.key.shape[2] - 1} patches", self.tokens)
        return view.topk(cls_scores(layer.query, layer.key))


def cls_scores(query: Tensor, key: Tensor) -> Tensor:
    """Attention of the CLS query to every patch, softmax over CLS and patches, mean over heads.

    Args:
        query: (B, H, 1, D) CLS query; key: (B, H, N + 1, D), key 0 = CLS.

    Returns:
        (B, N) float32.

    Example:
        >>> cls_scores(torch.zeros(1, 2, 1, 4), torch.randn(1, 2, 5, 4))
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    return ops.attention_scores(query, key, key_range=(1, key.shape[2]))


def keep_patches(query: Tensor, key: Tensor, features: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The FasterVLM step on tensors of your own encoder: (features (B, tokens, C), index (B, tokens) ascending, scores (B, N)).

    Args:
        query: (B, H, 1, D) CLS query; key: (B, H, N + 1, D); features: (B, N, C) patches without CLS, before or after the projector.
        tokens: kept per image, at most N.

    Example:
        >>> key = torch.tensor([0.0, 1.0, 3.0, 2.0]).view(1, 1, 4, 1)
        >>> keep_patches(torch.ones(1, 1, 1, 1), key, torch.arange(3.0).view(1, 3, 1), 2)[1]
        tensor([[1, 2]])
    """
    require(tokens <= features.shape[1], "keep_patches", f"tokens must be at most N={features.shape[1]} patches", tokens)
    scores = cls_scores(query, key)
    index = ops.select_topk(scores, tokens)
    return ops.gather_tokens(features, index), index, scores


def crop_grid(image_size: tuple[int, int], pinpoints: Sequence[tuple[int, int]], tile: int) -> tuple[int, int]:
    """(wide, high) crops of an any-resolution image: the pinpoint that keeps most pixels, then wastes fewest; all sizes (width, height).

    Example:
        >>> crop_grid((600, 310), [(336, 672), (672, 336), (672, 672)], 336)
        (2, 1)
    """
    width, height = image_size

    def fit(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(size[0] / width, size[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - size[0] * size[1]

    best = max(pinpoints, key=fit)
    return best[0] // tile, best[1] // tile


def mosaic_order(index: Tensor, grid: tuple[int, int], side: tuple[int, int]) -> Tensor:
    """Order in which the kept tokens of a thumbnail and its crops enter the language model: thumbnail first, then the mosaic's raster.

    Args:
        index: (1 + wide * high, T) kept patches of the thumbnail (row 0) and of each crop, ascending.
        grid: (wide, high) crops; side: (rows, columns) of patches in a crop.

    Returns:
        ((1 + wide * high) * T,) int64, positions in the flattened (crops * T) list: crops of one crop row interleave by image row.

    Example:
        >>> mosaic_order(torch.tensor([[0, 3], [0, 2], [1, 2]]), (2, 1), (2, 2))
        tensor([0, 1, 2, 4, 3, 5])
    """
    wide, high = grid
    rows, columns = side
    require(index.shape[0] == 1 + wide * high, "mosaic_order", f"index must have 1 + {wide} * {high} rows", index.shape[0])
    crop = torch.arange(wide * high, device=index.device)[:, None]
    patch = index[1:]
    row = crop // wide * rows + patch // columns
    place = (row * wide + crop % wide) * columns + patch % columns
    thumbnail = torch.arange(index.shape[1], device=index.device)
    return torch.cat([thumbnail, index.shape[1] + place.flatten().argsort()])
