"""Merging around a module that must give back every token: fewer tokens go in, and each gets its group's output (ToMeSD)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from .. import ops
from .active import claim, release, require_uncompiled

NAMES = ("hidden_states", "x", "input")  # of the tokens, where a module gets them by keyword


class Planner(Protocol):
    """What `merge_around` asks of a method, such as `tokensieve.methods.ToMeSD`."""

    def grid(self, tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of so many tokens of a latent of `size`; None: this level does not merge."""

    def plan(self, x: Tensor, grid: tuple[int, int]) -> Any:
        """A `MergePlan` of x (B, N, C); None: nothing merges."""


class merge_around:  # used like a function: `with merge_around(...)`
    """A context manager: the block, or modules inside it, run on merged tokens, and their output is expanded again.

    Args:
        block: a module of (B, N, C) tokens that gives (B, N, C) back, such as a transformer block of a latent diffusion U-Net.
        method: has `grid` and `plan`, such as `ToMeSD()`; asked once a call, with the tokens that enter the block.
        size: (rows, columns) of the latent; `method.grid` turns it into those of the block's tokens.
        inside: names of the block's modules that run on merged tokens, such as ("attn1",), all by one plan, so that the block's residual
            connections stay outside; none: the block itself.

    The tokens are the first argument, or the keyword hidden_states, x or input; the output is a tensor, or a tuple that begins with one.
    Other arguments pass as they are (a text that is attended to, for example). On exit, also by an exception, the block is as before.

    Raises:
        TypeError: a name in `inside` that is no module, or tokens that are not (B, N, C).
        RuntimeError: nested use, or a compiled block; compile inside.

    Example:
        >>> import torch
        >>> from tokensieve.methods import ToMeSD
        >>> block, x = torch.nn.Linear(4, 4), torch.randn(1, 16, 4)
        >>> with merge_around(block, ToMeSD(ratio=0.5, random=False), size=(4, 4)):
        ...     y = block(x)
        >>> y.shape, len(y[0].unique(dim=0))
        (torch.Size([1, 16, 4]), 8)
    """

    def __init__(self, block: Any, method: Planner, *, size: tuple[int, int], inside: Sequence[str] = ()) -> None:
        self.block, self.method, self.size = block, method, size
        modules = dict(block.named_modules())
        for name in inside:
            if not isinstance(modules.get(name), nn.Module) or not name:
                raise TypeError(f"tokensieve.merge_around: inside must name modules of {type(block).__name__}, got {name!r}")
        self._modules = [modules[name] for name in inside]
        self._plans: list[Any] = []  # of the calls of the block that are running
        self._saved: list[tuple[Any, bool, Any]] = []

    def __enter__(self) -> merge_around:
        require_uncompiled(self.block)
        claim(self.block, [self.block, *self._modules], self)
        for module in [self.block, *self._modules]:
            self._saved.append((module, "forward" in vars(module), module.forward))
        if not self._modules:
            self.block.forward = self._around(self.block.forward)
        else:
            self.block.forward = self._planned(self.block.forward)
            for module in self._modules:
                module.forward = self._merged(module.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for module, own, forward in self._saved:
            if own:
                module.forward = forward
            else:
                del module.forward
        release([module for module, *_ in self._saved])
        self._saved, self._plans = [], []

    def _plan(self, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else next((kwargs[name] for name in NAMES if name in kwargs), None)
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise TypeError(f"tokensieve.merge_around: tokens must be a (B, N, C) tensor, got {getattr(x, 'shape', type(x).__name__)}")
        grid = self.method.grid(x.shape[1], self.size)
        return None if grid is None else self.method.plan(x, grid)

    def _around(self, original: Any) -> Any:
        return lambda *args, **kwargs: _expand(original, self._plan(args, kwargs), args, kwargs)

    def _planned(self, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._plans.append(self._plan(args, kwargs))
            try:
                return original(*args, **kwargs)
            finally:
                self._plans.pop()

        return forward

    def _merged(self, original: Any) -> Any:
        return lambda *args, **kwargs: _expand(original, self._plans[-1] if self._plans else None, args, kwargs)


def _expand(original: Any, plan: Any, args: Any, kwargs: Any) -> Any:
    """original on merged tokens, its output on all."""
    if plan is None:
        return original(*args, **kwargs)
    if args:
        out = original(ops.merge_tokens(args[0], plan).tensors, *args[1:], **kwargs)
    else:
        name = next(name for name in NAMES if name in kwargs)
        out = original(**{**kwargs, name: ops.merge_tokens(kwargs[name], plan).tensors})
    if isinstance(out, tuple):
        return (ops.unmerge_tokens(out[0], plan), *out[1:])
    return ops.unmerge_tokens(out, plan)
