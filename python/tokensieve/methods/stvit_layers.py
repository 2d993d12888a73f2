"""STViT's layers as torch modules: generate semantic tokens, refine them, recover the map (arXiv 2303.08685)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import require
from .stvit import STViT, key_windows, tile, window_maxima, windows_of


class Parts(nn.Module):
    """What every layer has: attention, then an MLP; one norm for queries and keys.

    Args:
        channels: C; heads: of the attention, a divisor of C; shortcut: add the queries to what the attention gives.
    """

    def __init__(self, channels: int, heads: int, method: STViT, *, shortcut: bool = True) -> None:
        super().__init__()
        require(channels % heads == 0, "STViT", f"heads must divide channels={channels}", heads)
        hidden = int(channels * method.mlp_ratio)
        self.heads, self.shortcut, self.method = heads, shortcut, method
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.q, self.kv, self.proj = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels))
        for name in ("gamma1", "gamma2"):
            scale = nn.Parameter(torch.full((channels,), float(method.layer_scale))) if method.layer_scale > 0 else None
            self.register_parameter(name, scale)

    def attend(self, tokens: Tensor, kv: Tensor) -> Tensor:
        """What (..., M, C) tokens gather from (..., N, 2 C) projected keys and values, before the last projection."""
        q = self.q(self.norm1(tokens)).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        k, v = kv.unflatten(-1, (2, self.heads, -1)).transpose(-2, -4).unbind(-3)
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)

    def finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer behind `attend`."""
        added = self.proj(attended)
        added = added if self.gamma1 is None else self.gamma1 * added
        out = tokens + added if self.shortcut else added
        more = self.mlp(self.norm2(out))
        return out + (more if self.gamma2 is None else self.gamma2 * more)


class Layer(Parts):
    """A transformer layer whose queries look at other tokens."""

    def forward(self, tokens: Tensor, others: Tensor) -> Tensor:
        """(..., M, C) tokens after they looked at (..., N, C) others."""
        return self.finish(tokens, self.attend(tokens, self.kv(self.norm1(others))))


class Generate(Parts):
    """Semantic tokens of every window: its maxima, after they looked at each other and at the tokens around."""

    def __init__(self, channels: int, heads: int, method: STViT) -> None:
        super().__init__(channels, heads, method, shortcut=method.shortcut)

    def seen(self, pooled: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, windows, sample ** 2 + key_window ** 2, 2 C) keys and values of each window's own maxima and the tokens around."""
        W, S = pooled.shape[1:3]
        kv = self.kv(self.norm1(torch.cat([pooled.flatten(1, 2), x], 1)))
        own = torch.arange(W * S, device=x.device).view(W, S)
        around = key_windows(grid, self.method.window, self.method.key_window, x.device) + W * S
        return kv[:, torch.cat([own, around], 1)]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h * w, C) tokens of a map, rows one after the other -> (B, tokens, C), the same way."""
        pooled = window_maxima(x, grid, self.method.window, self.method.sample)
        small, side = self.method.small(grid), self.method.sample
        return self.finish(tile(pooled, small, side), tile(self.attend(pooled, self.seen(pooled, x, grid)), small, side))


class SemanticUnit(nn.Module):
    """Generate, refine, two layers on the semantic tokens, recover.

    Example:
        >>> map, semantic = SemanticUnit(8, 2, STViT())(torch.randn(2, 196, 8), (14, 14))
        >>> map.shape, semantic.shape
        (torch.Size([2, 196, 8]), torch.Size([2, 36, 8]))
    """

    def __init__(self, channels: int, heads: int, method: STViT) -> None:
        super().__init__()
        self.method, self.generate = method, Generate(channels, heads, method)
        self.centers = nn.Parameter(torch.randn(method.centers, channels) * 0.02) if method.centers else None
        self.refine, self.local, self.mix, self.recover = (Layer(channels, heads, method) for _ in range(4))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, h * w, C) tokens of a map -> (the map again, the (B, tokens, C) semantic tokens that it was recovered from)."""
        tokens = self.generate(x, grid)
        if self.centers is not None:
            wanted = f"centers must be {tokens.shape[1]} for grid={grid}"
            require(len(self.centers) == tokens.shape[1], self.method, wanted, len(self.centers))
            tokens = tokens + self.centers
        tokens = self.refine(tokens, torch.cat([tokens, x], 1))
        small, side = self.method.small(grid), self.method.sample
        windows = windows_of(tokens, small, side)
        tokens = tile(self.local(windows, windows), small, side)
        tokens = self.mix(tokens, tokens)
        return self.recover(x, tokens), tokens
