"""VTC-CLS: rank patches by CLS attention summed over several encoder layers (arXiv 2412.05819)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_ints
from .views import ImageView


@dataclass(frozen=True)
class VTCCLS(EncoderMethod):
    """VTC-CLS (arXiv 2412.05819): keep the patches that CLS attends to most, summed over the encoder's layers from `first_layer` on.

    Single layers look at different regions; their plain sum is the ensemble. Tokens leave before the projector, in raster order, and the
    language model sees a normal, shorter prompt. Training free, reads no text.

    Args:
        tokens: kept per image; the README's tables use 256, 128 and 64 of 576.
        first_layer: first encoder layer of the sum, negative from the end, as the start of a Python slice; the last layer is never in.
        keep_newlines: any-resolution models: keep the newline tokens of the mosaic; the official code has no any resolution.

    Differs from the official code: the authors give no default for first_layer, the upper half of CLIP-L is ours; sums are float32 (theirs
    are in the model's dtype, off by 1e-3 in float16); ties go to the lowest patch; any batch size and any number of patches.

    Example:
        >>> VTCCLS(first_layer=20).layers(24, 22), VTCCLS(first_layer=-4).layers(24, 22)
        ((20, 21, 22), (20, 21, 22))
    """

    title = "VTC-CLS"
    paper = "arXiv 2412.05819"

    tokens: int = 256
    first_layer: int = -12
    keep_newlines: bool = False

    def __post_init__(self) -> None:
        require_ints(self, tokens=self.tokens, first_layer=self.first_layer)
        require(self.tokens >= 0, self, "tokens must be 0 or more", self.tokens)

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        chosen = tuple(range(depth)[self.first_layer : -1])
        require(len(chosen) > 0, self, f"first_layer must leave a layer before the last of {depth}", self.first_layer)
        return chosen

    def keep_count(self, candidates: int) -> int:
        return min(self.tokens, candidates)

    def select(self, view: ImageView) -> Tensor:
        patches = view.layers[0].key.shape[2] - 1
        require(self.tokens <= patches, self, f"tokens must be at most N={patches} patches", self.tokens)
        return view.topk(summed_scores([layer.query for layer in view.layers], [layer.key for layer in view.layers]))


def summed_scores(queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Attention of CLS to every patch, softmax over CLS and patches, mean over heads, sum over layers.

    Args:
        queries: one (B, H, 1, D) CLS query a layer; keys: one (B, H, N + 1, D) a layer, key 0 = CLS.

    Returns:
        (B, N) float32.

    Example:
        >>> import torch
        >>> summed_scores([torch.zeros(1, 2, 1, 4)] * 3, [torch.randn(1, 2, 5, 4)] * 3)
        tensor([[0.6000, 0.6000, 0.6000, 0.6000]])
    """
    require(
        len(queries) == len(keys) > 0, "summed_scores", "queries and keys must be as many, at least one layer", (len(queries), len(keys))
    )
    scores: Tensor | None = None
    for query, key in zip(queries, keys):
        scores = ops.attention_scores(query, key, key_range=(1, key.shape[2]), accumulate=scores)
    assert scores is not None
    return scores


def keep_patches(queries: Sequence[Tensor], keys: Sequence[Tensor], features: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The VTC-CLS step on tensors of your own encoder: (features (B, tokens, C), index (B, tokens) ascending, scores (B, N)).

    Args:
        queries, keys: as in `summed_scores`; features: (B, N, C) patches without CLS; tokens: kept per image, at most N.

    Example:
        >>> import torch
        >>> key = torch.tensor([0.0, 1.0, 3.0, 2.0]).view(1, 1, 4, 1)
        >>> keep_patches([torch.ones(1, 1, 1, 1)] * 2, [key] * 2, torch.arange(3.0).view(1, 3, 1), 2)[1]
        tensor([[1, 2]])
    """
    require(tokens <= features.shape[1], "keep_patches", f"tokens must be at most N={features.shape[1]} patches", tokens)
    scores = summed_scores(queries, keys)
    index = ops.select_topk(scores, tokens)
    return ops.gather_tokens(features, index), index, scores
