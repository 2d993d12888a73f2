"""Layers of small networks by hand in float64, and whether a module learns; no tokensieve."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .inputs import normal, seeded

Weights = dict[str, Tensor]


def weights_of(module: nn.Module, seed: int) -> Weights:
    """Fills every parameter with noise, and gives them in float64."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            size = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(size * torch.randn(parameter.shape, generator=seeded(seed + i)))
    return {name: value.detach().double() for name, value in module.named_parameters()}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def normed(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return normed(x) * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + (x / math.sqrt(2)).erf())


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, last: int | None = None) -> Tensor:
    """(M, C), (N, C), (N, C) -> (M, C), head by head; last: rows see keys up to their own number."""
    M, C = q.shape
    out = torch.zeros(M, C, dtype=torch.float64)
    for d in range(0, C, C // heads):
        part = slice(d, d + C // heads)
        for m in range(M):
            seen = slice(0, m + 1) if last is not None else slice(None)
            logits = (k[seen, part] * q[m, part]).sum(1) * (C // heads) ** -0.5
            out[m, part] = logits.softmax(0) @ v[seen, part]
    return out


def learns(module: nn.Module, run: Callable[[], Tensor], idle: tuple[str, ...] = ()) -> None:
    """A target is learned, and the first gradients reach every parameter but `idle`."""
    target = normal(seeded(9), *run().shape)
    optimizer = torch.optim.Adam(module.parameters(), 2e-2)
    losses, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # so small that a busy machine's second core costs more than it gives
    for step in range(20):
        loss = (run() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in module.named_parameters():
                reached = parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())
                assert reached or name.endswith(idle), name
        optimizer.step()
        losses.append(float(loss.detach()))
    torch.set_num_threads(threads)
    assert losses[-1] < 0.5 * losses[0], losses
