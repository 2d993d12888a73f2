"""Where the image tokens of a prompt are: said by the caller, or read from the placeholders of a multimodal model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .layout import Prompt, Run, split_at
from .support import Parts

Span = tuple[int, int]  # (start, length)


class ImageSource:
    """Gives the decoder hooks a (B, S) image mask for every call."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.given: Tensor | None = None
        self.spans: list[list[Span]] | None = None
        self.pending: Tensor | None = None
        if parts.multimodal is not None:
            self._names = list(inspect.signature(type(parts.multimodal).forward).parameters)[1:]

    def say(self, image_mask: Tensor | None, spans: Sequence[Any] | None) -> None:
        """Takes the caller's word: a (B, S) bool mask, or (start, length) spans for all samples or a list of them for each."""
        if image_mask is not None and spans is not None:
            raise ValueError("tokensieve.sieve: give image_mask or spans, not both")
        if image_mask is not None and not isinstance(image_mask, Tensor):
            raise TypeError(f"tokensieve.sieve: image_mask must be a torch.Tensor, got {type(image_mask).__name__}")
        if image_mask is not None and (image_mask.dtype != torch.bool or image_mask.dim() != 2):
            raise ValueError(f"tokensieve.sieve: image_mask must be (B, S) bool, got {tuple(image_mask.shape)} {image_mask.dtype}")
        self.given, self.spans = image_mask, None if spans is None else _read_spans(spans)

    def hooks(self) -> list[Any]:
        """Hooks on the multimodal model, which sees the placeholders."""
        if self.parts.multimodal is None:
            return []
        module = self.parts.multimodal
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, always_call=True),
        ]

    def _before(self, module: Any, args: Any, kwargs: Any) -> None:
        call = {**dict(zip(self._names, args)), **kwargs}
        pixels, encoded = call.get("pixel_values"), call.get("mm_encoder_outputs") or {}
        if (pixels is None or pixels.shape[0] == 0) and encoded.get("image") is None:
            self.pending = None  # a decode step, or text: a generated placeholder id is no image
            return
        ids, embeds, token = call.get("input_ids"), call.get("inputs_embeds"), module.config.image_token_id
        if ids is not None:
            self.pending = ids == token
        elif embeds is not None:
            placeholder = module.get_input_embeddings()(torch.full((), token, dtype=torch.long, device=embeds.device))
            self.pending = (embeds == placeholder).all(-1)

    def _after(self, _module: Any, _args: Any, _output: Any) -> None:
        self.pending = None

    def split_runs(self, prompt: Prompt) -> list[list[Run]]:
        """The runs of a prompt's image tokens, cut where one of the caller's spans ends and the next begins."""
        assert self.spans is not None
        repeats = len(prompt.runs) // len(self.spans)
        moved = [[(start - prompt.seen, n) for start, n in sample] for sample in self.spans for _ in range(repeats)]
        return [split_at(runs, spans) for runs, spans in zip(prompt.runs, moved)]

    def mask(self, batch: int, start: int, size: int, device: torch.device) -> Tensor | None:
        """(B, S) bool of the incoming columns [start, start + size), or None where none of them is an image token."""
        if self.given is None and self.spans is None:
            if self.parts.multimodal is None and start == 0 and size > 1:
                raise ValueError(
                    f"tokensieve.sieve: {type(self.parts.model).__name__} does not say where its image tokens are: pass image_mask=... or "
                    "spans=... to sieve, or call run.set_images (spans=[] for a prompt without images)"
                )
            return self.pending
        if self.spans is not None:
            columns = torch.arange(start, start + size, device=device)
            rows = [
                sum(((columns >= s) & (columns < s + n) for s, n in sample), torch.zeros_like(columns, dtype=torch.bool))
                for sample in self.spans
            ]
            end = max((s + n for sample in self.spans for s, n in sample), default=0)
            mask = torch.stack(rows).bool()
        else:
            assert self.given is not None
            end = self.given.shape[1]
            mask = self.given[:, start : start + size].to(device)
            mask = torch.nn.functional.pad(mask, (0, size - mask.shape[1]))
        if start >= end:
            return None
        if batch % mask.shape[0]:
            raise ValueError(f"tokensieve.sieve: images were given for {mask.shape[0]} samples, got a batch of {batch}")
        return mask.repeat_interleave(batch // mask.shape[0], 0)  # beams and several returned sequences repeat each sample


def _read_spans(spans: Any) -> list[list[Span]]:
    """The spans of each sample, or of all samples in one list."""
    rule = "spans must be (start, length) pairs of ints from 0 on that do not overlap, for all samples or a list of them for each"
    wrong = TypeError(f"tokensieve.sieve: {rule}, got {spans!r}")
    if isinstance(spans, (str, dict, Tensor)) or not isinstance(spans, Sequence):
        raise wrong
    samples = spans if any(_is_sample(entry) for entry in spans) else [spans]
    result = []
    for sample in samples:
        if not _is_sample(sample):
            raise wrong
        pairs = [(int(start), int(length)) for start, length in sample]
        ends = [0, *(start + length for start, length in sorted(pairs))]
        if any(length < 0 or start < end for (start, length), end in zip(sorted(pairs), ends)):
            raise ValueError(f"tokensieve.sieve: {rule}, got {spans!r}")
        result.append(pairs)
    return result


def _is_sample(entry: Any) -> bool:
    """Whether it is a sequence of (start, length) pairs."""
    return isinstance(entry, Sequence) and not isinstance(entry, str) and all(_is_pair(part) for part in entry)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, Sequence) and len(entry) == 2 and all(isinstance(n, Integral) for n in entry)
