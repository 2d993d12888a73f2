"""Positions of tokens: from the host to the device, and as masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host integers as an int64 tensor; pinned for a GPU, so that the copy does not wait for it."""
    return to_device(torch.tensor(values, dtype=torch.int64), device)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; from pinned memory to a GPU, so that the copy does not wait for it."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def token_mask(index: Tensor, N: int) -> Tensor:
    """(B, K) int64 positions, -1 = none -> (B, N) bool, True where a token is named.

    Example:
        >>> token_mask(torch.tensor([[2, 0, -1]]), 4)
        tensor([[ True, False,  True, False]])
    """
    mask = torch.zeros((index.shape[0], N + 1), dtype=torch.bool, device=index.device)
    return mask.scatter_(1, torch.where(index < 0, N, index), True)[:, :N]  # -1 lands in a slot that is cut off
