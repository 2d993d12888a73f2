"""One drop step inside a model: from hidden states and a layout to shorter ones."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..methods.base import DecoderMethod
from ..methods.positions import token_mask
from ..methods.step import IGNORE, answer_rows, prune_ragged, prune_span, select_sequence
from ..ops import _debug
from .held import Held, mask_of
from .layout import Chunk, read_chunk

Dropped = tuple[Tensor, Chunk, Tensor, Tensor]  # hidden states, layout, input columns (B, K), index in the chunk before


class AllRows:
    """Every row of a call; each sees the keys before it and itself. real: (B, S) bool, rows that are no padding; None = all."""

    def __init__(self, chunk: Chunk, real: Tensor | None) -> None:
        self.chunk, self.real = chunk, real

    def take(self, x: Tensor) -> Tensor:
        """(B, S, ...), all rows."""
        return x

    def positions(self, cached: int) -> Tensor:
        """(B, S) last key that each row sees; -1 for padding."""
        columns = torch.arange(cached, cached + self.chunk.size, device=self.chunk.positions.device)
        columns = columns.expand(self.chunk.positions.shape[0], -1)
        return columns if self.real is None else columns.masked_fill(~self.real, -1)


class Rows:
    """The ranking rows of a call: the last real token of each sample, or in training the token before each answer."""

    def __init__(self, chunk: Chunk, answers: list[int] | None) -> None:
        self.column = chunk.last[0] if answers is None and len(set(chunk.last)) == 1 else None
        self.sees_all = self.column == chunk.size - 1  # the very last column: no causal limit to pass on
        if answers is not None and chunk.labels is not None:
            self.index = answer_rows(chunk.labels, max(answers), chunk.valid)
        else:
            self.index = chunk.last_rows()

    def take(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (B, L, ...), the ranking rows."""
        return ops.gather_tokens(x, self.index) if self.column is None else x[:, self.column : self.column + 1]

    def positions(self, cached: int) -> Tensor | None:
        """(B, L) last key that each row sees; None where each sees all."""
        return None if self.sees_all else torch.where(self.index < 0, -1, self.index + cached)


def project(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor] | None, rows: Rows | AllRows) -> tuple[Tensor, Tensor]:
    """Queries of the ranking rows (B, H, L, D) and keys of all tokens (B, Hkv, S, D), as the layer about to run would make them.

    rope is (cos, sin), or None for queries and keys before it.
    """
    attention = layer.self_attn
    rotate_half = sys.modules[type(attention).__module__].rotate_half
    normed = layer.input_layernorm(hidden)
    if rope is None:
        query, key = attention.q_proj(rows.take(normed)), attention.k_proj(normed)
        return heads(query, attention), heads(key, attention)
    cos, sin = (x.expand(hidden.shape[0], -1, -1) for x in rope)

    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = heads(x, attention)
        return x * cos[:, None] + rotate_half(x) * sin[:, None]

    query = rotated(attention.q_proj(rows.take(normed)), rows.take(cos), rows.take(sin))
    return query, rotated(attention.k_proj(normed), cos, sin)


def heads(x: Tensor, attention: Any) -> Tensor:
    """(B, S, H * D) projections -> (B, H, S, D)."""
    return x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def drop(
    method: DecoderMethod, hidden: Tensor, chunk: Chunk, held: Held, query: Tensor, key: Tensor, rows: Rows | AllRows, keep: list[int]
) -> Dropped:
    """Ranks the image tokens of a call and removes (or, for a masking method, hides) all but `keep` of each sample.

    Args:
        query, key: (B, H, L, D) and (B, Hkv, M, D); the last S keys are the call's tokens, those before are held in the cache.

    Returns:
        Hidden states, layout after the step, the input columns (B, K) that were kept, and where they stood in this chunk; -1 on pads.
    """
    cached = key.shape[2] - chunk.size
    totals = [length - n + k for length, n, k in zip(chunk.lengths, chunk.images, keep)]
    if method.max_length is not None and max(totals) > method.max_length:
        cut = [min(total, method.max_length) for total in totals]
    else:
        cut = totals
    extra = _extras(method, chunk)
    uniform = chunk.span is not None and chunk.valid is None and cached == 0 and len(set(keep)) == 1
    if uniform and cut == totals and not method.masking:
        assert chunk.span is not None
        options: Any = {"normalize": method.normalize, "query_positions": rows.positions(0)}
        step = prune_span(query, key, [hidden, *extra.values()], keep[0], chunk.span, **options)
    else:
        valid = None
        if chunk.valid is not None or held.valid is not None:
            valid = torch.cat([held.visible(chunk), mask_of(chunk)], 1)
        extra["image_mask"] = chunk.image_tokens() if chunk.shown is None else chunk.image_tokens() & mask_of(chunk)
        step = prune_ragged(
            query,
            key,
            [extra["columns"]] if method.masking else [hidden, *extra.values()],
            totals,
            image_mask=extra["image_mask"],
            valid_mask=valid,
            query_positions=rows.positions(cached),
            normalize=method.normalize,
            max_length=method.max_length,
            pad_side=chunk.pad_side,
        )
        uniform = False
    if method.masking:
        columns = step.tensors[0].masked_fill(step.index < 0, -1)
        return hidden, replace(chunk, valid=token_mask(step.index, chunk.size), dropped=True, shown=list(keep)), columns, step.index
    after = _shorter(chunk, step.index, dict(zip(extra, step.tensors[1:])), keep, cut, uniform)
    if cut != totals and any(c < t for c, t in zip(cut, totals)):  # a cut may have taken image tokens: count them again
        after = _reread(after)
    assert after.origin is not None
    return step.tensors[0], after, after.origin, step.index


def drop_marked(
    hidden: Tensor,
    chunk: Chunk,
    marks: Tensor,
    keep: list[int],
    *,
    source: Tensor | None = None,
    renumber: bool = True,
    masking: bool = False,
) -> Dropped:
    """Removes (or hides) the image tokens that a method did not mark.

    Args:
        marks: (B, S) bool, image tokens that stay; keep: how many they are of each sample.
        source: (B, S) int64, which token comes to each place; None = its own.

    Returns:
        As `drop`.
    """
    image = chunk.image_tokens()
    text = ~image if chunk.valid is None else chunk.valid & ~image
    if masking:
        seen = text | marks
        columns = chunk.columns().masked_fill(~seen, -1)
        return hidden, replace(chunk, valid=seen, dropped=True, shown=list(keep)), columns, columns
    totals = [length - n + k for length, n, k in zip(chunk.lengths, chunk.images, keep)]
    extra = {"columns": chunk.columns(), "image_mask": marks}
    if not renumber:
        extra["positions"] = chunk.positions
    if chunk.labels is not None:
        extra["labels"] = chunk.labels
    index = select_sequence(marks.float(), marks, text | marks, totals, pad_side=chunk.pad_side)
    if source is not None:
        index = torch.where(index < 0, -1, source.gather(1, index.clamp(min=0)))
    tensors = ops.gather_tokens((hidden, *extra.values()), index)
    after = _shorter(chunk, index, dict(zip(extra, tensors[1:])), keep, totals, False)
    assert after.origin is not None
    return tensors[0], after, after.origin, index


def counted(method: object, marks: Tensor, promised: list[int] | None, noun: str = "samples") -> list[int]:
    """How many tokens are marked of each row of (B, S) marks: what `keep_count` promised, or read from them, one host read.

    Raises:
        ValueError: they are not what was promised. Looked at on the CPU, where it costs nothing, and under `debug_checks`.
    """
    if promised is not None and marks.device.type != "cpu" and not _debug.enabled:
        return promised
    found: list[int] = marks.sum(1).tolist()
    if promised is not None and found != promised:
        name = type(method).__name__
        raise ValueError(
            f"tokensieve.sieve: {name}.select must keep the {promised} image tokens of its {noun} that keep_count says, got {found}"
        )
    return found


def put_back(before: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """(B, S, C) with the rows (B, K, C) at their places `index` (B, K), -1 = none."""
    wide = torch.nn.functional.pad(before, (0, 0, 0, 1))
    place = torch.where(index < 0, before.shape[1], index)
    return wide.scatter(1, place[..., None].expand_as(rows), rows.to(before.dtype))[:, :-1].contiguous()


def reordered(index: Tensor, size: int) -> Tensor:
    """(B, K) tokens in the order of a method, -1 = none -> (B, size) which token comes to each place, for them to follow that order."""
    order = torch.arange(index.shape[1], device=index.device).expand_as(index)
    rank = torch.full((index.shape[0], size + 1), size, device=index.device)
    rank = rank.scatter_(1, torch.where(index < 0, size, index), order)[:, :size]
    places, tokens = (rank >= size).to(torch.int8).argsort(dim=1, stable=True), rank.argsort(dim=1, stable=True)
    return torch.empty_like(places).scatter_(1, places, tokens)


def rank_held(method: DecoderMethod, held: Held, chunk: Chunk, query: Tensor, key: Tensor) -> Tensor:
    """(B, M) bool, keys that stay visible when the newest token ranks the held image tokens again; query and key of the whole call."""
    assert held.image is not None
    assert held.text is not None
    image = torch.nn.functional.pad(held.image, (0, chunk.size))
    text = torch.cat([held.text, mask_of(chunk)], 1)
    totals = [total + length for total, length in zip(held.totals, chunk.lengths)]
    rows = Rows(chunk, None)
    query = rows.take(query.transpose(1, 2)).transpose(1, 2)
    options: Any = {"image_mask": image, "valid_mask": image | text, "normalize": method.normalize}
    options["query_positions"] = rows.positions(key.shape[2] - chunk.size)
    step = prune_ragged(query, key, [image], totals, **options)
    return token_mask(step.index, key.shape[2])


def _extras(method: DecoderMethod, chunk: Chunk) -> dict[str, Tensor]:
    """What shrinks along with the hidden states."""
    extra = {"columns": chunk.columns()}
    if not method.renumber:
        extra["positions"] = chunk.positions
    if chunk.labels is not None:
        extra["labels"] = chunk.labels
    return extra


def _shorter(chunk: Chunk, index: Tensor, gathered: dict[str, Tensor], images: list[int], lengths: Sequence[int], uniform: bool) -> Chunk:
    """The layout after a step; positions are the gathered ones, or stale for the caller to renumber."""
    if index.shape[1] == 0:
        raise ValueError("tokensieve.sieve: a prompt must keep at least one token, got image tokens alone and a method that keeps none")
    size, full = index.shape[1], min(lengths) == index.shape[1]
    pads = None if full else index < 0
    origin = gathered["columns"] if pads is None else gathered["columns"].masked_fill(pads, -1)
    labels = gathered.get("labels")
    return replace(
        chunk,
        size=size,
        lengths=list(lengths),
        images=list(images),
        last=[size - 1] * len(lengths) if chunk.pad_side == "left" else [max(n - 1, 0) for n in lengths],
        positions=gathered.get("positions", origin),
        origin=origin,
        valid=None if pads is None else ~pads,
        image_mask=None if uniform else gathered["image_mask"],
        span=(chunk.span[0], chunk.span[0] + images[0]) if uniform and chunk.span else None,
        labels=None if labels is None else labels if pads is None else labels.masked_fill(pads, IGNORE),
        dropped=True,
    )


def _reread(chunk: Chunk) -> Chunk:
    """Counts again on the host, after a cut at max_length."""
    fresh, _ = read_chunk(chunk.positions, chunk.image_tokens(), chunk.valid, chunk.labels)
    return replace(fresh, origin=chunk.origin, pad_side=chunk.pad_side, dropped=True)
