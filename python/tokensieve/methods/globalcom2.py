"""GlobalCom2: the thumbnail says how much each crop keeps, and helps to rank its patches (arXiv 2501.05179, AAAI 2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .anyres import crop_cells, in_order, mosaic, padding_cut, shown_patches
from .base import EncoderMethod, require, require_numbers
from .positions import to_device, token_mask
from .views import ImageView

Pair = tuple[int, int]


@dataclass(frozen=True)
class GlobalCom2(EncoderMethod):
    """GlobalCom2 (arXiv 2501.05179): keep a quarter of thumbnail and crops; crops that the thumbnail's CLS attends to keep more.

    Scores are the CLS row of the encoder's LAST layer before the softmax, mean over heads. A crop's share follows a softmax over the sums
    of the thumbnail's scores in its cell; its patches are ranked by their own score plus the thumbnail's there, both divided by their norm.

    Args:
        ratio: share of tokens kept (retention_ratio); the newline tokens of the mosaic come on top.
        temperature: tau of the softmax over the crops.
        keep_newlines: keep the newline tokens of the mosaic, as the official code does.

    Differs from the official code: kept tokens of a padded mosaic go back to their own places (there, to places shifted by the padding,
    which mixes rows); every image of a prompt uses its own scores (there, the second uses the first's); ties go to the lowest patch.

    Example:
        >>> GlobalCom2(ratio=0.1)
        GlobalCom2(ratio=0.1, temperature=10.0, keep_newlines=True)
    """

    title = "GlobalCom2"
    paper = "arXiv 2501.05179"
    scope = "image"
    ordered = True  # the thumbnail's tokens by falling score

    ratio: float = 0.25
    temperature: float = 10.0
    keep_newlines: bool = True

    def __post_init__(self) -> None:
        require_numbers(self, ratio=self.ratio, temperature=self.temperature)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)
        require(self.temperature > 0, self, "temperature must be positive", self.temperature)

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        return (depth - 1,)

    def select(self, view: ImageView) -> Tensor:
        scores = cls_logits(view.layers[0].query, view.layers[0].key)
        if view.grid is None or view.image_size is None:  # no crops: the image is its own thumbnail
            return ops.select_topk(scores, int(scores.shape[1] * self.ratio), order="score")
        kept = select(scores, self, view.image_size, view.grid, view.side)
        missing = kept.crops.shape[1] - kept.thumbnail.shape[1]  # never negative: a crop may keep more than the thumbnail
        return torch.cat([torch.nn.functional.pad(kept.thumbnail, (0, missing), value=-1), kept.crops])


class Kept(NamedTuple):
    """Result of `select`: (1, T) thumbnail patches by falling score, (G, K) crop patches ascending with -1 pads, (G,) their counts."""

    thumbnail: Tensor
    crops: Tensor
    counts: Tensor


def cls_logits(query: Tensor, key: Tensor) -> Tensor:
    """(P, N) CLS logits, mean over heads, no softmax; query (P, H, 1, D), key (P, H, N + 1, D) with CLS first."""
    return ops.attention_scores(query, key, key_range=(1, key.shape[2]), activation="logit")


def crop_budgets(scores: Tensor, room: Tensor | int, method: GlobalCom2, grid: Pair, side: Pair) -> tuple[Tensor, Tensor]:
    """((G,) int64 tokens that each crop keeps, (G,) float64 share of its own tokens), no host sync.

    Args:
        scores: (1 + G, N) `cls_logits`, thumbnail first; room: (G,) int64 tokens of each crop that are not padding, or one number for all.

    Example:
        >>> crop_budgets(torch.tensor([[10.0, 0.0, 0.0, 0.0]]), 100, GlobalCom2(ratio=0.5), (2, 1), (2, 2))
        (tensor([61, 38]), tensor([0.6155, 0.3845], dtype=torch.float64))
    """
    cells = to_device(torch.nn.functional.one_hot(crop_cells(grid, side), grid[0] * grid[1]).double(), scores.device)
    richness = scores[:1].double() @ cells
    options: Any = {"cap": room if isinstance(room, int) else room[None], "ratio": method.ratio, "temperature": method.temperature}
    budget, share = ops.allocate_budget(richness, mode="adjusted", epsilon=1e-8, return_shares=True, **options)
    return budget[0], share[0]


def crop_scores(scores: Tensor, image_size: Pair, grid: Pair, side: Pair) -> tuple[Tensor, Tensor]:
    """((G, N) float32 score of every crop's patch, own plus global, 0 in the padding; (G, N) bool, what is not padding).

    Args:
        scores: (1 + G, N) `cls_logits`, thumbnail first; image_size: (width, height) of the original image.
        grid: (wide, high) crops; side: (rows, columns) of patches in a crop.
    """
    G, places = grid[0] * grid[1], mosaic(grid, side)
    require(scores.shape[0] == 1 + G, "GlobalCom2", f"scores must have a thumbnail and {G} crops", tuple(scores.shape))
    top, bottom, left, right = padding_cut(image_size, (places.shape[1], places.shape[0]))
    require(top < bottom and left < right, "GlobalCom2", f"image_size must show a patch of the {tuple(places.shape)} mosaic", image_size)
    picture = scores[:1].view(1, 1, *side)
    resized = torch.nn.functional.interpolate(picture, size=(bottom - top, right - left), mode="bilinear", align_corners=False)
    where = to_device(places[top:bottom, left:right].flatten(), scores.device)
    shared = scores.new_zeros(scores[1:].numel()).scatter(0, where, resized.flatten()).view(G, -1)
    shown = to_device(shown_patches(image_size, grid, side), scores.device)
    own = scores[1:].masked_fill(~shown, 0)
    return own / own.norm(dim=1, keepdim=True) + shared / shared.norm(dim=1, keepdim=True), shown


def select(scores: Tensor, method: GlobalCom2, image_size: Pair, grid: Pair, side: Pair) -> Kept:
    """What GlobalCom2 keeps of one image; arguments as in `crop_scores`. K is the largest count that is possible: no host sync.

    Example:
        >>> scores = torch.tensor([[4.0, 0.0, 1.0, 0.0], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
        >>> kept = select(scores, GlobalCom2(ratio=0.5), (8, 4), (2, 1), (2, 2))
        >>> kept.thumbnail, kept.crops[:, :2]
        (tensor([[0, 2]]), tensor([[ 0,  1],
                [ 0, -1]]))
    """
    G, N = scores.shape[0] - 1, scores.shape[1]
    combined, shown = crop_scores(scores, image_size, grid, side)
    counts = crop_budgets(scores, shown.sum(1), method, grid, side)[0]
    most = min(N, int(N * min(1.0, method.ratio * (2 - 1 / G))) + 1)
    crops = ops.select_topk(combined, counts, max_k=most, candidates=shown)
    return Kept(ops.select_topk(scores[:1], int(N * method.ratio), order="score"), crops, counts)


def pack(kept: Kept, method: GlobalCom2, grid: Pair, side: Pair) -> tuple[Tensor, Tensor]:
    """The order of the language model: thumbnail by falling score, then the mosaic's raster, a newline after each of its rows.

    Returns:
        (1, T) int64 positions in the flattened (P * N) patches, P * N = the newline, -1 padded at the end; (1,) how many there are.

    Example:
        >>> crops = torch.tensor([[2, 3], [0, -1]])
        >>> pack(Kept(torch.tensor([[0, 2]]), crops, torch.tensor([2, 1])), GlobalCom2(ratio=0.5), (2, 1), (2, 2))[0]
        tensor([[ 0,  2,  8, 12,  6,  7, 12, -1, -1]])
    """
    G, N = kept.crops.shape[0], side[0] * side[1]
    marks = torch.nn.functional.pad(token_mask(kept.crops, N).flatten(), (0, 1), value=True)  # the newline is always there
    lines = torch.nn.functional.pad(mosaic(grid, side), (0, 1), value=G * N).flatten()
    index, count = in_order(marks, lines, int(method.ratio * G * N) + 1 + side[0] * grid[1])  # 1: the product may round down
    crops = torch.where(index < 0, -1, index + N)
    return torch.cat([kept.thumbnail, crops], 1), count + kept.thumbnail.shape[1]
