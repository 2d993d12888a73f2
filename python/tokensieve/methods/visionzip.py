"""VisionZip: the patches that CLS attends to, and the rest averaged into a few (arXiv 2412.04467, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .base import EncoderMethod, require, require_ints
from .fastervlm import mosaic_order
from .positions import on_device, token_mask
from .views import ImageView


@dataclass(frozen=True)
class VisionZip(EncoderMethod):
    """VisionZip (arXiv 2412.04467): keep CLS and the patches it attends to most, and merge the rest into evenly spread contextual tokens.

    Every patch of the rest joins the contextual one whose key, mean over heads, is most alike; a contextual token is its own patch plus the
    mean of those that joined. Works on features before the projector, which then sees fewer.

    Args:
        dominant: rows kept as they are, CLS among them (191; 54 with 10 contextual ones make the paper's 64 tokens).
        contextual: merged tokens of each image and crop.

    In `sieve` a crop's tokens follow each other as CLS, dominant in raster order, contextual, within the places of the crop; `pack` has the
    official order of an any-resolution image. Newlines leave, as there.

    Differs from the official code: padding of an any-resolution mosaic takes no part where transformers cuts it off, and a crop with fewer
    patches than the budget keeps what it has (there, an error); ties go to the lowest position.

    Example:
        >>> VisionZip(54, 10).split(576), VisionZip(54, 10).split(40)
        ((53, 10), (29, 10))
    """

    title = "VisionZip"
    paper = "arXiv 2412.04467"
    features = ("patches", "cls")
    ordered = True

    dominant: int = 191
    contextual: int = 30

    def __post_init__(self) -> None:
        require_ints(self, dominant=self.dominant, contextual=self.contextual)
        require(self.dominant >= 1, self, "dominant must be 1 or more, CLS", self.dominant)
        require(self.contextual >= 0, self, "contextual must be 0 or more", self.contextual)

    def keep_count(self, candidates: int) -> int:
        return min(self.dominant + self.contextual, candidates)

    def split(self, candidates: int) -> tuple[int, int]:
        """(dominant patches, contextual tokens) of so many; CLS is one more, and takes the place of a patch."""
        contextual = min(self.contextual, max(candidates - 1, 0))
        return max(min(self.dominant - 1, candidates - contextual - 1), 0), contextual

    def select(self, view: ImageView) -> Tensor:
        layer = view.layers[0]
        N, total = layer.key.shape[2] - 1, self.dominant + self.contextual
        require(total <= N, self, f"dominant + contextual must be at most N={N} patches", total)
        assert view.counts is not None  # a crop with fewer candidates than `total` has that many as its count
        zipped = choose(cls_scores(layer.query, layer.key), head_mean(layer.key), [self.split(n) for n in view.counts], view.candidates)
        taken = token_mask(torch.cat([zipped.dominant, zipped.targets], 1), N)
        free = ~taken if view.candidates is None else ~taken & view.candidates
        slot = free.int().argmax(1, keepdim=True).masked_fill(~free.any(1, keepdim=True), -1)  # CLS's; none in a crop of padding
        view.state["visionzip"] = zipped
        return torch.cat([slot, zipped.dominant, zipped.targets], 1)

    def replace(self, view: ImageView, index: Tensor) -> Tensor:
        assert view.patches is not None
        assert view.cls is not None
        assert view.project is not None
        return view.project(merge(view.cls, view.patches, view.state.pop("visionzip")))


class Zipped(NamedTuple):
    """What becomes of the patches, all int64."""

    dominant: Tensor  # (R, d) ascending, -1 on pads
    targets: Tensor  # (R, c) patches that the contextual tokens stand on, -1 on pads
    labels: Tensor  # (R, N) contextual token that each patch joins; -1 for the two above and patches that take no part


def pack(tokens: Tensor, zipped: Zipped, grid: tuple[int, int], side: tuple[int, int]) -> Tensor:
    """The official order of an any-resolution image: (T, C), thumbnail, crops' dominant patches in raster order, their CLS, contextual.

    tokens: (1 + crops, 1 + d + c, C) of `merge`, thumbnail first; grid: (wide, high) crops; side: (rows, columns) of patches in a crop.
    """
    d = zipped.dominant.shape[1]
    order = mosaic_order(zipped.dominant, grid, side)[d:]
    return torch.cat([tokens[0], tokens[:, 1 : d + 1].flatten(0, 1)[order], tokens[1:, 0], tokens[1:, d + 1 :].flatten(0, 1)])


def cls_scores(query: Tensor, key: Tensor) -> Tensor:
    """(R, N) float32 CLS attention to every patch, sum over heads; query (R, H, 1, D), key (R, H, N + 1, D) with CLS first."""
    return ops.attention_scores(query, key, head_reduction="sum", key_range=(1, key.shape[2]))


def head_mean(key: Tensor) -> Tensor:
    """(R, H, N + 1, D) keys with CLS first -> (R, N, D) float32 of the patches, mean over heads."""
    return key[:, :, 1:].float().mean(1)


def choose(scores: Tensor, metric: Tensor, splits: list[tuple[int, int]], candidates: Tensor | None = None) -> Zipped:
    """Which patches are dominant, which contextual, and where the others go.

    Args:
        scores: (R, N); metric: (R, N, D) compared by cosine; splits: (dominant, contextual) of each row; candidates: (R, N) bool.

    Example:
        >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.1]]])
        >>> choose(torch.tensor([[0.1, 0.4, 0.2, 0.3]]), metric, [(1, 2)])
        Zipped(dominant=tensor([[1]]), targets=tensor([[0, 2]]), labels=tensor([[-1, -1, -1,  0]]))
    """
    most, widest = max(d for d, _ in splits), max(c for _, c in splits)
    alike = min(splits) == max(splits)
    many = most if alike else on_device([d for d, _ in splits], scores.device)
    dominant = ops.select_topk(scores, many, max_k=None if alike else most, candidates=candidates)
    rest = ~token_mask(dominant, scores.shape[1])
    rest = rest if candidates is None else rest & candidates
    if widest == 0:
        return Zipped(dominant, dominant[:, :0], torch.full_like(rest, -1, dtype=torch.int64))
    room = on_device([c for _, c in splits], scores.device)[:, None]
    rank = rest.cumsum(1) - 1  # place in the list of the rest
    step = torch.div(rank[:, -1:] + 1, room.clamp(min=1), rounding_mode="floor").clamp(min=1)
    is_target = rest & (rank % step == 0) & (rank < step * room)
    targets = ops.select_topk(is_target.float(), widest, candidates=is_target)
    joins = ops.cosine_match(metric, ops.gather_tokens(metric, targets), candidates=targets >= 0)[1]
    return Zipped(dominant, targets, joins.masked_fill(~rest | is_target, -1))


def merge(cls: Tensor, features: Tensor, zipped: Zipped) -> Tensor:
    """(R, 1 + d + c, C): CLS, the dominant patches, the contextual tokens.

    cls: (R, C); features: (R, N, C).

    Example:
        >>> zipped = Zipped(torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[-1, -1, 0, 0]]))
        >>> merge(torch.tensor([[7.0]]), torch.tensor([[[1.0], [2.0], [3.0], [5.0]]]), zipped).flatten()
        tensor([7., 2., 5.])
    """
    means = ops.merge_by_label(features, zipped.labels, zipped.targets.shape[1])[0]
    kept = ops.gather_tokens(features, torch.cat([zipped.dominant, zipped.targets], 1))
    d = zipped.dominant.shape[1]
    return torch.cat([cls[:, None], kept[:, :d], kept[:, d:] + means], 1)
