"""DAMRO: the patches that CLS dwells on as a contrastive negative, against hallucination (arXiv 2410.04514, EMNLP 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers


@dataclass(frozen=True)
class DAMRO(TensorMethod):
    """DAMRO (arXiv 2410.04514): subtract the logits of a second pass that sees only the `tokens` patches that CLS attends to most.

    A few background patches attract both the vision encoder's CLS row and the language model. The main pass keeps every token; the second
    one, with its own cache, has the prompt with these patches alone. Nothing is saved: one short pass more at every step.

    Args:
        tokens: patches of the negative pass: 10 for LLaVA, 4 for InstructBLIP.
        alpha: weight of the negative logits: 2 by default, 0.5 and 1.5 in InstructBLIP's scripts.
        beta: tokens below beta times the best probability of the main pass are never sampled.
        one_head: score with the heads joined to one of the encoder's width, as the code for LLaVA does; False scores every head and takes
            the mean, which is the encoder's own attention and the code for InstructBLIP.

    Differs from the official code: for InstructBLIP it gathers each chosen patch's left neighbour, because its features still hold CLS at
    row 0; here features have no CLS row. Ties go to the lowest patch.

    Example:
        >>> DAMRO(tokens=4, alpha=0.5, one_head=False)
        DAMRO(tokens=4, alpha=0.5, beta=0.1, one_head=False)
    """

    title = "DAMRO"
    paper = "arXiv 2410.04514"
    hook = "enc"

    tokens: int = 10
    alpha: float = 2.0
    beta: float = 0.1
    one_head: bool = True

    def __post_init__(self) -> None:
        require_ints(self, tokens=self.tokens)
        require_numbers(self, alpha=self.alpha, beta=self.beta)
        require(self.tokens >= 0, self, "tokens must be 0 or more", self.tokens)
        require(0 < self.beta <= 1, self, "beta must be in (0, 1]", self.beta)


def cls_scores(query: Tensor, key: Tensor, one_head: bool = True) -> Tensor:
    """Attention of CLS to every patch, softmax over CLS and patches.

    Args:
        query: (B, H, 1, D) CLS query; key: (B, H, N + 1, D), key 0 = CLS; B counts images and crops.
        one_head: as in `DAMRO`; the scale is then (H * D) ** -0.5.

    Returns:
        (B, N) float32.

    Example:
        >>> import torch
        >>> cls_scores(torch.zeros(1, 2, 1, 4), torch.randn(1, 2, 5, 4))
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    if one_head:
        query, key = (x.transpose(1, 2).flatten(2)[:, None] for x in (query, key))
    return ops.attention_scores(query, key, key_range=(1, key.shape[2]))


def negative_tokens(query: Tensor, key: Tensor, features: Tensor, method: DAMRO) -> tuple[Tensor, Tensor, Tensor]:
    """The image of the negative pass: (features (B, tokens, C), index (B, tokens) by falling score, scores (B, N)).

    Args:
        query, key: as in `cls_scores`; features: (B, N, C) patches without CLS, before or after the projector.

    Any resolution: rows are thumbnail and crops, and the negative prompt holds the thumbnail's (row 0) and one newline token.

    Example:
        >>> import torch
        >>> key = torch.tensor([0.0, 1.0, 3.0, 2.0]).view(1, 1, 4, 1)
        >>> negative_tokens(torch.ones(1, 1, 1, 1), key, torch.arange(3.0).view(1, 3, 1), DAMRO(tokens=2))[1]
        tensor([[1, 2]])
    """
    N = features.shape[1]
    require(key.shape[2] == N + 1, "negative_tokens", f"features must have the N={key.shape[2] - 1} patches without CLS", N)
    require(method.tokens <= N, "negative_tokens", f"tokens must be at most N={N} patches", method.tokens)
    scores = cls_scores(query, key, method.one_head)
    index = ops.select_topk(scores, method.tokens, order="score")
    return ops.gather_tokens(features, index), index, scores


def contrastive_logits(logits: Tensor, negative: Tensor, alpha: float = 2.0, beta: float = 0.1) -> Tensor:
    """(1 + alpha) * logits - alpha * negative, -inf where the main pass finds a token implausible.

    Args:
        logits, negative: (B, V) next-token logits of the main and the negative pass, a float dtype.

    Returns:
        (B, V) float32.

    Example:
        >>> import torch
        >>> contrastive_logits(torch.tensor([[2.0, 1.0, -5.0]]), torch.tensor([[2.0, 0.0, 0.0]]), alpha=1.0)
        tensor([[2., 2., -inf]])
    """
    logits, negative = logits.float(), negative.float()
    implausible = logits < logits.amax(-1, keepdim=True) + math.log(beta)
    return ((1 + alpha) * logits - alpha * negative).masked_fill(implausible, -math.inf)
