"""TextHawk2: pooled patches as queries, several levels of the encoder as keys, 4 neighbours of a row as one token (arXiv 2410.05261)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .base import TensorMethod, require, require_ints


@dataclass(frozen=True)
class TextHawk2(TensorMethod):
    """TextHawk2 (arXiv 2410.05261): squares of patches ask the encoder's levels again, and neighbours of a row become one token.

    ReSampling: the mean of each square, through an MLP, is a query; layer l of the resampler looks at the l-th deepest level.
    ReArrangement: the results of `group` neighbours, in reading order, are joined and projected. 16 times fewer tokens.

    Args:
        pool: side of the square of patches behind a query.
        group: neighbours of a row of queries that become one token.

    Differs from the official code: there is none of the model (its repository holds data scripts), this is written from the paper's
    description. Uncertain: how many levels, where norms stand, and how positions are scaled.

    Example:
        >>> TextHawk2().tokens((16, 16))
        16
    """

    title = "TextHawk2"
    paper = "arXiv 2410.05261"
    hook = "enc"

    pool: int = 2
    group: int = 4

    def __post_init__(self) -> None:
        require_ints(self, pool=self.pool, group=self.group)
        require(self.pool >= 1, self, "pool must be 1 or more", self.pool)
        require(self.group >= 1, self, "group must be 1 or more", self.group)

    def queries(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the queries of a grid of patches."""
        h, w = grid
        fits = min(grid) > 0 and h % self.pool == 0 and w % (self.pool * self.group) == 0
        require(fits, self, f"grid must be multiples of {(self.pool, self.pool * self.group)}", grid)
        return h // self.pool, w // self.pool

    def tokens(self, grid: tuple[int, int]) -> int:
        """Tokens of a grid of patches in the end."""
        rows, columns = self.queries(grid)
        return rows * columns // self.group


def rearrange(tokens: Tensor, columns: int, group: int = 4) -> Tensor:
    """Joins `group` neighbours of a row: (B, rows * columns, C) -> (B, rows * columns / group, group * C), a view where tokens allow it.

    Example:
        >>> rearrange(torch.arange(8.0).view(1, 8, 1), 4, 2)[0]
        tensor([[0., 1.],
                [2., 3.],
                [4., 5.],
                [6., 7.]])
    """
    require(columns >= 1 and tokens.shape[1] % columns == 0, "rearrange", f"columns must divide the {tokens.shape[1]} tokens", columns)
    require(group >= 1 and columns % group == 0, "rearrange", f"group must divide columns={columns}", group)
    return tokens.unflatten(1, (-1, group)).flatten(2)


def between(table: Tensor, length: int) -> Tensor:
    """Directions of `length` places that share the (S, C) table's range: neighbours are joined along the sphere. (length, C), norm 1.

    Example:
        >>> between(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), 4).mul(100).round()
        tensor([[100.,   0.],
                [ 92.,  38.],
                [ 38.,  92.],
                [  0., 100.]])
    """
    S = len(table)
    at = ((torch.arange(length, device=table.device) + 0.5) * S / length - 0.5).clamp(0, S - 1)
    low = at.long()
    unit = F.normalize(table.float(), dim=1)
    a, b, t = unit[low], unit[(low + 1).clamp(max=S - 1)], (at - low)[:, None]
    angle = (a * b).sum(1, keepdim=True).clamp(-1 + 1e-6, 1 - 1e-6).acos()  # sin(angle) >= 1e-3: equal and opposite ones stay finite
    return F.normalize(((1 - t) * angle).sin() * a + (t * angle).sin() * b, dim=1)


class Positions(nn.Module):
    """Scalable positions: a vector for each row plus one for each column, for any grid, with learned lengths.

    Args:
        size: rows and columns of the tables.
    """

    def __init__(self, channels: int, size: int = 16) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.randn(size, channels)) for _ in range(2))
        self.scale = nn.Parameter(torch.full((2,), 0.02 * channels**0.5))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """(h * w, channels) float32 of a grid."""
        rows, columns = between(self.rows, grid[0]) * self.scale[0], between(self.columns, grid[1]) * self.scale[1]
        return (rows[:, None] + columns).flatten(0, 1)


class Compressor(nn.Module):
    """ReSampling and ReArrangement.

    Args:
        channels: C of the encoder's levels; out: width of the language model; heads: of the cross-attention; levels: layers of it.

    Example:
        >>> compress = Compressor(8, 12, heads=2, levels=3)
        >>> compress([torch.randn(2, 64, 8) for _ in range(3)], (8, 8)).shape
        torch.Size([2, 4, 12])
    """

    def __init__(self, channels: int, out: int, heads: int, levels: int, method: TextHawk2 | None = None) -> None:
        super().__init__()
        method = TextHawk2() if method is None else method
        require(channels % heads == 0, method, f"heads must divide channels={channels}", heads)
        self.method, self.heads, self.positions = method, heads, Positions(channels)
        self.propose = nn.Sequential(nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels))
        self.q, self.kv, self.proj = (
            nn.ModuleList(nn.Linear(channels, width) for _ in range(levels)) for width in (channels, 2 * channels, channels)
        )
        self.norms, self.norms_kv = (nn.ModuleList(nn.LayerNorm(channels) for _ in range(levels)) for _ in range(2))
        self.join = nn.Linear(method.group * channels, out)

    def forward(self, levels: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """(B, tokens, out) from (B, h * w, C) levels of the encoder, the deepest first, which also proposes the queries."""
        require(len(levels) == len(self.q), self.method, f"levels must be {len(self.q)}", len(levels))
        small = self.method.queries(grid)
        x = self.propose(ops.pool_grid(levels[0], grid, window=self.method.pool))
        where, there = self.positions(small).to(x.dtype), self.positions(grid).to(x.dtype)
        for level, norm, norm_kv, q, kv, proj in zip(levels, self.norms, self.norms_kv, self.q, self.kv, self.proj):
            query = q(norm(x) + where).unflatten(2, (self.heads, -1)).transpose(1, 2)
            key, value = kv(norm_kv(level) + there).unflatten(2, (2, self.heads, -1)).transpose(1, 3).unbind(2)
            x = x + proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return self.join(rearrange(x, small[1], self.method.group))
