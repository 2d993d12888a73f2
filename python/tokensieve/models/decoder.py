"""The decoder side of a sieve: hooks that shorten the sequence between layers and keep masks, positions and caches in step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .. import ops
from ..methods.base import DecoderMethod, EncoderMethod, Method, Stage
from ..methods.positions import token_mask
from ..methods.views import StageView
from .active import guard
from .call import Call, Record
from .capture import listen
from .drop import AllRows, Dropped, Rows, counted, drop, drop_marked, project, put_back, rank_held, reordered
from .held import CacheState, Held, mask_of
from .images import ImageSource
from .layout import Chunk, Prompt, Run, read_chunk, square_of
from .points import points_of
from .report import Timer
from .support import Parts
from .vision import VisionSieve

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache")


class DecoderSieve:
    """Hooks on one decoder."""

    def __init__(self, parts: Parts, method: Method, images: ImageSource, vision: VisionSieve | None) -> None:
        self.parts, self.method, self.images, self.vision = parts, method, images, vision
        self.stages = method.stages if isinstance(method, DecoderMethod) else (Stage(0),)
        self.renumber = method.renumber if isinstance(method, DecoderMethod) else True
        self.selects = type(method).select is not DecoderMethod.select if isinstance(method, DecoderMethod) else False  # else it ranks
        depth = len(parts.layers)
        self.points = points_of(method, self.stages, depth)
        self.starts = tuple(point.layer for point in self.points)
        self.group_of = [sum(start <= layer for start in self.starts) for layer in range(depth)]
        self.call: Call | None = None
        self.captured: dict[int | None, tuple[Tensor, Tensor]] = {}  # of each source layer, until its stage has used it
        self.labels: Tensor | None = None  # the caller's, until a call has shortened them
        self.timer = Timer()
        self.prompt = Prompt()  # of the last call that had image tokens, like all that follows
        self.records: list[Record] = []
        self.chunks: list[Chunk] = []
        self.positions: list[Tensor] = []  # of each group, in the last call of any kind
        self.state: dict[str, Any] = {}  # the method's own
        self.output: Chunk | None = None  # of the last call with more than one token

    def hooks(self) -> list[Any]:
        """Registers everything on the decoder."""
        decoder = self.parts.decoder
        handles = guard(decoder, self._enter, self._leave)
        for index, layer in enumerate(self.parts.layers):
            handles.append(layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True))
        for source in {stage.source for stage in self.stages if stage.source not in (None, stage.layer) and stage.rope}:
            handles += listen(self.parts.layers[source].self_attn, partial(self._capture, source), self._wants_capture)
        return handles

    def _capture(self, source: int, query: Tensor, key: Tensor) -> None:
        self.captured[source] = (query.detach(), key.detach())

    def _wants_capture(self) -> bool:
        if self.call is None:
            return False
        if self.call.drops:
            return sum(self.call.chunk.left) > 0
        return self.call.state.groups[1].image is not None

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
        if self.group_of[0] > 0 and state.groups[self.group_of[0]].diverged:
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
        call, self.call, self.captured = self.call, None, {}
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
            self.prompt, self.chunks, self.state = call.prompt, call.chunks, call.scratch

    def _before_layer(self, index: int, _module: Any, args: Any, kwargs: Any) -> Any:
        """Before each layer: drops tokens where a stage begins, and hands in this group's mask and positions."""
        call = self.call
        if call is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            self._begin(call, hidden, kwargs)
        group = self.group_of[index]
        for number, point in enumerate(self.points):
            if point.layer != index:
                continue
            if point.back:
                hidden = self._bring_back(call, point.stage, hidden)
            elif call.drops:
                hidden = self._drop(call, point.stage, hidden, kwargs)
                self.captured.pop(self.stages[point.stage].source, None)  # also where nothing was to drop: these are large
            elif self.captured:
                self._rerank(call, call.state.groups[number + 1])
            self._settle(call, number, hidden)
        for stage in self.stages:
            if stage.source == index < stage.layer and not stage.rope and call.drops and sum(call.chunk.left) > 0:
                with torch.no_grad():
                    self.captured[index] = project(self.parts.layers[index], hidden.detach(), None, self._rows(call, stage))
        context = call.contexts[group]
        if context is not None:
            # position_ids with gaps would make flash attention believe in packed sequences; the layers only use the embeddings
            kwargs = {**kwargs, "attention_mask": context[0], "position_embeddings": context[1], "position_ids": None}
        elif index not in self.starts:
            return None
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
            if getattr(self.method, "embeddings", False):
                call.embeddings = hidden

    def _drop(self, call: Call, stage: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        chunk = call.chunk
        if sum(chunk.left) == 0:
            return hidden
        if isinstance(self.method, EncoderMethod):
            after = self._drop_encoded(call, hidden)
        elif self.selects:
            after = self._drop_selected(call, stage, hidden, kwargs)
        else:
            after = self._drop_ranked(call, stage, hidden, kwargs)
        if after is None:
            return hidden
        self.timer.stop()
        if self.stages[stage].until is not None:
            call.away[stage] = (hidden, chunk, after[3])
        call.chunk = after[1]
        self.records.append(Record(stage, after[2]))
        return after[0]

    def _drop_encoded(self, call: Call, hidden: Tensor) -> Dropped | None:
        """An encoder method's tokens leave."""
        assert self.vision is not None
        chunk = call.chunk
        self.timer.start(hidden.device)
        choice = self.vision.choose(chunk.image_tokens(), chunk.images, hidden, call.scratch)
        if choice.keep == chunk.images and choice.source is None and choice.hidden is None:
            return None
        hidden = hidden if choice.hidden is None else choice.hidden
        return drop_marked(hidden, chunk, choice.marks, choice.keep, source=choice.source)

    def _counts(self, call: Call, stage: int) -> list[int] | None:
        """Image tokens that `keep_count` leaves of each sample."""
        method, left = self.method, call.chunk.left
        assert isinstance(method, DecoderMethod)
        counts = [method.keep_count(stage, n) for n in call.prompt.images]
        if None in counts:
            return None
        answers = call.prompt.answers if method.answers_rank else None
        if answers is not None:  # a sample without answers, and one without images, passes unchanged
            counts = [n if rows == 0 else k for k, n, rows in zip(counts, left, answers)]
        return [min(k, n) for k, n in zip(counts, left) if k is not None]  # fewer are left only after a cut at max_length

    def _drop_ranked(self, call: Call, stage: int, hidden: Tensor, kwargs: dict[str, Any]) -> Dropped | None:
        """The default: the last row ranks, in one fused op."""
        method, chunk, keep = self.method, call.chunk, self._counts(call, stage)
        assert isinstance(method, DecoderMethod)
        assert keep is not None, f"{type(method).__name__}.keep_count must give a count where it has no select"
        if keep == chunk.left and (method.max_length is None or max(chunk.lengths) <= method.max_length):
            return None
        self.timer.start(hidden.device)
        rows = self._rows(call, self.stages[stage])
        with torch.no_grad():
            query, key = self._ranking(call, self.stages[stage], hidden.detach(), kwargs, rows)
        source = self.stages[stage].source
        assert source is not None
        assert query is not None
        assert key is not None
        if method.rerank:
            call.ranked = (chunk, keep)
        return drop(method, hidden, chunk, call.state.groups[self.group_of[source]], query, key, rows, keep)

    def _drop_selected(self, call: Call, stage: int, hidden: Tensor, kwargs: dict[str, Any]) -> Dropped | None:
        """A method with its own `select`."""
        method, chunk, keep = self.method, call.chunk, self._counts(call, stage)
        assert isinstance(method, DecoderMethod)
        if keep == chunk.left:
            return None
        self.timer.start(hidden.device)
        view = self._view(call, stage, hidden, kwargs, keep)
        with torch.no_grad():
            index = method.select(view)
            if index is None:
                return None
            marks = token_mask(index, chunk.size) & view.image_mask
            keep = counted(method, marks, keep)
        new = method.replace(view, index)
        if new is not None:
            hidden = put_back(hidden, index, new)
        if keep == chunk.left and new is None and not method.ordered:
            return None
        source = reordered(index, chunk.size) if method.ordered else None
        return drop_marked(hidden, chunk, marks, keep, source=source, renumber=self.renumber, masking=method.masking)

    def _rows(self, call: Call, stage: Stage) -> Rows | AllRows:
        """The rows that a stage reads."""
        method = self.method
        assert isinstance(method, DecoderMethod)
        if stage.rows == "all":
            return AllRows(call.chunk, self._real(call))
        return Rows(call.chunk, call.prompt.answers if method.answers_rank else None)

    def _real(self, call: Call) -> Tensor | None:
        """(B, S) bool, no padding; a token that a masking method hid is real."""
        assert call.first is not None
        return call.chunk.valid if call.chunk.shown is None else call.first.valid

    def _ranking(
        self, call: Call, stage: Stage, hidden: Tensor, kwargs: dict[str, Any], rows: Rows | AllRows
    ) -> tuple[Tensor | None, Tensor | None]:
        """Query rows and keys that a stage reads, cached keys first."""
        layer, source = stage.layer, stage.source
        if source is None:
            return None, None
        if source < layer:
            query, key = self.captured.pop(source)
            return rows.take(query.transpose(1, 2)).transpose(1, 2) if stage.rope else query, key
        if not stage.rope:
            return project(self.parts.layers[layer], hidden, None, rows)
        held, context = call.state.groups[self.group_of[layer]], call.contexts[-1]
        rope = kwargs["position_embeddings"] if context is None else context[1]
        if held.shift is not None:  # the layer's cached keys count positions their own way
            rope = self.parts.decoder.rotary_emb(hidden, position_ids=self._renumbered(call, call.chunk, held))
        query, key = project(self.parts.layers[layer], hidden, rope, rows)
        if held.length and call.cache is not None:
            key = torch.cat([call.cache.layers[layer].keys, key], 2)
        return query, key

    def _view(self, call: Call, number: int, hidden: Tensor, kwargs: dict[str, Any], counts: list[int] | None) -> StageView:
        """What `select` sees."""
        method, chunk, stage = self.method, call.chunk, self.stages[number]
        assert isinstance(method, DecoderMethod)
        rows = self._rows(call, stage)
        with torch.no_grad():
            query, key = self._ranking(call, stage, hidden.detach(), kwargs, rows)
        held = call.state.groups[self.group_of[stage.layer if stage.source is None else stage.source]]
        visible = None
        if chunk.valid is not None or held.valid is not None:
            visible = torch.cat([held.visible(chunk), mask_of(chunk)], 1)
        runs = self.image_runs(call.prompt)
        return StageView(
            stage=number,
            hidden=hidden,
            image_mask=chunk.image_tokens() if chunk.shown is None else chunk.image_tokens() & mask_of(chunk),
            visible=visible,
            real=self._real(call),
            positions=chunk.positions,
            columns=chunk.columns(),
            images=list(chunk.left),
            lengths=list(chunk.lengths),
            full=list(call.prompt.images),
            last=list(chunk.last),
            counts=counts,
            query=query,
            key=key,
            query_positions=None if key is None else rows.positions(key.shape[2] - chunk.size),
            state=call.scratch,
            runs=runs,
            side=square_of(runs) if self.vision is None else None if self.parts.anyres else self.vision.side,
            norm=self.parts.decoder.norm,
            embeddings=call.embeddings,
        )

    def image_runs(self, prompt: Prompt) -> list[list[Run]]:
        """(start, length) of every image of every sample; neighbours are told apart where their sizes are known."""
        if self.images.spans is not None:
            return self.images.split_runs(prompt)
        if self.vision is None or self.images.given is not None:
            return prompt.runs
        return self.vision.split_runs(prompt.runs)

    def _bring_back(self, call: Call, stage: int, hidden: Tensor) -> Tensor:
        """Tokens that skipped layers return to their places."""
        if stage not in call.away:
            return hidden
        assert isinstance(self.method, DecoderMethod)
        before, call.chunk, index = call.away.pop(stage)
        rows, image = ops.gather_tokens((before, call.chunk.image_tokens()), index)
        return put_back(before, index, self.method.restore(stage, rows, hidden, image))

    def _rerank(self, call: Call, held: Held) -> None:
        assert isinstance(self.method, DecoderMethod)
        assert self.captured is not None
        (query, key), *_ = self.captured.values()
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

    def _settle(self, call: Call, number: int, hidden: Tensor) -> None:
        """Positions, shift, mask and rotary embeddings of the group of layers that begins at a point."""
        held, chunk = call.state.groups[number + 1], call.chunk
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
            decoder, layer = self.parts.decoder, self.starts[number]
            mask = create_causal_mask(decoder.config, hidden, visible, call.cache, layer_idx=layer)
            context = (mask, decoder.rotary_emb(hidden, position_ids=chunk.positions))
        call.chunks.append(chunk)
        call.shifts.append(shift)
        call.contexts.append(context)
        if chunk.dropped:
            call.chunk = chunk
