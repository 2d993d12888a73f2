"""PVC: images as short still videos, causal attention over frames, a few tokens a frame (arXiv 2412.09613, CVPR 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .base import TensorMethod, require, require_ints


@dataclass(frozen=True)
class PVC(TensorMethod):
    """PVC (arXiv 2412.09613): every frame becomes few tokens, each adding what the frames before it lack; an image is shown 4 times.

    In the last blocks of the encoder each patch looks at its own place in the frames so far. The projector folds squares of patches into
    one and is told which frame it sees.

    Args:
        repeats: frames that an image becomes; a video's frame comes once.
        block: side of the square of patches that become one token: 32 x 32 patches -> 64 tokens.

    Differs from the official code: it was not at hand (it lies in the checkpoint alone), this is written from the paper's description.
    Uncertain: 4 repeats and 4 x 4 squares, which blocks attend over time, the width of the frame's embedding.

    Example:
        >>> PVC().tokens((32, 32)), PVC().tokens((32, 32), frames=64)
        (256, 4096)
    """

    title = "PVC"
    paper = "arXiv 2412.09613"
    hook = "enc"

    repeats: int = 4
    block: int = 4

    def __post_init__(self) -> None:
        require_ints(self, repeats=self.repeats, block=self.block)
        require(self.repeats >= 1, self, "repeats must be 1 or more", self.repeats)
        require(self.block >= 1, self, "block must be 1 or more", self.block)

    def tokens(self, grid: tuple[int, int], frames: int | None = None) -> int:
        """Tokens of a video of so many frames, of (rows, columns) patches each; None: of an image."""
        require(not any(n % self.block for n in grid), self, f"grid must be multiples of block={self.block}", grid)
        return (self.repeats if frames is None else frames) * (grid[0] // self.block) * (grid[1] // self.block)

    def video(self, image: Tensor) -> Tensor:
        """(B, N, C) patches or (B, 3, H, W) pixels of an image -> (B, repeats, ...), a view."""
        return image[:, None].expand(-1, self.repeats, *image.shape[1:])


def frame_indices(start: int, end: int, segments: int) -> list[int]:
    """The middle frame of each of so many equal parts of the frames from start to end.

    Example:
        >>> frame_indices(0, 99, 4)
        [12, 37, 62, 86]
    """
    require(segments >= 1, "frame_indices", "segments must be 1 or more", segments)
    require(start <= end, "frame_indices", f"end must be at least start={start}", end)
    part = (end - start) / segments
    return [int(start + part / 2 + round(part * i)) for i in range(segments)]


def frame_embedding(frames: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """(frames, channels) float32 cosines and sines of the frames' numbers, periods from 2 pi to 20000 pi.

    Example:
        >>> frame_embedding(2, 4)
        tensor([[1.0000, 1.0000, 0.0000, 0.0000],
                [0.5403, 0.9999, 0.8415, 0.0100]])
    """
    require(channels % 2 == 0, "frame_embedding", "channels must be even", channels)
    half = channels // 2
    rate = torch.exp(torch.arange(half, device=device) * (-math.log(10000.0) / half))
    angle = torch.arange(frames, device=device)[:, None] * rate
    return torch.cat([angle.cos(), angle.sin()], 1)


class TemporalAttention(nn.Module):
    """Every patch looks at the same place in its own frame and those before it; a gate from 0 adds it to a trained encoder.

    Example:
        >>> x = torch.randn(1, 4, 9, 8)
        >>> torch.equal(TemporalAttention(8, 2)(x), x)  # before training
        True
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        require(channels % heads == 0, "TemporalAttention", f"heads must divide channels={channels}", heads)
        self.heads, self.norm = heads, nn.LayerNorm(channels)
        self.q, self.k, self.v, self.proj = (nn.Linear(channels, channels) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, N, C) -> the same shape. Positions count as heads, so that nothing is transposed in memory."""
        B, T, N, C = x.shape
        known = self.norm(x)
        q, k, v = (part(known).view(B, T, N * self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.gate.tanh() * self.proj(out.transpose(1, 2).reshape(B, T, N, C))


class AdaptiveCompression(nn.Module):
    """Squares of patches as one token, normalised with a scale and a shift of the frame's number, through an MLP.

    Args:
        channels: C of the patches; out: width of the language model; embedding: width of the frame's number, even.

    Example:
        >>> AdaptiveCompression(8, 12)(torch.randn(2, 4, 64, 8), (8, 8)).shape
        torch.Size([2, 4, 4, 12])
    """

    def __init__(self, channels: int, out: int, method: PVC | None = None, embedding: int = 256) -> None:
        super().__init__()
        self.method, self.embedding = PVC() if method is None else method, embedding
        wide = channels * self.method.block**2
        self.norm = nn.LayerNorm(wide, elementwise_affine=False)
        last = nn.Linear(embedding, 2 * wide)
        nn.init.zeros_(last.weight)  # every frame alike at first
        nn.init.zeros_(last.bias)
        self.time = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), last)
        self.mlp = nn.Sequential(nn.Linear(wide, out), nn.GELU(), nn.Linear(out, out))

    def forward(self, frames: Tensor, grid: tuple[int, int], first: int = 0) -> Tensor:
        """(B, T, h * w, C) -> (B, T, tokens, out); first: number of the first frame, where a video comes in parts."""
        T = frames.shape[1]
        folded = ops.space_to_depth(frames.flatten(0, 1), grid, self.method.block).unflatten(0, (-1, T))
        known = frame_embedding(first + T, self.embedding, frames.device)[first:]
        scale, shift = self.time(known.to(frames.dtype))[:, None].chunk(2, -1)
        return self.mlp(self.norm(folded) * (1 + scale) + shift)
