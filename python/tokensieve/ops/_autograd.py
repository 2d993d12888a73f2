"""The cheap way around autograd where no gradient can be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def call(op: Callable[..., Any], differentiable: Sequence[Tensor], *arguments: Any) -> Any:
    """`op(*arguments)`; skips the Python autograd kernel that register_autograd installs (4 of 6 us a call) where nothing needs it."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)):
        return op(*arguments)
    with _BelowAutograd():
        return op(*arguments)
