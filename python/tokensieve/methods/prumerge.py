"""PruMerge: outliers of CLS attention, each with its nearest keys folded in (arXiv 2403.15388, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_ints, require_numbers
from .damro import cls_scores
from .positions import token_mask
from .views import ImageView


@dataclass(frozen=True)
class PruMerge(EncoderMethod):
    """PruMerge (arXiv 2403.15388): keep the patches whose CLS attention is an outlier, and fold the nearest keys into each of them.

    Attention and keys are those of the encoder's LAST layer, with the heads joined to one. An outlier is above Q3 + 1.5 IQR of its image's
    scores. Each adds its 32 nearest patches (cosine of keys; outliers too, one may serve several), weighted by their raw attention. One
    token more is the weighted sum of all others. Order: falling attention, the extra token last.

    Args:
        neighbors: patches folded into each centre.
        adaptive: False keeps the share `ratio` instead of the outliers.
        ratio: share of patches, if not adaptive.

    Differs from the official code: quartiles of every image (there, of the whole batch); crops of any resolution work, each by itself, and
    patches that never reach the language model take no part; all outliers stay (there, one is lost where N * (count / N) rounds down).

    Example:
        >>> PruMerge().count(torch.tensor([[0.1, 0.1, 0.1, 0.2, 0.1, 0.9, 0.1, 0.2]]))
        tensor([1])
    """

    title = "PruMerge"
    paper = "arXiv 2403.15388"
    features = ("patches",)
    ordered = True

    neighbors: int = 32
    adaptive: bool = True
    ratio: float = 0.125

    def __post_init__(self) -> None:
        require_ints(self, neighbors=self.neighbors)
        require_numbers(self, ratio=self.ratio)
        require(self.neighbors >= 1, self, "neighbors must be 1 or more", self.neighbors)
        require(0 < self.ratio <= 1, self, "ratio must be in (0, 1]", self.ratio)

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        return (depth - 1,)

    def count(self, scores: Tensor, candidates: Tensor | None = None) -> Tensor:
        """(R,) int64 patches chosen by attention."""
        if not self.adaptive:
            return torch.full((scores.shape[0],), int(scores.shape[1] * self.ratio), device=scores.device)
        above = scores > ops.tukey_fence(scores, candidates=candidates)[:, None]
        return (above if candidates is None else above & candidates).sum(1)

    def add_centers(self, best: Tensor, count: Tensor, candidates: Tensor | None, N: int) -> Tensor:
        """The centres, of those chosen by attention: (R, T) int64, -1 padded; here none more."""
        return best

    def select(self, view: ImageView) -> Tensor:
        layer, state = view.layers[0], view.state
        scores = cls_scores(layer.query, layer.key)
        require(self.neighbors < scores.shape[1], self, f"neighbors must be below N={scores.shape[1]} patches", self.neighbors)
        centers = select(scores, self, view.candidates)
        free = ~token_mask(centers, scores.shape[1])  # the extra token takes the place of the first patch that is no centre
        free = free if view.candidates is None else free & view.candidates
        slot = free.int().argmax(1, keepdim=True).masked_fill(~free.any(1, keepdim=True), -1)
        index = torch.cat([centers, slot], 1)
        order = (index < 0).int().argsort(dim=1, stable=True)[:, : scores.shape[1]]  # pads last, the extra token behind the centres
        state["prumerge"] = centers, order, joined_keys(layer.key), scores if view.candidates is None else scores * view.candidates
        return index.gather(1, order)

    def replace(self, view: ImageView, index: Tensor) -> Tensor:
        assert view.patches is not None
        assert view.project is not None
        centers, order, keys, scores = view.state.pop("prumerge")
        return view.project(ops.gather_tokens(merge(view.patches, keys, scores, centers, self.neighbors), order))


def joined_keys(key: Tensor) -> Tensor:
    """(R, H, N + 1, D) keys, key 0 = CLS -> (R, N, H * D) of the patches."""
    return key.transpose(1, 2).flatten(2)[:, 1:]


def select(scores: Tensor, method: PruMerge, candidates: Tensor | None = None) -> Tensor:
    """The centres of each image: (R, T) int64, by falling score, then the grid's; -1 at the end of a row. No host sync.

    Args:
        scores: (R, N) CLS attention; candidates: (R, N) bool, False = is no centre.

    T is the most that is possible: N // 4 + 1 outliers, N with a grid.

    Example:
        >>> select(torch.tensor([[0.1, 0.1, 0.1, 0.2, 0.1, 0.9, 0.1, 0.2]]), PruMerge())
        tensor([[ 5, -1, -1]])
    """
    N = scores.shape[1]
    count = method.count(scores, candidates)
    most = N // 4 + 1 if method.adaptive else int(N * method.ratio)
    best = ops.select_topk(scores, count, max_k=max(min(most, N), 1), candidates=candidates, order="score")
    return method.add_centers(best, count, candidates, N)


def merge(features: Tensor, keys: Tensor, scores: Tensor, centers: Tensor, neighbors: int = 32) -> Tensor:
    """Centres with their neighbours, and one token of the rest: (R, T + 1, C), zero rows where a centre is -1.

    Args:
        features: (R, N, C) patches without CLS; keys: (R, N, D); scores: (R, N) float32 weights; centers: (R, T) int64, -1 padded.

    Example:
        >>> x, keys = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
        >>> merge(x, keys, torch.tensor([[0.5, 0.25, 0.125]]), torch.tensor([[0]]), 1).flatten()
        tensor([1.5000, 1.0000])
    """
    T, N, pads = centers.shape[1], features.shape[1], centers < 0
    unused = ops.complement_index(centers, N, capacity=N)  # in the places of pads: their rows are computed and thrown away
    fill = (torch.arange(T, device=centers.device) - (~pads).sum(1, keepdim=True)).clamp(min=0)
    merged = ops.merge_into_nearest(
        features, keys, torch.where(pads, unused.gather(1, fill), centers), weights=scores, neighbors=neighbors, mode="sum"
    )
    return torch.cat([merged.tensors.masked_fill(pads[..., None], 0), ops.fuse_dropped(features, scores, centers)], 1)


class Merged(NamedTuple):
    """Result of `keep_outliers`: (R, T + 1, C) tokens, (R, T) centres, (R, N) scores."""

    tokens: Tensor
    centers: Tensor
    scores: Tensor


def keep_outliers(query: Tensor, key: Tensor, features: Tensor, method: PruMerge) -> Merged:
    """The whole step on tensors of your own encoder.

    Args:
        query: (R, H, 1, D) CLS query of the last layer; key: (R, H, N + 1, D), key 0 = CLS; features: (R, N, C) patches.
    """
    scores = cls_scores(query, key)
    centers = select(scores, method)
    return Merged(merge(features, joined_keys(key), scores, centers, method.neighbors), centers, scores)
