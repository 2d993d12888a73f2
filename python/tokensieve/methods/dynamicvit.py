"""DynamicViT: learned keep scores, masked softmax in training, a gather at inference (arXiv 2106.02034, NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers


@dataclass(frozen=True)
class DynamicViT(TensorMethod):
    """DynamicViT (arXiv 2106.02034): before blocks 3, 6 and 9 keep the share 0.7, 0.49, 0.34 of the patches by a learned predictor.

    Args:
        layers: 0-based blocks before which tokens leave.
        ratio: share rho; stage s keeps int(N * rho ** (s + 1)) of the N patches at the start.

    Differs from the official code: N is the model's, not 196; ties go to the lowest position. In training no token leaves: `gate` gives a
    straight-through keep decision and `policy_attention` applies it. That attention stores its map; a fused one is not built yet.

    Example:
        >>> [DynamicViT().keep_count(stage, 196) for stage in range(3)]
        [137, 96, 67]
    """

    title = "DynamicViT"
    paper = "arXiv 2106.02034"
    hook = "vit"

    layers: tuple[int, ...] = (3, 6, 9)
    ratio: float = 0.7

    def __post_init__(self) -> None:
        require_ints(self, layers=self.layers)
        require_numbers(self, ratio=self.ratio)
        require(0 < self.ratio <= 1, self, "ratio must be in (0, 1]", self.ratio)

    def keep_count(self, stage: int, patches: int) -> int:
        """Patches left after a stage, of so many at the start."""
        return int(patches * self.ratio ** (stage + 1))


class Predictor(nn.Module):
    """Keep and drop log-probabilities of every patch from its own features and the mean of the kept ones (PredictorLG).

    Args:
        channels: C of the tokens, even.

    Example:
        >>> Predictor(8)(torch.randn(2, 5, 8), torch.ones(2, 5)).exp().sum(-1).allclose(torch.ones(2, 5))
        True
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        require(channels % 4 == 0, "Predictor", "channels must be a multiple of 4", channels)
        self.embed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        self.decide = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.GELU(),
            nn.Linear(channels // 2, channels // 4),
            nn.GELU(),
            nn.Linear(channels // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, patches: Tensor, policy: Tensor) -> Tensor:
        """(B, N, C) patches, (B, N) keep decisions so far -> (B, N, 2) log-probabilities; column 0 is keep."""
        own, shared = self.embed(patches).chunk(2, dim=-1)
        weight = policy[..., None].to(shared.dtype)
        mean = (shared * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return self.decide(torch.cat([own, mean.expand_as(shared)], -1))


def keep_best(tokens: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The step at inference: CLS, then the k patches of the highest score, best first.

    Args:
        tokens: (B, N + 1, C), token 0 = CLS; scores: (B, N) log-probability of keeping a patch; k: patches to keep.

    Returns:
        (tokens (B, k + 1, C), index (B, k) among the patches, descending score). Differentiable in tokens.

    Example:
        >>> keep_best(torch.arange(4.0).view(1, 4, 1), torch.tensor([[0.1, 0.9, 0.5]]), 2)[0].flatten()
        tensor([0., 2., 3.])
    """
    index = ops.select_topk(scores.contiguous(), k, order="score")  # a column of the predictor is strided
    return ops.gather_tokens(tokens, nn.functional.pad(index + 1, (1, 0))), index


def gate(log_probabilities: Tensor, policy: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """The keep decision in training: 0 or 1 by Gumbel noise, with the gradient of the soft decision; a dropped patch stays dropped.

    Args:
        log_probabilities: (B, N, 2) of the predictor; policy: (B, N) decisions so far.

    Returns:
        (B, N) in the dtype of log_probabilities.

    Example:
        >>> gate(torch.tensor([[[0.0, -99.0], [-99.0, 0.0], [0.0, -99.0]]]), torch.tensor([[1.0, 1.0, 0.0]]))
        tensor([[1., 0., 0.]])
    """
    noise = torch.empty_like(log_probabilities).exponential_(generator=generator).log()
    soft = (log_probabilities - noise).softmax(-1)[..., 0]
    hard = (soft > 0.5).to(soft.dtype)
    return (hard + (soft - soft.detach())) * policy  # the bracket is exactly 0


def policy_attention(query: Tensor, key: Tensor, value: Tensor, policy: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Attention whose keys are gated by a keep decision, except that every token sees itself; gradients reach the decision.

    Args:
        query, key, value: (B, H, N, D); policy: (B, N) in [0, 1], 1 = kept (CLS too).
        eps: keeps a share of eps / N of the mass on every key, so that dropped ones learn.

    Returns:
        (B, N, H * D) in the dtype of value; softmax in float32. Stores the (B, H, N, N) map.

    Example:
        >>> q = torch.randn(1, 2, 3, 4)
        >>> policy_attention(q, q, q, torch.ones(1, 3)).shape
        torch.Size([1, 3, 8])
    """
    B, H, N, D = query.shape
    logits = (query @ key.transpose(-2, -1)).float() * D**-0.5
    allowed = policy.float()[:, None, None, :]
    allowed = allowed + (1 - allowed) * torch.eye(N, device=policy.device)
    mass = (logits - logits.amax(-1, keepdim=True)).exp() * allowed
    weights = (mass + eps / N) / (mass.sum(-1, keepdim=True) + eps)
    return (weights.to(value.dtype) @ value).transpose(1, 2).reshape(B, N, H * value.shape[-1])


def ratio_loss(policies: list[Tensor], ratios: list[float]) -> Tensor:
    """2 * the mean over stages of the squared miss of the kept share: what holds the budget in training.

    Example:
        >>> ratio_loss([torch.ones(1, 4)], [0.5])
        tensor(0.5000)
    """
    terms = [((policy.mean(1) - ratio) ** 2).mean() for policy, ratio in zip(policies, ratios)]
    return 2 * torch.stack(terms).mean()
