"""DyVTE: small learned gates say at which layer all visual tokens may leave (arXiv 2411.19628, NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from .base import DecoderMethod, Stage, require
from .positions import on_device
from .views import StageView


@dataclass(frozen=True)
class DyVTE(DecoderMethod):
    """DyVTE (arXiv 2411.19628): after the first layer whose gate says so, all visual tokens of a sample leave at once.

    Args:
        gates: trained `ExitGate` of layers 0, 1, ... on the device of the decoder; without any, nothing ever leaves.

    Differs from the official code: every sample of a batch decides for itself; the image may lie anywhere; no gate runs in decoding (there,
    a prompt whose gates stay shut fails at the first cached step). A question of fewer than two tokens after the image never exits.

    Example:
        >>> len(DyVTE(gates=(ExitGate(8), ExitGate(8))).stages)
        2
    """

    title = "DyVTE"
    paper = "arXiv 2411.19628"
    gates: tuple[nn.Module, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", tuple(self.gates))
        require(all(isinstance(gate, nn.Module) for gate in self.gates), self, "gates must be torch modules", self.gates)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(Stage(layer + 1) for layer in range(len(self.gates)))

    def select(self, view: StageView) -> Tensor:
        """Keeps all image tokens of a sample or none; the driver reads the counts on the host, once a layer: the decision needs it."""
        behind = view.image_mask.flip(1).cumsum(1).flip(1) == 0
        last = on_device(view.last, view.hidden.device)
        column = torch.arange(view.hidden.shape[1], device=view.hidden.device)
        question = behind & (column < last[:, None])
        question = question if view.real is None else question & view.real
        gone = leaves(self.gates[view.stage](gate_features(view.hidden, question, last)))
        stay = view.image_mask & ~gone[:, None]
        return ops.select_threshold(stay.float(), 0.5, capacity=max(view.images, default=0)).index


class ExitGate(nn.Module):
    """Gate of one layer: Linear, GELU, Linear on the text's mean and its last token; two logits, exit where the second is larger.

    Args:
        channels: C of the decoder; hidden: width of the hidden layer.

    Example:
        >>> ExitGate(8)(torch.randn(2, 16)).shape
        torch.Size([2, 2])
    """

    def __init__(self, channels: int, hidden: int = 2048) -> None:
        super().__init__()
        self.w1 = nn.Linear(2 * channels, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 2, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.w2(nn.functional.gelu(self.w1(features)))


def gate_features(hidden: Tensor, question: Tensor, last: Tensor) -> Tensor:
    """What a gate reads: the mean of the text after the image without its last token, then that token.

    Args:
        hidden: (B, N, C) output of a layer; question: (B, N) bool, the text after the image without its last token; last: (B,) int64,
            position of the last prompt token.

    Returns:
        (B, 2 * C) in the dtype of hidden, the mean in float32; NaN where the question is empty.

    Example:
        >>> x = torch.tensor([[[9.0], [1.0], [3.0], [5.0]]])
        >>> gate_features(x, torch.tensor([[False, True, True, False]]), torch.tensor([3]))
        tensor([[2., 5.]])
    """
    mean, count = ops.merge_by_label(hidden, question.long() - 1, 1)  # reads the question alone
    mean = mean[:, 0].masked_fill(count == 0, float("nan"))
    end = hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
    return torch.cat([mean, end], -1)


def leaves(logits: Tensor) -> Tensor:
    """(B, 2) gate logits -> (B,) bool: exit. Equal or NaN logits stay.

    Example:
        >>> leaves(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        tensor([ True, False])
    """
    return logits[:, 1] > logits[:, 0]


def gate_loss(logits: Tensor, agreement: Tensor, loss_without: Tensor, loss_with: Tensor) -> Tensor:
    """Cross entropy of the gate: exiting is right where answers agree (> 99 %) and the loss without the image is < 1.03 of that with it.

    Args:
        logits: (B, 2); agreement: (B,) share of answer tokens with the same arg max; loss_without, loss_with: (B,).

    Example:
        >>> gate_loss(torch.tensor([[0.0, 0.0]]), torch.ones(1), torch.ones(1), torch.ones(1))
        tensor(0.6931)
    """
    label = (agreement > 0.99) & (loss_without < 1.03 * loss_with)
    return nn.functional.cross_entropy(logits, label.long())
