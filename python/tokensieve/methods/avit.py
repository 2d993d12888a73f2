"""A-ViT: adaptive computation time per token; channel 0 of each token says when it halts (arXiv 2112.07658, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_numbers


@dataclass(frozen=True)
class AViT(TensorMethod):
    """A-ViT (arXiv 2112.07658): every token adds up its halting probabilities over the blocks and stops when they reach 1 - eps.

    Args:
        gate_scale, gate_center: of the halting probability sigmoid(gate_scale * x[0] - gate_center). README training: 10, and 30 for the
            tiny or 75 for the small model.
        eps: a token stops once its sum is above 1 - eps.

    Differs from the official code: a sum of exactly 1 - eps stops the token (there it falls into neither branch and is lost). `run_alive`
    really skips halted tokens, which the release only masks. The halting prior's loss averages over tokens, not over samples 1..B-1.

    Example:
        >>> AViT().gate_scale
        10.0
    """

    title = "A-ViT"
    paper = "arXiv 2112.07658"
    hook = "vit"

    gate_scale: float = 10.0
    gate_center: float = 30.0
    eps: float = 0.01

    def __post_init__(self) -> None:
        require_numbers(self, gate_scale=self.gate_scale, gate_center=self.gate_center, eps=self.eps)
        require(0 < self.eps < 1, self, "eps must be in (0, 1)", self.eps)

    def halting(self, output: Tensor, last: bool) -> Tensor:
        """(B, N, C) block output -> (B, N) halting probability; 1 in the last block."""
        gated = torch.sigmoid(self.gate_scale * output[..., 0] - self.gate_center)
        return torch.ones_like(gated) if last else gated


class Halting(NamedTuple):
    """Running state of every token, each (B, N) but `output` (B, N, C): the weighted sum of block outputs so far."""

    output: Tensor
    cumulative: Tensor
    remainder: Tensor
    alive: Tensor  # 1.0 while the token runs
    ponder: Tensor  # blocks so far plus the remainder at the halt: its mean is the ponder loss
    counter: Tensor  # blocks that the token takes part in


def start(tokens: Tensor) -> Halting:
    """The state before block 0.

    Example:
        >>> start(torch.zeros(1, 2, 3)).remainder
        tensor([[1., 1.]])
    """
    ones = tokens.new_ones(tokens.shape[:2])
    return Halting(torch.zeros_like(tokens), 0 * ones, ones, ones, 0 * ones, ones)


def update(state: Halting, output: Tensor, halting: Tensor, *, eps: float = 0.01) -> Halting:
    """The state after a block. Differentiable in everything but the comparison.

    Args:
        output: (B, N, C) block output; what it holds for halted tokens is not used. halting: (B, N) probabilities of this block.

    Example:
        >>> one = update(start(torch.zeros(1, 2, 1)), torch.ones(1, 2, 1), torch.tensor([[0.4, 1.0]]))
        >>> one.output.flatten(), one.alive, one.counter
        (tensor([0.4000, 1.0000]), tensor([[1., 0.]]), tensor([[2., 1.]]))
    """
    alive = state.alive
    output = output * alive[..., None]
    cumulative = state.cumulative + halting
    ponder = state.ponder + alive
    goes_on = (cumulative < 1 - eps).to(alive.dtype)  # a halted token's sum stays above
    stops = (1 - goes_on) * alive
    weight = state.remainder * stops + halting * goes_on
    return Halting(
        state.output + output * weight[..., None],
        cumulative,
        state.remainder - halting * goes_on,
        goes_on,
        ponder + state.remainder * stops,
        state.counter + goes_on,
    )


def halt_bias(alive: Tensor, *, masked: float = -1000.0) -> Tensor:
    """Additive key bias (B, 1, 1, N) that hides halted tokens from attention, for `attention_scores` and torch's attention alike.

    Example:
        >>> halt_bias(torch.tensor([[1.0, 0.0]])).flatten()
        tensor([    0., -1000.])
    """
    return torch.where(alive > 0, 0.0, masked)[:, None, None, :].to(alive.dtype)


def run_alive(block: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, alive: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Runs a block on the tokens that have not halted and writes the results back: the saving that the release promises.

    Args:
        block: called with the alive tokens (B, capacity, C), packed in order, and their (B, capacity) bool mask of real ones.
        tokens: (B, N, C); alive: (B, N), 1.0 or True = runs. capacity: room per sample, at most N.

    Returns:
        (tokens (B, N, C) with the block's output where alive and 0 elsewhere, overflow (B,) bool: more were alive than fit, and the last
        ones were left out). No host sync: read overflow when it suits, or give capacity = N.

    Example:
        >>> out, _ = run_alive(lambda x, real: x + 1, torch.zeros(1, 3, 1), torch.tensor([[1.0, 0.0, 1.0]]), 2)
        >>> out.flatten()
        tensor([1., 0., 1.])
    """
    require(0 <= capacity <= tokens.shape[1], "run_alive", f"capacity must be in [0, N={tokens.shape[1]}]", capacity)
    chosen = ops.select_threshold(alive.float(), 0.5, capacity=capacity)
    packed = block(ops.gather_tokens(tokens, chosen.index), chosen.index >= 0)
    return ops.scatter_tokens(torch.zeros_like(tokens), chosen.index, packed), chosen.overflow
