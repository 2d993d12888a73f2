"""ToP-ViM: prune the tokens of a vision state-space model by what its scan puts out (arXiv 2409.18962, NeurIPS 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers


@dataclass(frozen=True)
class ToPViM(TensorMethod):
    """ToP-ViM (arXiv 2409.18962): after given Vim blocks keep the patches with the largest scan output, in order, CLS in the middle.

    Args:
        layers: 1-based blocks after which tokens leave.
        keep: share of the patches that stays, in (0, 1].
        clipped: sum the positive outputs only (the paper); False sums all (the released code).

    Differs from the official code: CLS never competes (there, only in the first sample of a batch, so others may hold it twice). The scores
    must be in token order: the released code reads those of the backward scan in reversed order. The paper's alignment of the hidden state
    is not in the released code; `skipped_delta` gives the sums that a scan kernel needs for it.

    Example:
        >>> ToPViM().keep_count(196)
        156
    """

    title = "ToP-ViM"
    paper = "arXiv 2409.18962"
    hook = "vit"

    layers: tuple[int, ...] = (5, 10, 15)
    keep: float = 0.8
    clipped: bool = True

    def __post_init__(self) -> None:
        require_ints(self, layers=self.layers)
        require_numbers(self, keep=self.keep)
        require(all(layer >= 1 for layer in self.layers), self, "layers must be 1 or more", self.layers)
        require(0 < self.keep <= 1, self, "keep must be in (0, 1]", self.keep)

    def keep_count(self, patches: int) -> int:
        """Patches that stay of so many: always even, so that CLS stays exactly in the middle; never more than there are."""
        wanted = math.ceil(self.keep * patches)
        return min(wanted // 2 * 2, patches // 2 * 2)


def scan_scores(output: Tensor, *, clipped: bool = True) -> Tensor:
    """Score of every token: the sum of its channels, float32.

    Args:
        output: (B, E, N) output of the mixer before its projection.
        clipped: sum max(0, y) instead of y.

    Example:
        >>> scan_scores(torch.tensor([[[1.0, -2.0], [3.0, 1.0]]])), scan_scores(torch.tensor([[[1.0, -2.0], [3.0, 1.0]]]), clipped=False)
        (tensor([[4., 1.]]), tensor([[ 4., -1.]]))
    """
    return (output.clamp(min=0) if clipped else output).sum(1, dtype=torch.float32)


def keep_around_cls(
    scores: Tensor, tensors: Sequence[Tensor], k: int, *, cls: int | None = None, candidates: Tensor | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The ToP-ViM step: the k best patches in order, CLS between the two halves.

    Args:
        scores: (B, N) of all tokens. tensors: sequence of (B, N, ...), such as hidden states and residuals.
        k: patches to keep, even, at most N - 1.
        cls: position of CLS, N // 2 where None. candidates: (B, N) bool, tokens that compete; all but CLS where None.

    Returns:
        (tensors (B, k + 1, ...), index (B, k) of the kept patches, ascending).

    Example:
        >>> keep_around_cls(torch.tensor([[1.0, 5.0, 9.0, 2.0, 3.0]]), [torch.arange(5).view(1, 5)], 2)
        ((tensor([[1, 2, 4]]),), tensor([[1, 4]]))
    """
    B, N = scores.shape
    require(k % 2 == 0 and 0 <= k < N, "keep_around_cls", f"k must be even and in [0, {N - 1}]", k)
    middle = N // 2 if cls is None else cls
    require(0 <= middle < N, "keep_around_cls", f"cls must be in [0, {N - 1}]", middle)
    if candidates is None:
        candidates = (torch.arange(N, device=scores.device) != middle).expand(B, N)
    index = ops.select_topk(scores, k, candidates=candidates)
    order = torch.cat([index[:, : k // 2], index.new_full((B, 1), middle), index[:, k // 2 :]], 1)
    return ops.gather_tokens(tuple(tensors), order), index


def skipped_delta(delta: Tensor, index: Tensor) -> Tensor:
    """Sum of the step sizes between each kept token and the one kept before it: the decay that alignment applies to the hidden state.

    Args:
        delta: (B, N, E) step sizes; index: (B, K) kept positions, ascending.

    Returns:
        (B, K, E) float32: entry i sums delta over the dropped positions between index[i - 1] (the start for i = 0) and index[i].

    The recurrence of a dropped position is h <- exp(delta A) h, so the product over several is exp(A * sum of delta).

    Example:
        >>> skipped_delta(torch.tensor([[[1.0], [2.0], [4.0], [8.0]]]), torch.tensor([[0, 3]])).flatten()
        tensor([0., 6.])
    """
    total = torch.nn.functional.pad(delta.float().cumsum(1), (0, 0, 1, 0))  # total[n] = sum of the first n
    until = total.gather(1, index[..., None].expand(-1, -1, delta.shape[2]))  # before the kept token
    after = torch.nn.functional.pad(index[:, :-1] + 1, (1, 0))  # behind the one before
    return until - total.gather(1, after[..., None].expand(-1, -1, delta.shape[2]))
