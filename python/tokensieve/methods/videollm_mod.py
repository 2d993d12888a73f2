"""VideoLLM-MoD: most vision tokens skip a layer and come back behind it (arXiv 2408.16730, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .base import DecoderMethod, Stage, require, require_ints, require_numbers
from .positions import on_device, token_mask
from .views import StageView


@dataclass(frozen=True)
class VideoLLMMoD(DecoderMethod):
    """VideoLLM-MoD (arXiv 2408.16730): in chosen layers only 20 % of each frame's tokens are computed; the others pass unchanged.

    Args:
        layers: 0-based layers that skip tokens.
        routers: a trained `Router` for each of the layers, on the device of the decoder.
        keep: share of each frame's tokens that a layer computes.

    Differs from the official code: none was published; the formulas are those of the paper's summary, and which layers skip is yours to say
    (the paper interleaves them with dense ones). int() rounds the share, at least one token of a frame is computed. Ties go to the lowest
    position.

    Example:
        >>> VideoLLMMoD().frame_count(100), VideoLLMMoD().frame_count(3)
        (20, 1)
    """

    title = "VideoLLM-MoD"
    paper = "arXiv 2408.16730"
    layers: tuple[int, ...] = ()
    keep: float = 0.2
    routers: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        require_ints(self, layers=self.layers)
        require_numbers(self, keep=self.keep)
        object.__setattr__(self, "routers", tuple(self.routers))
        require(0 < self.keep <= 1, self, "keep must be in (0, 1]", self.keep)
        require(len(self.routers) == len(self.layers), self, f"routers must hold one for each of {len(self.layers)} layers", self.routers)
        require(list(self.layers) == sorted(set(self.layers)), self, "layers must increase", self.layers)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer, until=layer + 1) for layer in self.layers)

    def frame_count(self, tokens: int) -> int:
        """Tokens of a frame of so many that a layer computes."""
        return max(int(tokens * self.keep), min(tokens, 1))

    def select(self, view: StageView) -> Tensor:
        """The best tokens of every image, frame by frame; frames may differ in size."""
        scores = self.routers[view.stage](view.hidden).float()
        _, frame = view.patches()
        frames = max((len(sample) for sample in view.runs), default=0)
        width = max((length for sample in view.runs for _, length in sample), default=0)
        kept = torch.zeros_like(view.image_mask)
        for number in range(frames):
            sizes = [self.frame_count(sample[number][1]) if number < len(sample) else 0 for sample in view.runs]
            best = ops.select_topk(scores, on_device(sizes, scores.device), max_k=width, candidates=view.image_mask & (frame == number))
            kept = kept | token_mask(best, kept.shape[1])
        return ops.select_threshold(kept.float(), 0.5, capacity=max(view.images, default=0)).index

    def restore(self, stage: int, before: Tensor, after: Tensor, image: Tensor) -> Tensor:
        """x + mu * f for image tokens, x + f for text: the router's score stays in the result, so it learns."""
        gate = torch.where(image, self.routers[stage](before), 1.0)[..., None].to(after.dtype)
        return before + gate * (after - before)


class Router(nn.Module):
    """One linear score per vision token: (B, N, C) -> (B, N).

    Example:
        >>> Router(4)(torch.randn(2, 3, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.score = nn.Linear(channels, 1, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(tokens)[..., 0]


def route(scores: Tensor, frames: int, k: int) -> Tensor:
    """The k best tokens of every frame: (B, frames * n) scores -> (B, frames * k) positions, ascending.

    Example:
        >>> route(torch.tensor([[0.1, 0.9, 0.8, 0.2]]), 2, 1)
        tensor([[1, 2]])
    """
    B, N = scores.shape
    require(frames >= 1 and N % frames == 0, "route", f"frames must divide N={N}", frames)
    index = ops.select_topk(scores.reshape(B * frames, N // frames), k).view(B, frames, k)
    return (index + torch.arange(frames, device=index.device)[:, None] * (N // frames)).flatten(1)


def mixture_of_depths(
    layer: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, scores: Tensor, index: Tensor, vision: tuple[int, int]
) -> Tensor:
    """Runs what a layer adds on the routed vision tokens and all text, and adds it back; the others pass.

    Args:
        layer: called with (B, K, C) tokens and their (B, K) positions, ascending; returns what attention and MLP add, without the residual.
        hidden: (B, N, C); scores: (B, V) of the router; index: (B, k) of `route`, among the V vision tokens.
        vision: (start, end) of the vision tokens in hidden.

    Returns:
        (B, N, C): x + mu * f for routed tokens, x + f for text, x for the rest. Differentiable in hidden and scores.

    Example:
        >>> x = torch.zeros(1, 4, 1)
        >>> mixture_of_depths(lambda t, p: t + 1, x, torch.tensor([[0.5, 2.0]]), torch.tensor([[1]]), (1, 3)).flatten()
        tensor([1., 0., 2., 1.])
    """
    start, end = vision
    B, N = hidden.shape[:2]

    def text(first: int, last: int) -> Tensor:
        return torch.arange(first, last, device=index.device).expand(B, -1)

    positions = torch.cat([text(0, start), index + start, text(end, N)], 1)
    added = layer(ops.gather_tokens(hidden, positions), positions)
    gate = scores.gather(1, index)
    weights = torch.cat([gate.new_ones(B, start), gate, gate.new_ones(B, N - end)], 1)
    return ops.scatter_tokens(hidden, positions, added, mode="add", weights=weights)
