"""The object that a sieve gives: attach and detach, and what happened."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..flops import decoder_layer_flops
from ..methods.base import DecoderMethod, EncoderMethod, Method, TensorMethod
from .active import claim, release, require_uncompiled
from .decoder import DecoderSieve
from .images import ImageSource
from .layout import Chunk, runs_of
from .report import Report
from .support import find_parts
from .vision import VisionSieve


class SieveRun:
    """A method attached to a model, between `with sieve(...)` and its end, or `attach` and `detach`.

    After a forward or `generate` call: `report`, `kept`, `overlay(image)`; `output_columns`, `output_mask` and `labels` say what the rows
    of a shortened output are.
    """

    def __init__(self, model: Any, method: Method, image_mask: Tensor | None = None, spans: Sequence[Any] | None = None) -> None:
        if isinstance(method, TensorMethod):
            raise TypeError(f"tokensieve.sieve: {type(method).__name__} is called through the functions of {type(method).__module__}")
        if not isinstance(method, (DecoderMethod, EncoderMethod)):
            got = f"the class {method.__name__}; call it" if isinstance(method, type) else type(method).__name__
            raise TypeError(f"tokensieve.sieve: method must be an instance from tokensieve.methods, got {got}")
        self.method = method
        self._parts = find_parts(model)
        self._held = [module for module in (self._parts.decoder, self._parts.vision) if module is not None]
        self._images = ImageSource(self._parts)
        self._images.say(image_mask, spans)
        needs_vision = self._parts.multimodal is not None or isinstance(method, EncoderMethod)
        self._vision = VisionSieve(self._parts, method) if needs_vision else None
        self._decoder = DecoderSieve(self._parts, method, self._images, self._vision)
        self._handles: list[Any] = []
        self._state = "new"
        self._loss: Any = None

    def __enter__(self) -> SieveRun:
        if self._state != "new":
            raise RuntimeError(
                f"tokensieve.sieve: a sieve is used once, this one is {self._state}; make a new one with sieve(model, method)"
            )
        claim(self._parts.model, self._held, self)
        try:
            self._attach()
        except BaseException:
            self._detach()
            release(self._held)
            raise
        self._state = "attached"
        return self

    def __exit__(self, *_: object) -> None:
        if self._state == "attached":
            self._detach()
            release(self._held)
            self._state = "finished"

    def _attach(self) -> None:
        require_uncompiled(self._parts.model)
        self._handles += self._decoder.hooks() + self._images.hooks()
        if self._vision is not None:
            self._handles += self._vision.hooks()
            self._vision.attach()
        head = self._parts.head
        if head is not None:
            names = list(inspect.signature(type(head).forward).parameters)[1:]

            def before(_module: Any, args: Any, kwargs: Any) -> None:
                self._decoder.labels = {**dict(zip(names, args)), **kwargs}.get("labels")

            self._handles.append(head.register_forward_pre_hook(before, with_kwargs=True))
            self._loss = vars(head).get("_loss_function")
            loss = head.loss_function

            def shortened_loss(logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                short = self._decoder.labels
                return loss(logits, labels if short is None else short, *args, **kwargs)

            head.loss_function = shortened_loss

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._vision is not None:
            self._vision.detach()
        head = self._parts.head
        if head is not None and "_loss_function" in vars(head):
            if self._loss is None:
                del head._loss_function
            else:
                head.loss_function = self._loss

    def set_images(self, image_mask: Tensor | None = None, spans: Sequence[Any] | None = None) -> None:
        """Says where the image tokens of the next prompts are; arguments as in `sieve`."""
        self._images.say(image_mask, spans)

    @property
    def labels(self) -> Tensor | None:
        """(B, S') labels of the last call, shortened like its output; None where the call had none."""
        return self._decoder.labels

    @property
    def output_columns(self) -> Tensor:
        """(B, S') int64: which column of the prompt (the last call with more than one token) each output row is; -1 on pads."""
        return self._output().columns()

    @property
    def output_mask(self) -> Tensor:
        """(B, S') bool: output rows of the prompt that are real tokens; of a masking method, that later tokens see."""
        output = self._output()
        return torch.ones_like(output.positions, dtype=torch.bool) if output.valid is None else output.valid

    @property
    def positions(self) -> list[Tensor]:
        """Of each layer, the (B, S') RoPE positions that it used in the last call."""
        return [self._decoder.positions[group] for group in self._decoder.group_of]

    def _output(self) -> Chunk:
        if self._decoder.output is None:
            raise RuntimeError("tokensieve.sieve: nothing has run yet")
        return self._decoder.output

    @property
    def kept(self) -> list[list[list[Tensor]]]:
        """kept[stage][sample][image]: int64 patch positions, counted within the image as the prompt packs it, ascending."""
        decoder, result = self._decoder, []
        images = decoder.image_runs(decoder.prompt)
        columns = {record.stage: record.columns.cpu() for record in decoder.records}
        everything = torch.arange(max((s + n for sample in images for s, n in sample), default=0)).expand(len(images), -1)
        current = everything
        for stage in range(len(decoder.stages)):
            current = columns.get(stage, current)  # a stage that dropped nothing kept what there was
            result.append(
                [[row[(row >= start) & (row < start + n)] - start for start, n in sample] for row, sample in zip(current, images)]
            )
        return result

    @property
    def state(self) -> dict[str, Any]:
        """What the method noted down in `view.state` during the last prompt with image tokens."""
        return self._decoder.state

    @property
    def report(self) -> Report:
        """Tokens and FLOPs per layer of the last prompt with image tokens, and the time of its prune steps."""
        decoder = self._decoder
        prompt, config = decoder.prompt, self._parts.decoder.config
        if not prompt.lengths:
            raise RuntimeError("tokensieve.sieve: no prompt with image tokens has run yet")
        layers = [decoder.chunks[group] for group in decoder.group_of]
        dense = sum(decoder_layer_flops(config, n, prompt.seen) for n in prompt.lengths)
        return Report(
            method=self.method,
            dense_tokens=(sum(prompt.lengths),) * len(layers),
            tokens=tuple(sum(chunk.lengths) for chunk in layers),
            image_tokens=tuple(sum(chunk.images) for chunk in layers),
            dense_flops=(dense,) * len(layers),
            flops=tuple(sum(decoder_layer_flops(config, n, cached) for n in chunk.lengths) for chunk, cached in zip(layers, prompt.cached)),
            prune_seconds=decoder.timer.seconds(),
        )

    def overlay(self, image: Any, *, sample: int = 0, image_index: int = 0, stage: int = -1, grid: tuple[int, int] | None = None) -> Any:
        """The picture with the kept patches lit.

        Args:
            image: PIL.Image.Image that the model saw.
            sample, image_index, stage: which of `kept`; the last stage where not said.
            grid: (rows, columns) of patches; needed only for a plain decoder.

        Returns:
            PIL.Image.Image. Of an any-resolution image, the patches of its mosaic; the thumbnail's where it has no other.
        """
        from .. import viz

        kept = self._kept_of(sample, image_index, stage)
        if grid is None:
            if self._vision is None:
                raise ValueError("tokensieve.sieve: overlay needs grid=(rows, columns) for a model without a vision encoder")
            grid, kept = self._grid(kept, sample, image_index)
        return viz.overlay(image, kept, grid)

    def _kept_of(self, sample: int, image_index: int, stage: int) -> Tensor:
        if not self._decoder.prompt.lengths:
            raise RuntimeError("tokensieve.sieve: no prompt with image tokens has run yet")
        part: Any = self.kept
        for name, wanted in (("stage", stage), ("sample", sample), ("image_index", image_index)):
            if not -len(part) <= wanted < len(part):
                raise ValueError(f"tokensieve.sieve: overlay's {name} must be below {len(part)}, got {wanted}")
            part = part[wanted]
        return part

    def _grid(self, kept: Tensor, sample: int, image_index: int) -> tuple[tuple[int, int], Tensor]:
        assert self._vision is not None
        config = self._parts.multimodal.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        if not self._parts.anyres:
            return (side, side), kept[kept < side * side]
        number = sum(len(images) for images in self._decoder.image_runs(self._decoder.prompt)[:sample]) + image_index
        ids = self._vision.packed[number % len(self._vision.packed)][side * side :]
        lines = runs_of((ids >= 0).int().tolist())
        if not lines:
            return (side, side), kept[kept < side * side]
        columns = lines[0][1]
        mosaic = kept[kept >= side * side] - side * side
        mosaic = mosaic[ids[mosaic] >= 0]
        return (len(lines), columns), mosaic // (columns + 1) * columns + mosaic % (columns + 1)
