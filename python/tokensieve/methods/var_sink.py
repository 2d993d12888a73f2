"""VAR: find visual attention sinks and the heads that look at the image (arXiv 2503.03321, ICLR 2025): the selection half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .. import ops
from .base import TensorMethod, require, require_ints, require_numbers


@dataclass(frozen=True)
class VAR(TensorMethod):
    """VAR's selection (arXiv 2503.03321): sink tokens by massive activations of few dimensions, image-centric heads by where they look.

    Args:
        dims: hidden dimensions with massive activations: (2533, 1415) of Llama-2-7B; 13B has (2100, 4743).
        tau: a token is a sink above it; 20 for 4096 channels.
        rho: largest share of the image attention that sinks may take in an image-centric head.
        mass: least attention that such a head gives to the image.

    Differs from the official code: sinks are found anew for every prompt (there, those of the first one stay); dims are per model (there,
    always the 7B ones). rho bounds the sinks' share, as in the code; the paper bounds the others' share, 1 - rho. The redistribution of
    attention needs a kernel that is not built yet: this gives its inputs.

    Example:
        >>> VAR().tau
        20.0
    """

    title = "VAR (selection)"
    paper = "arXiv 2503.03321"
    hook = "dec"

    dims: tuple[int, ...] = (2533, 1415)
    tau: float = 20.0
    rho: float = 0.5
    mass: float = 0.2

    def __post_init__(self) -> None:
        require_ints(self, dims=self.dims)
        require_numbers(self, tau=self.tau, rho=self.rho, mass=self.mass)
        require(len(self.dims) > 0 and min(self.dims) >= 0, self, "dims must hold dimensions, 0 or more", self.dims)


class Heads(NamedTuple):
    """Per head and row, (B, H, L): the sinks' share of the image attention, the attention to the image, and whether both allow it."""

    sink_share: Tensor
    image_mass: Tensor
    chosen: Tensor


def sink_score(hidden: Tensor, dims: Sequence[int], *, eps: float = 1e-6) -> Tensor:
    """Largest RMS-normalised magnitude of a token in the given dimensions: (B, N, C) -> (B, N) float32.

    Example:
        >>> import torch
        >>> sink_score(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), (0,))
        tensor([[0.8485, 0.0000]])
    """
    scale = (hidden.float().square().mean(-1) + eps).rsqrt()
    return hidden[..., list(dims)].float().abs().amax(-1) * scale


def image_heads(
    query: Tensor, key: Tensor, image_mask: Tensor, sink_mask: Tensor, *, causal: bool = True, rho: float = 0.5, mass: float = 0.2
) -> Heads:
    """The heads and rows that look at the image rather than at its sinks.

    Args:
        query: (B, H, L, D) last L rows, key: (B, Hkv, N, D), after RoPE; image_mask, sink_mask: (B, N) bool (sinks outside do not count).

    Returns:
        Heads(sink_share, image_mass, chosen). The mass of a set of keys is exp(lse over the set - lse over all): no map is stored.

    Example:
        >>> import torch
        >>> q, image = torch.zeros(1, 1, 1, 2), torch.tensor([[True, True, False, False]])
        >>> image_heads(q, torch.zeros(1, 1, 4, 2), image, image & torch.tensor([[True, False, True, True]]))[1:]
        (tensor([[[0.5000]]]), tensor([[[True]]]))
    """

    def log_mass(visible: Tensor | None) -> Tensor:
        return ops.attention_lse(query, key, causal=causal, bias=None if visible is None else visible[:, None, None, :])

    everything = log_mass(None)
    image = (log_mass(image_mask) - everything).exp()
    sinks = (log_mass(image_mask & sink_mask) - everything).exp()
    # The official code adds 1e-6 to every image weight before it sums them.
    share = sinks / (image + 1e-6 * image_mask.sum(1)[:, None, None])
    return Heads(share, image, (share <= rho) & (image >= mass))
