"""What a sieve knows about the tokens of one forward call: sizes on the host, masks and positions on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..methods.positions import on_device

Run = tuple[int, int]  # (start, length) of one image


@dataclass(frozen=True)
class Chunk:
    """The tokens of one forward call as they stand before some layer. Sizes are host integers, read once a prompt."""

    size: int  # S, columns
    lengths: list[int]  # real tokens of each sample
    images: list[int]  # image tokens of each sample
    last: list[int]  # column of each sample's last real token
    positions: Tensor  # (B, S) int64, RoPE positions
    origin: Tensor | None  # (B, S) int64, column in the call's input, -1 on pads; None = unchanged
    valid: Tensor | None  # (B, S) bool; None = all real
    image_mask: Tensor | None  # (B, S) bool; None = no image token, or span says where
    span: tuple[int, int] | None  # (start, end) where every sample has its image tokens there and nowhere else
    labels: Tensor | None = None  # (B, S)
    pad_side: str = "left"
    dropped: bool = False  # tokens have left since the call began
    shown: list[int] | None = None  # image tokens that a masking method has not hidden; None = all

    @property
    def left(self) -> list[int]:
        """Image tokens of each sample that can still leave."""
        return self.images if self.shown is None else self.shown

    def image_tokens(self) -> Tensor:
        """(B, S) bool, the image tokens."""
        if self.image_mask is not None:
            return self.image_mask
        mask = torch.zeros(self.positions.shape[0], self.size, dtype=torch.bool, device=self.positions.device)
        if self.span is not None:
            mask[:, self.span[0] : self.span[1]] = True
        return mask

    def columns(self) -> Tensor:
        """(B, S) int64, where each token stood in the call's input."""
        if self.origin is not None:
            return self.origin
        return torch.arange(self.size, device=self.positions.device).expand(self.positions.shape[0], -1)

    def last_rows(self) -> Tensor:
        """(B, 1) int64, each sample's last real token."""
        if len(set(self.last)) == 1:
            return torch.full((len(self.last), 1), self.last[0], device=self.positions.device)
        return on_device(self.last, self.positions.device)[:, None]

    def first_position(self) -> Tensor:
        """(B, 1) int64, position of each sample's first real token."""
        if self.valid is None:
            return self.positions[:, :1]
        return self.positions.masked_fill(~self.valid, torch.iinfo(torch.int64).max).amin(1, keepdim=True)

    def last_position(self) -> Tensor:
        """(B, 1) int64, position of each sample's last real token."""
        if self.valid is None:
            return self.positions[:, -1:]
        return self.positions.masked_fill(~self.valid, -1).amax(1, keepdim=True)

    def at(self, positions: Tensor) -> Chunk:
        """The same tokens at other positions."""
        return replace(self, positions=positions)


@dataclass
class Prompt:
    """Host facts of the last call that had image tokens: what `run.kept` and `run.report` are made of."""

    runs: list[list[Run]] = field(default_factory=list)  # images of each sample
    lengths: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    seen: int = 0  # columns before the call
    cached: list[int] = field(default_factory=list)  # keys that each layer held before the call
    answers: list[int] | None = None  # ranking rows of each sample (training)


def runs_of(row: list[int]) -> list[Run]:
    """Runs of ones.

    Example:
        >>> runs_of([0, 1, 1, 0, 1])
        [(1, 2), (4, 1)]
    """
    edges = [i for i, (a, b) in enumerate(zip([0, *row], [*row, 0])) if a != b]
    return [(start, end - start) for start, end in zip(edges[::2], edges[1::2])]


def square_of(runs: list[list[Run]]) -> tuple[int, int] | None:
    """(rows, columns) where all images are equally long and fill a square.

    Example:
        >>> square_of([[(4, 16)], [], [(2, 16)]]), square_of([[(4, 15)]])
        ((4, 4), None)
    """
    lengths = {n for sample in runs for _, n in sample}
    side = math.isqrt(max(lengths, default=0))
    return (side, side) if lengths == {side * side} else None


def split_at(runs: list[Run], spans: list[Run]) -> list[Run]:
    """Runs of ones, cut where one span ends and the next begins.

    Example:
        >>> split_at([(1, 5), (8, 2)], [(1, 2), (3, 3), (8, 2)])
        [(1, 2), (3, 3), (8, 2)]
    """
    cuts = {start for start, _ in spans}
    result = []
    for start, n in runs:
        edges = [start, *sorted(cut for cut in cuts if start < cut < start + n), start + n]
        result += [(a, b - a) for a, b in pairwise(edges)]
    return result


def read_chunk(positions: Tensor, image_mask: Tensor | None, valid: Tensor | None, labels: Tensor | None) -> tuple[Chunk, Prompt]:
    """Reads one call's layout on the host: a single device-to-host copy a prompt, none for a decode step.

    Args:
        positions: (B, S) int64; image_mask, valid: (B, S) bool or None; labels: (B, S) or None.
    """
    B, S = positions.shape
    if S == 1 and image_mask is None:  # a decode step's own token is always real: no host read
        return Chunk(1, [1] * B, [0] * B, [0] * B, positions, None, None, None, None), Prompt(lengths=[1] * B, images=[0] * B)
    ones = torch.ones(B, S, dtype=torch.bool, device=positions.device)
    real = ones if valid is None else valid
    image = ~ones if image_mask is None else image_mask & real
    answer = ~ones
    if labels is not None:
        answer = torch.nn.functional.pad((labels[:, :-1] == -100) & (labels[:, 1:] != -100) & real[:, :-1], (0, 1))
    facts = torch.stack([real, image, answer]).cpu()
    counts = facts.sum(-1).tolist()
    reals: list[list[int]] = facts[0].int().tolist()
    runs = [runs_of(row) for row in facts[1].int().tolist()]
    prompt = Prompt(runs, counts[0], counts[1], answers=None if labels is None else counts[2])
    last = [S - 1 - row[::-1].index(1) if 1 in row else S - 1 for row in reals]
    whole = counts[0] == [S] * B
    one_run = all(len(sample) == 1 and sample == runs[0] for sample in runs)
    span = (runs[0][0][0], runs[0][0][0] + runs[0][0][1]) if one_run else None
    any_image = sum(counts[1]) > 0
    right = labels is not None or any(row[-1] == 0 for row in reals)
    chunk = Chunk(
        size=S,
        lengths=counts[0],
        images=counts[1],
        last=last,
        positions=positions,
        origin=None,
        valid=None if whole else valid,
        image_mask=image if any_image and span is None else None,
        span=span,
        labels=labels,
        pad_side="right" if right else "left",
    )
    return chunk, prompt
