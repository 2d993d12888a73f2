"""HiRED: per-crop token budgets from an early encoder layer, tokens by a late one (arXiv 2408.10945, AAAI 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .anyres import crop_cells, in_order, mosaic, padding_cut
from .base import EncoderMethod, require, require_numbers
from .positions import to_device, token_mask
from .views import ImageView


@dataclass(frozen=True)
class HiRED(EncoderMethod):
    """HiRED (arXiv 2408.10945): keep 20 % of an image's tokens, shared by thumbnail and crops as an early layer's CLS attention says.

    Half of the budget goes to the thumbnail. Its patches that CLS attends to most in the first layer are counted region by region, and the
    rest is shared by these counts; each part then keeps the patches that CLS attends to most in the layer that makes the features. Tokens
    leave after the projector; the prompt holds no newline tokens.

    Args:
        rate: share of all tokens that is kept (token_budget_rate).
        alpha: share of the budget for the thumbnail; 1 - alpha of its patches are marked and counted.
        regions: "bands", what the code counts (crop p gets the p-th run of N / crops consecutive patches), or "cells", the picture of the
            paper (crop p gets its own cell of the thumbnail).
        keep_newlines: keep the newline tokens of the mosaic; the official code has none.

    Differs from the official code: packing of grids that are not square (there rows and columns are swapped, and tokens are lost); ties go
    to the lowest patch. Budgets are float32 and truncated as there, so some may be left over, and kept tokens that lie in the padding of
    the mosaic are lost as there.

    Example:
        >>> HiRED().budgets(5, 576)
        (288, 288, 288)
    """

    title = "HiRED"
    paper = "arXiv 2408.10945"
    scope = "image"

    rate: float = 0.2
    alpha: float = 0.5
    regions: str = "bands"
    keep_newlines: bool = False

    def __post_init__(self) -> None:
        require_numbers(self, rate=self.rate, alpha=self.alpha)
        require(0 <= self.rate <= 1, self, "rate must be in [0, 1]", self.rate)
        require(0 <= self.alpha <= 1, self, "alpha must be in [0, 1]", self.alpha)
        require(self.regions in ("bands", "cells"), self, "regions must be 'bands' or 'cells'", self.regions)

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        return (0, feature)

    def select(self, view: ImageView) -> Tensor:
        first, late = (cls_scores(layer.query, layer.key) for layer in view.layers)
        return select(first, late, self, view.grid, view.side).index

    def budgets(self, parts: int, patches: int) -> tuple[int, int, int]:
        """(thumbnail tokens, tokens of all crops together, thumbnail patches to mark) of `parts` crops and thumbnail."""
        if parts == 1:  # an image without crops: the LLaVA-1.5 variant
            return min(patches, int(patches * self.rate)), 0, 0
        total = int(parts * patches * self.rate)
        full = min(int(total * self.alpha), patches)
        return full, min(total - full, (parts - 1) * patches), int(patches * (1 - self.alpha))


class Kept(NamedTuple):
    """Result of `select`: (P, T) ascending patches with -1 pads, (P,) counts, the budget, (P, N) late scores, (N,) marked patches."""

    index: Tensor  # type: ignore[assignment]
    counts: Tensor
    budget: int
    scores: Tensor
    marked: Tensor


def cls_scores(query: Tensor, key: Tensor) -> Tensor:
    """(P, N) attention of CLS to every patch, SUM over heads; query (P, H, 1, D), key (P, H, N + 1, D) with CLS first."""
    return ops.attention_scores(query, key, key_range=(1, key.shape[2]), head_reduction="sum")


def select(first: Tensor, late: Tensor, method: HiRED, grid: tuple[int, int] | None = None, side: tuple[int, int] | None = None) -> Kept:
    """What HiRED keeps of one image.

    Args:
        first: (1, N) or (P, N) `cls_scores` of the first encoder layer, thumbnail first; late: (P, N), of the layer of the features.
        grid, side: (wide, high) crops and (rows, columns) of patches in a part; for regions="cells".

    Returns:
        Kept. T is the largest count that is possible, so no value is read on the host.

    Example:
        >>> late = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
        >>> select(late, late, HiRED(rate=0.5)).index.tolist()
        [[0, 1, 2], [1, 2, 3], [-1, -1, -1]]
    """
    P, N = late.shape
    full, rest, mark = method.budgets(P, N)
    if P == 1:
        index = ops.select_topk(late, full)
        return Kept(index, torch.full((1,), full, device=late.device), full, late, torch.zeros(N, dtype=torch.bool, device=late.device))
    marks = token_mask(ops.select_topk(first[:1], mark), N)
    if method.regions == "bands":
        require(N % (P - 1) == 0, "HiRED.select", f"{P - 1} crops must divide N patches", N)
        found = marks.view(P - 1, -1).sum(1)
    else:
        require(grid is not None and side is not None, "HiRED.select", "regions='cells' needs grid and side", (grid, side))
        assert grid is not None
        assert side is not None
        cells = to_device(torch.nn.functional.one_hot(crop_cells(grid, side), P - 1).T.float(), late.device)
        found = cells @ marks[0].float()
    crops = ops.allocate_budget(found.float()[None], rest, cap=N)[0]  # float32 and truncated, as the authors' are
    counts = torch.cat([torch.full((1,), full, device=late.device), crops])
    return Kept(ops.select_topk(late, counts, max_k=min(N, max(full, rest))), counts, full + rest, late, marks[0])


def pack(kept: Kept, image_size: tuple[int, int], grid: tuple[int, int], side: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The order in which an image's kept tokens enter the language model: the thumbnail's, then the mosaic's raster without its padding.

    Args:
        image_size: (width, height) of the original image; grid: (wide, high) crops; side: (rows, columns) of patches in a part.

    Returns:
        (1, T) int64 positions in the flattened (P * N) patches, -1 padded at the end, and (1,) how many there are.

    Example:
        >>> late = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
        >>> pack(select(late, late, HiRED(rate=0.5)), (8, 4), (2, 1), (2, 2))
        (tensor([[0, 1, 2, 5, 6, 7]]), tensor([6]))
    """
    P, N = kept.scores.shape
    places = mosaic(grid, side)
    require(places.numel() == (P - 1) * N, "HiRED.pack", f"grid and side must make {P - 1} crops of {N} patches", (grid, side))
    top, bottom, left, right = padding_cut(image_size, (places.shape[1], places.shape[0]))
    shown = places[top:bottom, left:right].flatten() + N
    return in_order(token_mask(kept.index, N).flatten(), torch.cat([torch.arange(N), shown]), kept.budget)
