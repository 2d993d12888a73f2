"""The decoder side of a sieve: hooks that shorten the sequence between layers and keep masks, positions and caches in step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ..methods.base import DecoderMethod, EncoderMethod, Method, Stage
from .capture import listen
from .drop import Rows, drop, drop_marked, project, rank_held
from .held import CacheState, Held, mask_of
from .images import ImageSource
from .layout import Chunk, Prompt, read_chunk
from .report import Timer
from .support import Parts
from .vision import VisionSieve

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


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
    ranked: tuple[Chunk, list[int]] | None = None  # for a method that ranks again: the tokens and budgets of this call's drop

    @property
    def drops(self) -> bool:
        """Whether this call brings image tokens."""
        return sum(self.prompt.images) > 0


class DecoderSieve:
    """Hooks on one decoder."""

    def __init__(self, parts: Parts, method: Method, images: ImageSource, vision: VisionSieve | None) -> None:
        self.parts, self.method, self.images, self.vision = parts, method, images, vision
        self.stages = method.stages if isinstance(method, DecoderMethod) else (Stage(0, 0),)
        self.renumber = method.renumber if isinstance(method, DecoderMethod) else True
        depth = len(parts.layers)
        beyond = [stage.layer for stage in self.stages if stage.layer >= depth]
        if beyond:
            raise ValueError(f"tokensieve.sieve: {type(method).__name__} drops before layers {beyond}, the model has layers 0..{depth - 1}")
        self.starts = tuple(stage.layer for stage in self.stages)
        self.group_of = [sum(start <= layer for start in self.starts) for layer in range(depth)]
        self.call: Call | None = None
        self.captured: tuple[Tensor, Tensor] | None = None
        self.labels: Tensor | None = None  # the caller's, until a call has shortened them
        self.timer = Timer()
        self.prompt = Prompt()  # of the last call that had image tokens, like all that follows
        self.records: list[Record] = []
        self.chunks: list[Chunk] = []
        self.positions: list[Tensor] = []  # of each group, in the last call of any kind
        self.output: Chunk | None = None  # of the last call with more than one token

    def hooks(self) -> list[Any]:
        """Registers everything on the decoder."""
        decoder = self.parts.decoder
        handles = [decoder.register_forward_pre_hook(self._enter, with_kwargs=True)]
        handles.append(decoder.register_forward_hook(self._leave, always_call=True))
        for index, layer in enumerate(self.parts.layers):
            handles.append(layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True))
        for stage in self.stages:
            if stage.source < stage.layer:
                handles += listen(self.parts.layers[stage.source].self_attn, self._capture, self._wants_capture)
        return handles

    def _capture(self, query: Tensor, key: Tensor) -> None:
        self.captured = (query.detach(), key.detach())

    def _wants_capture(self) -> bool:
        if self.call is None:
            return False
        return self.call.drops or self.call.state.groups[1].image is not None

    def _enter(self, _module: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
        """Before the decoder: reads its arguments, and aligns them with a cache that an encoder method shortened."""
        kwargs = {**dict(zip(_ARGUMENTS, args)), **kwargs}
        padding, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if padding is not None and not (isinstance(padding, Tensor) and padding.dim() == 2):
            shape = tuple(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
            raise ValueError(f"tokensieve.sieve: attention_mask must be (B, S), the padding mask, got {shape}")
        if cache is not None and (getattr(cache, "is_compileable", False) or any(getattr(cache, "is_sliding", ()))):
            raise ValueError(
                f"tokensieve.sieve: past_key_values must be a DynamicCache with full attention (layers hold different numbers of tokens), "
                f"got {type(cache).__name__}"
            )
        state = CacheState.of(cache, self.starts, padding)
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        size = kwargs[name].shape[1]
        if 0 in kwargs[name].shape[:2]:
            raise ValueError(f"tokensieve.sieve: {name} must hold at least one sample and one token, got {tuple(kwargs[name].shape)}")
        if self.starts[0] == 0 and state.groups[1].diverged:
            size = self._cut_again(kwargs, name, state, size)
        if padding is not None and (padding.shape[0] != kwargs[name].shape[0] or padding.shape[1] < size):
            expected = f"(B={kwargs[name].shape[0]}, S={state.seen + size})"
            raise ValueError(f"tokensieve.sieve: attention_mask must be {expected}, got {tuple(padding.shape)}")
        mask = self.images.mask(kwargs[name].shape[0], state.seen, size, kwargs[name].device)
        self.call = Call(padding, mask if mask is None else mask[:, -size:], state)
        return (), kwargs

    def _cut_again(self, kwargs: dict[str, Any], name: str, state: CacheState, size: int) -> int:
        """generate() cuts a conversation by the cache's length, which is shorter than what it stands for: cut what the cache has seen."""
        padding, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if padding is not None:
            total = padding.shape[1]
        elif ids is not None and size > 1:
            total = int(ids[0, -1]) + 1  # no padding, so positions count columns; one host read a turn
        else:
            total = state.seen + size
        if 0 < total - state.seen < size:
            size = total - state.seen
            kwargs[name] = kwargs[name][:, -size:]
            if ids is not None:
                kwargs["position_ids"] = ids[:, -size:]
        if ids is None:
            kwargs["position_ids"] = torch.arange(state.seen, state.seen + size, device=kwargs[name].device)[None]
        return size

    def _leave(self, _module: Any, _args: Any, output: Any) -> None:
        """After the decoder, also when it raised: only a call that went through is remembered."""
        call, self.call, self.captured = self.call, None, None
        if call is None or output is None or not call.chunks:
            return
        for held, chunk, shift in zip(call.state.groups, call.chunks, call.shifts):
            held.extend(chunk, shift, chunk.dropped)
        if call.ranked is not None:
            call.state.groups[1].remember(*call.ranked)
        assert call.first is not None
        call.state.seen += call.first.size
        call.state.store(call.cache)
        self.positions = [chunk.positions for chunk in call.chunks]
        if call.first.size > 1:  # a decode step shortens nothing
            self.output = call.chunks[-1]
        if call.first.labels is not None:
            self.labels = call.chunks[-1].labels
        if call.drops:
            self.prompt, self.chunks = call.prompt, call.chunks

    def _before_layer(self, index: int, _module: Any, args: Any, kwargs: Any) -> Any:
        """Before each layer: drops tokens where a stage begins, and hands in this group's mask and positions."""
        call = self.call
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            self._begin(call, hidden, kwargs)
        group = self.group_of[index]
        for stage in [s for s, start in enumerate(self.starts) if start == index]:
            if call.drops:
                hidden = self._drop(call, stage, hidden, kwargs)
            elif self.captured is not None:
                self._rerank(call, call.state.groups[stage + 1])
            self._settle(call, stage, hidden)
        context = call.contexts[group]
        if context is None:
            return None
        # position_ids with gaps would make flash attention believe in packed sequences; the layers only use the embeddings
        kwargs = {**kwargs, "attention_mask": context[0], "position_embeddings": context[1], "position_ids": None}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _begin(self, call: Call, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        call.cache = kwargs.get("past_key_values")
        B, S = hidden.shape[:2]
        positions = kwargs["position_ids"].expand(B, -1)
        valid = None if call.padding is None else call.padding[:, -S:].to(hidden.device, torch.bool)
        labels = self.labels
        if labels is not None and tuple(labels.shape) != (B, S):
            raise ValueError(f"tokensieve.sieve: labels must be (B, S) = {(B, S)} like the prompt, got {tuple(labels.shape)}")
        call.chunk, call.prompt = read_chunk(positions, call.image_mask, valid, labels)
        call.first = call.chunk
        call.chunks, call.shifts, call.contexts = [call.chunk], [None], [None]
        held = call.state.groups
        call.prompt.seen = call.state.seen
        call.prompt.cached = [held[group].length for group in self.group_of]
        if call.drops:
            self.records = []
            self.timer.clear()

    def _drop(self, call: Call, stage: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        chunk = call.chunk
        if isinstance(self.method, EncoderMethod):
            assert self.vision is not None
            self.timer.start(hidden.device)
            marks, keep = self.vision.choose(chunk.image_tokens(), chunk.images)
            if keep == chunk.images:
                return hidden
            hidden, call.chunk, columns = drop_marked(hidden, chunk, marks, keep)
        else:
            method = self.method
            assert isinstance(method, DecoderMethod)
            keep = [method.keep_count(stage, n) for n in call.prompt.images]
            answers = call.prompt.answers if method.answers_rank else None
            if answers is not None:  # a sample without answers, and one without images, passes unchanged
                keep = [n if rows == 0 else k for k, n, rows in zip(keep, chunk.images, answers)]
            keep = [min(k, n) for k, n in zip(keep, chunk.images)]  # fewer are left only after a cut at max_length
            if keep == chunk.images and (method.max_length is None or max(chunk.lengths) <= method.max_length):
                return hidden
            self.timer.start(hidden.device)
            with torch.no_grad():
                rows = Rows(chunk, answers)
                query, key = self._ranking(call, stage, hidden.detach(), kwargs, rows)
            held = call.state.groups[self.group_of[self.stages[stage].source]]
            hidden, call.chunk, columns = drop(method, hidden, chunk, held, query, key, rows, keep)
            if method.rerank:
                call.ranked = (chunk, keep)
        self.timer.stop()
        self.records.append(Record(stage, columns))
        return hidden

    def _ranking(self, call: Call, stage: int, hidden: Tensor, kwargs: dict[str, Any], rows: Rows) -> tuple[Tensor, Tensor]:
        """Query rows and keys that rank the tokens, post RoPE, cached keys first."""
        layer, source = self.stages[stage].layer, self.stages[stage].source
        if source < layer:
            assert self.captured is not None
            (query, key), self.captured = self.captured, None
            return rows.take(query.transpose(1, 2)).transpose(1, 2), key
        held, context = call.state.groups[stage + 1], call.contexts[-1]
        rope = kwargs["position_embeddings"] if context is None else context[1]
        if held.shift is not None:  # the layer's cached keys count positions their own way
            rope = self.parts.decoder.rotary_emb(hidden, position_ids=self._renumbered(call, call.chunk, held))
        query, key = project(self.parts.layers[layer], hidden, rope, rows)
        if held.length and call.cache is not None:
            key = torch.cat([call.cache.layers[layer].keys, key], 2)
        return query, key

    def _rerank(self, call: Call, held: Held) -> None:
        assert isinstance(self.method, DecoderMethod)
        assert self.captured is not None
        query, key = self.captured
        visible = rank_held(self.method, held, call.chunk, query, key)
        held.valid = visible[:, : held.length]
        call.chunk = replace(call.chunk, valid=visible[:, held.length :])

    def _renumbered(self, call: Call, chunk: Chunk, held: Held) -> Tensor:
        """(B, S) contiguous positions after the held tokens; 0 on pads."""
        assert call.first is not None
        base = call.first.first_position() if held.shift is None else call.first.first_position() - held.shift
        if chunk.valid is None:
            return base + torch.arange(chunk.size, device=base.device)
        return (base + chunk.valid.cumsum(1) - 1).masked_fill(~chunk.valid, 0)

    def _settle(self, call: Call, stage: int, hidden: Tensor) -> None:
        """Positions, shift, mask and rotary embeddings of the group of layers that begins here."""
        held, chunk = call.state.groups[stage + 1], call.chunk
        assert call.first is not None
        shift = held.shift
        if chunk.dropped and self.renumber:
            chunk = chunk.at(self._renumbered(call, chunk, held))
            shift = call.first.last_position() - chunk.last_position()
        elif not chunk.dropped and held.shift is not None:
            chunk = chunk.at(chunk.positions - held.shift)
        context = None
        if chunk.dropped or held.diverged:
            visible = None
            if chunk.valid is not None or held.valid is not None:
                visible = torch.cat([held.visible(chunk), mask_of(chunk)], 1)
            decoder, layer = self.parts.decoder, self.stages[stage].layer
            mask = create_causal_mask(decoder.config, hidden, visible, call.cache, layer_idx=layer)
            context = (mask, decoder.rotary_emb(hidden, position_ids=chunk.positions))
        call.chunks.append(chunk)
        call.shifts.append(shift)
        call.contexts.append(context)
        if chunk.dropped:
            call.chunk = chunk
