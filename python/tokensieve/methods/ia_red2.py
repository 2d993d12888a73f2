"""IA-RED^2: an interpreter before each group of blocks drops patches that it finds uninformative (arXiv 2106.12620, NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers


@dataclass(frozen=True)
class IARed2(TensorMethod):
    """IA-RED^2 (arXiv 2106.12620): before each group of blocks keep the patches whose informative score is at least 0.5, in order.

    Args:
        groups: groups of blocks, each with its own `Interpreter`.
        threshold: a patch stays from this score on, in [0, 1].
        penalty: reward of a wrong prediction is minus this, in training.

    Differs from the official code: none was published; this follows the paper's formulas as the field knows them. A score of exactly the
    threshold stays. Counts depend on the image: outputs are padded to a capacity, with no host sync.

    Example:
        >>> IARed2().threshold
        0.5
    """

    title = "IA-RED^2"
    paper = "arXiv 2106.12620"
    hook = "vit"

    groups: int = 3
    threshold: float = 0.5
    penalty: float = 1.0

    def __post_init__(self) -> None:
        require_ints(self, groups=self.groups)
        require_numbers(self, threshold=self.threshold, penalty=self.penalty)
        require(self.groups >= 1, self, "groups must be 1 or more", self.groups)
        require(0 <= self.threshold <= 1, self, "threshold must be in [0, 1]", self.threshold)


class Interpreter(nn.Module):
    """Multi-head interpreter: the informative score of every patch against the policy token.

    Args:
        channels: C of the tokens; heads: H, dividing C.

    Example:
        >>> Interpreter(8, heads=2)(torch.randn(2, 5, 8), torch.randn(2, 1, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        require(heads >= 1 and channels % heads == 0, "Interpreter", f"heads must divide channels={channels}", heads)
        self.heads = heads
        self.of_patches = nn.Linear(channels, channels)
        self.of_policy = nn.Linear(channels, channels)

    def forward(self, patches: Tensor, policy_token: Tensor) -> Tensor:
        """(B, N, C) patches, (B, 1, C) policy token -> (B, N) float32 in (0, 1): mean over heads of sigmoid(patch . policy)."""
        key = self.of_patches(patches).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        query = self.of_policy(policy_token).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return ops.attention_scores(query, key, activation="sigmoid", scale=1.0)


def keep_informative(patches: Tensor, scores: Tensor, capacity: int, *, threshold: float = 0.5) -> tuple[Tensor, ops.Selection]:
    """The step at inference: the patches at or above the threshold, in order.

    Args:
        patches: (B, N, C) without CLS and policy token, which always stay; scores: (B, N); capacity: room per sample, at most N.

    Returns:
        (patches (B, capacity, C), zero on pads; Selection(index, counts, overflow)).

    Example:
        >>> out, chosen = keep_informative(torch.arange(3.0).view(1, 3, 1), torch.tensor([[0.5, 0.2, 0.9]]), 3)
        >>> out.flatten(), chosen.counts
        (tensor([0., 2., 0.]), tensor([2]))
    """
    chosen = ops.select_threshold(scores, threshold, capacity=capacity, strict=False)
    return ops.gather_tokens(patches, chosen.index), chosen


def reward(decision: Tensor, correct: Tensor, penalty: float = 1.0) -> Tensor:
    """(B, N) 0/1 decisions, (B,) bool prediction is right -> (B,) reward: 1 - (kept share)^2 where right, -penalty where wrong.

    Example:
        >>> reward(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([True, False]))
        tensor([ 0.7500, -1.0000])
    """
    share = decision.float().mean(1)
    return torch.where(correct, 1 - share**2, torch.full_like(share, -penalty))


def policy_loss(scores: Tensor, decision: Tensor, advantage: Tensor) -> Tensor:
    """Policy gradient of the Bernoulli policy, self-critical: advantage = reward(sampled) - reward(scores >= threshold).

    Args:
        scores: (B, N) in (0, 1), with gradient; decision: (B, N) sampled 0/1; advantage: (B,), taken as constant.

    Example:
        >>> policy_loss(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))
        tensor(1.3863)
    """
    log_probability = -nn.functional.binary_cross_entropy(scores, decision.to(scores.dtype), reduction="none").sum(1)
    return -(advantage.detach() * log_probability).mean()
