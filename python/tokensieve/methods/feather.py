"""FEATHER: rank without positions, always keep a uniform grid, and prune twice (arXiv 2412.13180, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import DecoderMethod, Stage, require, require_ints, require_numbers
from .positions import token_mask
from .views import StageView


@dataclass(frozen=True)
class FEATHER(DecoderMethod):
    """FEATHER (arXiv 2412.13180): before layers 8 and 16 keep 30 % and then 9 % of the tokens left; a strided grid survives the first.

    Args:
        layers: 0-based layers at whose entrance tokens leave; the layer before ranks them, by queries and keys before RoPE.
        ratio: share that is dropped at a stage; stage i keeps (1 - ratio) ** (i + 1) of the image tokens that reach it.
        stride: of the grid that always survives the first stage, 0 = no grid.
        rope: rank with RoPE after all: the authors' FastV baseline.

    Differs from the official code: any grid, not only square ones; samples of a batch choose for themselves; ties go to the lowest
    position. How many tokens the first stage keeps depends on the image, so `sieve` reads the count on the host. Any-resolution mosaics
    are no single grid: they need stride=0.

    Example:
        >>> FEATHER().by_score(0, 729), FEATHER().by_score(1, 280)
        (218, 25)
    """

    title = "FEATHER"
    paper = "arXiv 2412.13180"
    layers: tuple[int, ...] = (8, 16)
    ratio: float = 0.7
    stride: int = 3
    rope: bool = False

    def __post_init__(self) -> None:
        require_ints(self, stride=self.stride, layers=self.layers)
        require_numbers(self, ratio=self.ratio)
        require(len(self.layers) > 0 and min(self.layers) >= 1, self, "layers must be 1 or more", self.layers)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)
        require(self.stride >= 0, self, "stride must be 0 or more", self.stride)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer, layer - 1, rope=self.rope) for layer in self.layers)

    def by_score(self, stage: int, n_present: int) -> int:
        """Tokens that the score keeps at a stage, of those that reach it (not of the prompt's)."""
        return int(n_present * (1 - self.ratio) ** (stage + 1))

    def select(self, view: StageView) -> Tensor:
        best = view.topk(view.scores("range"), [self.by_score(view.stage, n) for n in view.images])
        if view.stage > 0 or self.stride == 0:
            return best
        require(view.side is not None, self, "stride needs images of one grid each", view.side)
        assert view.side is not None
        number, _ = view.patches()
        row, column = number // view.side[1], number % view.side[1]
        forced = (row % self.stride == 0) & (column % self.stride == 0) & view.image_mask
        kept = token_mask(best, number.shape[1]) | forced
        return ops.select_threshold(kept.float(), 0.5, capacity=max(view.images, default=0)).index


def image_scores(query: Tensor, key: Tensor) -> Tensor:
    """Softmax over the image keys alone, mean over heads: (B, H, 1, D) last row, (B, Hkv, N, D) image keys, before RoPE -> (B, N).

    Example:
        >>> image_scores(torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 4, 2))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return ops.attention_scores(query, key)


def strided_grid(grid: tuple[int, int], stride: int) -> Tensor:
    """(rows * columns,) bool, True on every stride-th row and column of a grid of (rows, columns); all False for stride 0.

    Example:
        >>> strided_grid((3, 3), 2).view(3, 3).int()
        tensor([[1, 0, 1],
                [0, 0, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    rows, columns = grid
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    if stride > 0:
        mask[::stride, ::stride] = True
    return mask.flatten()


def keep_with_grid(scores: Tensor, k: int, forced: Tensor | None = None, *, capacity: int | None = None) -> ops.Selection:
    """The k best tokens and all forced ones, ascending.

    Args:
        scores: (B, N); k: tokens by score; forced: (B, N) or (N,) bool, kept besides; capacity: room per sample, N where None.

    Returns:
        Selection(index (B, capacity) with -1 pads, counts (B,), overflow (B,)). No host sync.

    Example:
        >>> keep_with_grid(torch.tensor([[0.1, 0.9, 0.3, 0.2]]), 1, torch.tensor([True, True, False, False])).index
        tensor([[ 0,  1, -1, -1]])
    """
    N = scores.shape[1]
    kept = token_mask(ops.select_topk(scores, k), N)
    if forced is not None:
        kept = kept | forced.to(scores.device)
    return ops.select_threshold(kept.float(), 0.5, capacity=N if capacity is None else capacity)
