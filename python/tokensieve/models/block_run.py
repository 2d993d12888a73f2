"""A method inside the blocks of a vision encoder: the loop over blocks, and what happened."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..flops import encoder_block_flops
from ..methods.base import BlockMethod
from ..methods.views import BlockView
from .active import claim, refuse_copy, release, require_uncompiled
from .report import Report
from .towers import find_tower


class Carry(NamedTuple):
    """What goes from block to block beside the tokens, by value: a block that runs again, for checkpointing, sees the same."""

    patches: int  # that entered block 0
    size: Tensor | None = None  # (B, N)
    log_size: Tensor | None = None
    state: Any = None  # the method's own


class Record(NamedTuple):
    """One step of the last call."""

    index: Tensor  # type: ignore[assignment]
    inverse: Tensor | None


class Last(NamedTuple):
    """The last call."""

    entered: Tensor  # (B, N) without storage: the shape that entered block 0
    records: tuple[Record | None, ...]  # of each block
    size: Tensor | None  # (B, M) of the tokens that left the last block


class BlockRun:
    """A `BlockMethod` attached to an encoder, between `with sieve(...)` and its end, or `attach` and `detach`.

    After a forward call: `report`, `kept`, `trace`, `size`, `overlay(image)`.
    """

    def __init__(self, model: Any, method: BlockMethod) -> None:
        self.method, self.masked = method, False
        self._tower = find_tower(model)
        self._depth = len(self._tower.blocks)
        self._steps = tuple(method.blocks(self._depth))
        name = type(method).__name__
        beyond = [block for block in self._steps if not 0 <= block < self._depth]
        if beyond or list(self._steps) != sorted(set(self._steps)):
            raise ValueError(
                f"tokensieve.sieve: {name}'s blocks must be ascending numbers of the model's blocks 0..{self._depth - 1}, got {self._steps}"
            )
        if method.needs_cls and not self._tower.cls:
            raise ValueError(f"tokensieve.sieve: {name} ranks by the CLS token, and {type(model).__name__} has none")
        self._originals: list[Any] = []
        self._saved: list[tuple[Any, str, bool, Any]] = []
        self._handles: list[Any] = []
        self._last: Last | None = None
        self._state = "new"

    def __enter__(self) -> BlockRun:
        if self._state != "new":
            raise RuntimeError(
                f"tokensieve.sieve: a sieve is used once, this one is {self._state}; make a new one with sieve(model, method)"
            )
        require_uncompiled(self._tower.model)
        claim(self._tower.model, [self._tower.owner], self)
        try:
            self.install()
            self._handles.append(self._tower.owner.register_forward_pre_hook(refuse_copy))
        except BaseException:
            self.remove()
            release([self._tower.owner])
            raise
        self._state = "attached"
        return self

    def __exit__(self, *_: object) -> None:
        if self._state == "attached":
            self.remove()
            release([self._tower.owner])
            self._state = "finished"

    def install(self) -> None:
        """Takes the blocks over; whoever calls it holds the model."""
        self._originals = [block.forward for block in self._tower.blocks]
        for number, block in enumerate(self._tower.blocks):
            self._put(block, "forward", partial(self._forward, number))
        self._handles = self._tower.install(self, self._put)

    def _put(self, module: Any, name: str, value: Any) -> None:
        self._saved.append((module, name, name in vars(module), vars(module).get(name)))
        setattr(module, name, value)

    def remove(self) -> None:
        """Undoes `install`."""
        for handle in self._handles:
            handle.remove()
        for module, name, own, value in reversed(self._saved):
            if own:
                setattr(module, name, value)
            else:
                delattr(module, name)
        self._handles, self._saved, self._originals = [], [], []

    def encode(self, x: Tensor) -> Tensor:
        """All blocks, for the tower: (B, N, C) -> (B, M, C)."""
        entered = torch.empty((), dtype=torch.bool, device=x.device).expand(x.shape[:2])
        carry, records = Carry(x.shape[1] - self._tower.prefix), []
        for block in self._tower.blocks:
            if block.training and torch.is_grad_enabled() and self._tower.checkpoints(block):
                x, carry, record = checkpoint(block, x, carry, use_reentrant=False)
            else:
                x, carry, record = block(x, carry)
            records.append(record)
        self._last = Last(entered, tuple(records), carry.size)
        return x

    def _forward(self, number: int, x: Tensor, carry: Carry | None = None, *args: Any, **kwargs: Any) -> Any:
        """In place of a block's own forward; a call that is not from `encode` runs that one."""
        if not isinstance(carry, Carry):
            return self._originals[number](x, *(() if carry is None else (carry,)), *args, **kwargs)
        biased = self.method.proportional and carry.log_size is not None
        if number not in self._steps and not biased:
            return self._originals[number](x, *self._tower.no_mask), carry, None
        tower, block = self._tower, self._tower.blocks[number]
        bias = carry.log_size[:, None, None] if biased and carry.log_size is not None else None
        attended = tower.attend(block, x, bias)
        x, record = attended.tokens, None
        if number in self._steps:
            view = BlockView(
                number, self._depth, *attended, tower.prefix, tower.cls, carry.patches, bias=bias, size=carry.size, state=carry.state
            )
            step = self.method.step(view)
            if step is not None:
                size = step.size
                log_size = size.log() if step.log_size is None and size is not None and self.method.proportional else step.log_size
                x, carry, record = step.tokens, Carry(carry.patches, size, log_size, step.state), Record(step.index, step.inverse)
        return tower.mlp(block, x), carry, record

    def size_of(self, x: Tensor) -> Tensor | None:
        """(B, M) float32 sizes of the tokens that the last call gave, where x (B, M, C) are those and the method keeps sizes."""
        size = None if self._last is None else self._last.size
        return size if size is not None and size.shape == x.shape[:2] else None

    def _called(self) -> Last:
        if self._last is None:
            raise RuntimeError("tokensieve.sieve: nothing has run yet")
        return self._last

    @property
    def size(self) -> Tensor | None:
        """(B, M) float32, how many patches each token stands for that left the last block; None where the method keeps no sizes."""
        return self._called().size

    @property
    def trace(self) -> Tensor:
        """(B, N) int64: the row, after the last block, that each token of block 0 went into (prefix tokens first); -1 = dropped."""
        return self._trace(self._depth)

    def _trace(self, blocks: int) -> Tensor:
        entered, records, _ = self._called()
        B, N = entered.shape
        row = torch.arange(N, device=entered.device).expand(B, N)
        for record in records[:blocks]:
            if record is not None:
                inverse = _inverse(record.index, N) if record.inverse is None else record.inverse
                row = torch.where(row < 0, -1, inverse.gather(1, row.clamp(min=0)))
        return row

    @property
    def kept(self) -> list[list[Tensor]]:
        """kept[step][image]: int64 patches, ascending, on which a token of its own stands after each step, made tokens left out."""
        result = []
        for number, record in enumerate(self._called().records):
            if record is not None:
                patches = self.stands(number + 1).cpu() - self._tower.prefix
                result.append([row[row >= 0].sort().values for row in patches])
        return result

    def stands(self, blocks: int) -> Tensor:
        """(B, M) int64: the token of block 0 on which each row stands after so many blocks; -1 = a token that a step made."""
        entered, records, _ = self._called()
        stands = torch.arange(entered.shape[1], device=entered.device).expand(entered.shape)
        for record in records[:blocks]:
            if record is not None:
                stands = torch.where(record.index < 0, -1, stands.gather(1, record.index.clamp(min=0)))
        return stands

    @property
    def entered(self) -> int:
        """Tokens that entered block 0."""
        return int(self._called().entered.shape[1])

    @property
    def report(self) -> Report:
        """Tokens that entered each block and FLOPs of each, of the last call, over the batch. Steps are not timed here."""
        entered, records, _ = self._called()
        B, N = entered.shape
        tokens: list[tuple[int, int]] = []
        flops, dense = [], []
        for block, record in zip(self._tower.blocks, records):
            weights = self._tower.weights(block)
            tokens_in = tokens[-1][1] if tokens else N
            left = tokens_in if record is None else record.index.shape[1]
            tokens.append((tokens_in, left))
            flops.append(B * encoder_block_flops(*weights, tokens_in, left))
            dense.append(B * encoder_block_flops(*weights, N, N))
        return Report(
            method=self.method,
            dense_tokens=(B * N,) * self._depth,
            tokens=tuple(B * n for n, _ in tokens),
            image_tokens=tuple(B * (n - self._tower.prefix) for n, _ in tokens),
            dense_flops=tuple(dense),
            flops=tuple(flops),
            prune_seconds=(),
        )

    def overlay(self, image: Any, *, sample: int = 0, block: int | None = None, grid: tuple[int, int] | None = None) -> Any:
        """The picture with every merged group in its mean colour and a border, tokens of one patch as they are, dropped patches dark.

        Args:
            image: PIL.Image.Image that the model saw.
            sample: which image of the batch.
            block: as after this block; the last where not said.
            grid: (rows, columns) of patches; needed only where the model does not say it.

        Returns:
            PIL.Image.Image.
        """
        from .. import viz

        trace = self._trace(self._depth if block is None else block + 1)
        if not -len(trace) <= sample < len(trace):
            raise ValueError(f"tokensieve.sieve: overlay's sample must be below {len(trace)}, got {sample}")
        groups = trace[sample, self._tower.prefix :]
        grid = grid or self._tower.grid()
        if grid is None or grid[0] * grid[1] != len(groups):
            raise ValueError(f"tokensieve.sieve: overlay needs grid=(rows, columns) of {len(groups)} patches, got {grid}")
        return viz.groups(image, groups, grid)


def _inverse(index: Tensor, N: int) -> Tensor:
    """The row that stands on each of N tokens, -1 = none."""
    rows = torch.arange(index.shape[1], device=index.device).expand_as(index)
    inverse = torch.full((index.shape[0], N + 1), -1, dtype=torch.int64, device=index.device)
    return inverse.scatter_(1, torch.where(index < 0, N, index), rows)[:, :N]
