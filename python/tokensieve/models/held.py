"""What every group of layers holds in a key-value cache; it travels with the cache, so a later call or turn finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from .layout import Chunk

_ATTRIBUTE = "_tokensieve_held"


@dataclass
class Held:
    """Tokens that the layers of one group hold (group g: the layers from stage g - 1 on, up to the next stage)."""

    length: int = 0
    valid: Tensor | None = None  # (B, length) bool; None = all real
    shift: Tensor | None = None  # (B, 1) int64: incoming position - shift = position in these layers; None = 0
    diverged: bool = False  # not what the model itself believes
    image: Tensor | None = None  # (B, length) bool, for the masking variant that ranks again
    text: Tensor | None = None  # (B, length) bool, real tokens that always stay visible
    totals: list[int] = field(default_factory=list)  # visible tokens of each sample after a ranking

    def crop(self, length: int) -> None:
        """Follows a cache that was cut back, as assisted decoding does."""
        if length < self.length:
            self.length = length
            self.valid = None if self.valid is None else self.valid[:, :length]
            self.image = None if self.image is None else self.image[:, :length]
            self.text = None if self.text is None else self.text[:, :length]
        if length == 0:
            self.valid = self.shift = self.image = self.text = None
            self.diverged = False

    def rearrange(self, rows: Callable[[Tensor], Tensor], samples: list[int]) -> None:
        """Follows a cache whose samples were put in another order, repeated or left out."""
        for name in ("valid", "shift", "image", "text"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else rows(value))
        self.totals = [self.totals[sample] for sample in samples] if self.totals else []

    def extend(self, chunk: Chunk, shift: Tensor | None, diverged: bool) -> None:
        """Appends a call's tokens."""
        if self.valid is not None or chunk.valid is not None:
            self.valid = torch.cat([self.visible(chunk), mask_of(chunk)], 1)
        if self.image is not None and self.text is not None:
            self.image = torch.nn.functional.pad(self.image, (0, chunk.size))
            self.text = torch.cat([self.text, mask_of(chunk)], 1)
            self.totals = [total + length for total, length in zip(self.totals, chunk.lengths)]
        self.length += chunk.size
        self.shift, self.diverged = shift, diverged or self.diverged

    def remember(self, chunk: Chunk, keep: list[int]) -> None:
        """After `extend`: the images of a call may be ranked again; chunk is the call before the drop, keep its budgets."""
        before = self.length - chunk.size
        new, real = chunk.image_tokens(), mask_of(chunk)
        if self.image is None or self.text is None:
            seen = self.visible(chunk)[:, :before]
            self.image, self.text = torch.cat([torch.zeros_like(seen), new], 1), torch.cat([seen, real & ~new], 1)
            self.totals = [before] * len(keep)
        else:
            self.image, self.text = (
                torch.cat([self.image[:, :before], new], 1),
                torch.cat([self.text[:, :before], real & ~new], 1),
            )
            self.totals = [total - n for total, n in zip(self.totals, chunk.lengths)]
        self.totals = [total + n - i + k for total, n, i, k in zip(self.totals, chunk.lengths, chunk.images, keep)]

    def visible(self, chunk: Chunk) -> Tensor:
        """(B, length) bool mask of the held tokens."""
        if self.valid is not None:
            return self.valid
        return torch.ones(chunk.positions.shape[0], self.length, dtype=torch.bool, device=chunk.positions.device)


def mask_of(chunk: Chunk) -> Tensor:
    """(B, S) bool mask of a call's real tokens."""
    return torch.ones_like(chunk.positions, dtype=torch.bool) if chunk.valid is None else chunk.valid


@dataclass
class CacheState:
    """All groups of one cache, and how many incoming columns it has seen."""

    layers: tuple[int, ...]  # first layer of each group from 1 on; where two begin at one layer the first of them has no layer
    groups: list[Held]  # group 0 = the layers before the first stage
    seen: int = 0

    @staticmethod
    def of(cache: Any, layers: tuple[int, ...], padding: Tensor | None) -> CacheState:
        """The state of a cache, made for one that no sieve has touched; padding is the call's (B, total) mask."""
        state = getattr(cache, _ATTRIBUTE, None)
        if state is None:
            length = 0 if cache is None else cache.get_seq_length()
            valid = None if padding is None or length == 0 else padding[:, :length].bool()
            groups = [Held(length, valid) for _ in range(len(layers) + 1)]
            return CacheState(layers, groups, length)
        if state.layers != layers:
            raise ValueError(
                f"tokensieve.sieve: this cache was pruned before layers {state.layers}; continue it with the same method, got {layers}"
            )
        state.follow(cache)
        return state

    def follow(self, cache: Any) -> None:
        """Follows a cache that was cropped, reset or reused since the last call."""
        entry = sum(layer == 0 for layer in self.layers)  # the group of layer 0
        before = self.groups[entry].length
        starts = (0, *self.layers)
        for number, (group, layer) in enumerate(zip(self.groups, starts)):
            if starts[number + 1 : number + 2] == (layer,):
                continue
            length = cache.get_seq_length(layer)
            if length > group.length:
                raise ValueError(
                    f"tokensieve.sieve: layer {layer} of this cache holds {length} tokens, {group.length} of them known: a pruned cache "
                    "can only be continued inside a sieve with the same method"
                )
            group.crop(length)
        after = self.groups[entry].length
        self.seen = self.seen - (before - after) if after else 0

    def rearrange(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Follows a cache whose samples were put in another order, repeated or left out."""
        samples: list[int] = []
        for group in self.groups:
            if group.totals and not samples:  # host numbers, of a method that ranks again: one host read
                samples = rows(torch.arange(len(group.totals))).tolist()
            group.rearrange(rows, samples)

    def store(self, cache: Any) -> None:
        """Keeps the state with its cache, and has it follow what rearranges the cache's samples."""
        if cache is None or getattr(cache, _ATTRIBUTE, None) is self:
            return
        setattr(cache, _ATTRIBUTE, self)
        for method in (reorder_cache, batch_select_indices, batch_repeat_interleave):  # bound, so that a deep copy binds its own
            setattr(cache, method.__name__, MethodType(method, cache))


def reorder_cache(cache: Any, beam_idx: Tensor) -> None:
    """Cache.reorder_cache of a pruned cache."""
    type(cache).reorder_cache(cache, beam_idx)
    getattr(cache, _ATTRIBUTE).rearrange(lambda x: x.index_select(0, beam_idx.to(x.device)))


def batch_select_indices(cache: Any, indices: Tensor) -> None:
    """Cache.batch_select_indices of a pruned cache."""
    type(cache).batch_select_indices(cache, indices)
    getattr(cache, _ATTRIBUTE).rearrange(lambda x: x[indices.to(x.device)])


def batch_repeat_interleave(cache: Any, repeats: int) -> None:
    """Cache.batch_repeat_interleave of a pruned cache."""
    type(cache).batch_repeat_interleave(cache, repeats)
    getattr(cache, _ATTRIBUTE).rearrange(lambda x: x.repeat_interleave(repeats, 0))
