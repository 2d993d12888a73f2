"""What a sieve remembers of one forward call of the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .held import CacheState
from .layout import Chunk, Prompt


@dataclass
class Record:
    """One drop of the last prompt."""

    stage: int
    columns: Tensor  # (B, K) int64, input columns that were kept, -1 on pads


@dataclass
class Call:
    """One forward call of the decoder."""

    padding: Tensor | None  # (B, total) mask that the caller gave
    image_mask: Tensor | None
    state: CacheState
    cache: Any = None
    chunk: Any = None  # Chunk, as it is before the current layer
    first: Chunk | None = None  # as it came in
    prompt: Prompt = field(default_factory=Prompt)
    chunks: list[Chunk] = field(default_factory=list)  # of each group of layers
    shifts: list[Tensor | None] = field(default_factory=list)
    contexts: list[Any] = field(default_factory=list)  # (mask, rope) of each group; None = what the model itself made
    away: dict[int, tuple[Tensor, Chunk, Tensor]] = field(default_factory=dict)  # of each stage: what its tokens return to, and where
    embeddings: Tensor | None = None
    scratch: dict[str, Any] = field(default_factory=dict)  # a method's own
    ranked: tuple[Chunk, list[int]] | None = None  # for a method that ranks again: the tokens and budgets of this call's drop

    @property
    def drops(self) -> bool:
        """Whether this call brings image tokens."""
        return sum(self.prompt.images) > 0
