"""LRS: the question picks tokens of a remote-sensing picture, and tiles of the next, finer one (arXiv 2503.07588, ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_numbers
from .positions import to_device, token_mask

Pair = tuple[int, int]


@dataclass(frozen=True)
class LRS(TensorMethod):
    """LRS (arXiv 2503.07588): keep a quarter of a very large picture's tokens by the question's attention, level by level of a pyramid.

    A few distilled decoder layers (trained, not part of this) read picture and question; the last text token's attention to the level's
    tokens, softmax over them alone, ranks. The kept tokens say which tiles of the next level are encoded, until full resolution.

    Args:
        ratio: share of the tokens that are not padding which `keep_ratio` keeps, rounded down; the tokens that end rows come on top.
        threshold: `keep_threshold` keeps what lies above it after the 5 % and 95 % quantiles became 0 and 1 (0.1 in parts of the code).

    Differs from the official code: batches; ties go to the lowest position; padding never hits a tile where a mask is given.

    Example:
        >>> LRS()
        LRS(ratio=0.25, threshold=0.2)
    """

    title = "LRS"
    paper = "arXiv 2503.07588"
    hook = "enc"

    ratio: float = 0.25
    threshold: float = 0.2

    def __post_init__(self) -> None:
        require_numbers(self, ratio=self.ratio, threshold=self.threshold)
        require(0 <= self.ratio <= 1, self, "ratio must be in [0, 1]", self.ratio)
        require(0 <= self.threshold < 1, self, "threshold must be in [0, 1)", self.threshold)


def text_scores(query: Tensor, key: Tensor, span: Pair | None = None) -> Tensor:
    """Attention of the last text token to the tokens of a level, softmax over these alone, mean over heads: (B, R) float32.

    Args:
        query: (B, H, 1, D) after RoPE; key: (B, Hkv, N, D); span: (start, end) of the level's tokens, all where None.

    Example:
        >>> text_scores(torch.zeros(1, 2, 1, 4), torch.randn(1, 2, 9, 4), (2, 6))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return ops.attention_scores(query, key, key_range=span, normalize="range")


def keep_ratio(scores: Tensor, method: LRS, columns: int | None = None, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best share of the tokens, and every token that ends a row of the picture (a newline).

    Args:
        scores: (B, N); columns: tokens in a row of the picture with its newline, None = no rows; valid: (B, N) bool, False = padding.

    Returns:
        ((B, T) int64 ascending, -1 padded, (B,) int64 how many).

    Example:
        >>> keep_ratio(torch.tensor([[0.1, 0.4, 0.0, 0.3, 0.2, 0.0]]), LRS(ratio=0.4), columns=3)[0]
        tensor([[1, 2, 3, 5]])
    """
    N = scores.shape[1]
    width = int(N * method.ratio)
    if valid is None:
        best = ops.select_topk(scores, width)
    else:
        best = ops.select_topk(scores, (valid.sum(1).double() * method.ratio).long(), max_k=width, candidates=valid)
    marks = token_mask(best, N)
    rows = 0
    if columns is not None:
        require(columns > 0 and N % columns == 0, "keep_ratio", f"columns must divide N={N} tokens", columns)
        rows = N // columns
        marks = marks | to_device(torch.arange(N) % columns == columns - 1, scores.device)
    return ops.select_topk(marks.float(), min(N, width + rows), candidates=marks), marks.sum(1)


def keep_threshold(scores: Tensor, method: LRS, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens whose score, scaled by its own 5 % and 95 % quantiles, is above the threshold: (B, N) int64, -1 padded, and (B,) counts.

    Example:
        >>> keep_threshold(torch.tensor([[0.0, 1.0, 5.0, 9.0, 10.0]]), LRS(threshold=0.5))
        (tensor([[ 3,  4, -1, -1, -1]]), tensor([2]))
    """
    low, high = ops.score_quantiles(scores, (0.05, 0.95), candidates=valid).split(1, 1)
    scaled = ((scores.float() - low) / (high - low)).clamp(0, 1)
    chosen = ops.select_threshold(scaled, method.threshold, capacity=scores.shape[1], candidates=valid)
    return chosen.index, chosen.counts


def hit_tiles(index: Tensor, grid: Pair, tiles: Pair) -> tuple[Tensor, Tensor]:
    """The tiles of the next level that the kept tokens lie in: ((B, rows * columns) int64 raster numbers, -1 padded, (B,) counts).

    Args:
        index: (B, T) kept tokens, -1 = none; grid: (rows, columns) of tokens at this level; tiles: (rows, columns) of the next level.

    Example:
        >>> hit_tiles(torch.tensor([[0, 7, -1]]), (2, 4), (2, 2))
        (tensor([[ 0,  3, -1, -1]]), tensor([2]))
    """
    (rows, columns), (high, wide) = grid, tiles
    number = torch.arange(rows * columns)
    tile = to_device((number // columns * high // rows) * wide + number % columns * wide // columns, index.device)
    hit = token_mask(torch.where(index < 0, -1, tile[index.clamp(min=0)]), high * wide)
    return ops.select_topk(hit.float(), high * wide, candidates=hit), hit.sum(1)
