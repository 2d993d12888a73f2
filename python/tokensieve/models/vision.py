"""The vision side of a sieve: CLS attention for encoder methods, and how patches are packed into the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods.base import EncoderMethod
from .capture import listen
from .support import Parts


class VisionSieve:
    """Follows the vision tower: which patch is which image token, and which of them an encoder method keeps."""

    def __init__(self, parts: Parts, method: Any) -> None:
        self.parts, self.method = parts, method
        self.query: Tensor | None = None  # (crops, H, 1, D)
        self.key: Tensor | None = None  # (crops, H, N + 1, D)
        self.packed: list[Tensor] = []  # any resolution: of each image, crop * N + patch of each token, -1 = newline
        self.crops: list[int] = []  # any resolution: crops of each image, thumbnail included
        self._original_pack: Any = None
        if isinstance(method, EncoderMethod):
            _check_encoder(parts, method)

    def hooks(self) -> list[Any]:
        """Hooks on the encoder layer that makes the features."""
        if not isinstance(self.method, EncoderMethod):
            return []
        layers = self.parts.vision.encoder.layers
        return listen(layers[feature_layer(self.parts)].self_attn, self._captured, lambda: True)

    def attach(self) -> None:
        """Starts to follow how an any-resolution model packs its crops."""
        if self.parts.anyres:
            self._original_pack = self.parts.multimodal.pack_image_features
            self.parts.multimodal.pack_image_features = self._pack

    def detach(self) -> None:
        """Undoes `attach`."""
        if self._original_pack is not None:
            del self.parts.multimodal.pack_image_features
            self._original_pack = None

    def _captured(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query[:, :, :1].detach(), key.detach()

    def _pack(self, image_features: Any, image_sizes: Any, vision_feature_select_strategy: Any, image_newline: Any = None) -> Any:
        """The model's own packing, run a second time on patch numbers: no copy of its crop and padding arithmetic is needed here."""
        numbers = [torch.arange(1, f.shape[0] * f.shape[1] + 1).view(*f.shape[:2], 1) for f in image_features]
        newline = None if image_newline is None else torch.zeros(1, dtype=torch.long)
        packed, _ = self._original_pack(numbers, image_sizes, vision_feature_select_strategy, image_newline=newline)
        self.packed, self.crops = [ids.flatten() - 1 for ids in packed], [f.shape[0] for f in image_features]
        return self._original_pack(image_features, image_sizes, vision_feature_select_strategy, image_newline=image_newline)

    def image_lengths(self) -> list[int]:
        """Tokens of each image of the last vision call; one number for all where every image has as many."""
        return [len(ids) for ids in self.packed] if self.parts.anyres else [patches(self.parts)]

    def choose(self, image_mask: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """What the encoder method keeps.

        Args:
            image_mask: (B, S) bool, image tokens; counts: how many each sample has.

        Returns:
            (B, S) bool, the image tokens that stay, and how many they are of each sample.
        """
        if self.query is None or self.key is None:
            raise ValueError(f"tokensieve.sieve: {type(self.method).__name__} needs the images: pass pixel_values, got a prompt without")
        flags, lengths, kept = self._flags(self.query, self.key)
        repeats, rest = divmod(sum(counts), sum(lengths))
        if rest or repeats == 0:
            raise ValueError(f"tokensieve.sieve: the prompts must hold the images' {sum(lengths)} tokens, got {sum(counts)} placeholders")
        budget, image = [], 0
        for count in counts[::repeats]:  # beams and several returned sequences repeat each sample
            total = 0
            while count > 0:
                count, total, image = count - lengths[image], total + kept[image], image + 1
            budget += [total] * repeats
        mask = image_mask[::repeats]
        keep = torch.zeros_like(mask).masked_scatter(mask, flags)
        return keep.repeat_interleave(repeats, 0), budget

    def _flags(self, query: Tensor, key: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """Of all image tokens in order: (tokens,) bool kept or not; tokens of each image; kept tokens of each image."""
        crops, N, device = key.shape[0], key.shape[2] - 1, key.device
        if not self.parts.anyres:
            counts = [self.method.keep_count(N)] * crops
            return _mark(self.method.select(query, key, counts), N).flatten(), [N] * crops, counts
        order, present, first = [], torch.zeros(crops * N, dtype=torch.bool), 0
        for ids, n in zip(self.packed, self.crops):
            order.append(torch.where(ids >= 0, ids + first * N, -1))
            present[order[-1][ids >= 0]] = True
            first += n
        present = present.view(crops, N)
        counts = [self.method.keep_count(n) for n in present.sum(1).tolist()]
        index = self.method.select(query, key, counts, present.to(device))
        where = torch.cat(order).to(device)  # once a prompt; the packing itself reads image sizes on the host
        flags = _mark(index, N).flatten()[where.clamp(min=0)] & (where >= 0)
        if self.method.keep_newlines:
            flags = flags | (where < 0)
        kept, first = [], 0
        for ids, n in zip(self.packed, self.crops):
            newlines = int((ids < 0).sum()) if self.method.keep_newlines else 0
            kept.append(sum(counts[first : first + n]) + newlines)
            first += n
        return flags, [len(ids) for ids in self.packed], kept


def _mark(index: Tensor, N: int) -> Tensor:
    """(crops, T) kept patches, -1 padded -> (crops, N) bool."""
    marks = torch.zeros(index.shape[0], N + 1, dtype=torch.bool, device=index.device)
    return marks.scatter_(1, torch.where(index < 0, N, index), True)[:, :N]


def patches(parts: Parts) -> int:
    """Tokens that one image of a fixed-resolution model becomes."""
    config = parts.multimodal.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side * side + (config.vision_feature_select_strategy != "default")


def feature_layer(parts: Parts) -> int:
    """Index of the encoder layer whose output becomes the image features."""
    wanted = parts.multimodal.config.vision_feature_layer
    state = wanted if isinstance(wanted, int) else wanted[-1]
    depth = parts.multimodal.config.vision_config.num_hidden_layers
    return (state if state >= 0 else depth + 1 + state) - 1


def _check_encoder(parts: Parts, method: EncoderMethod) -> None:
    name = type(method).__name__
    if parts.multimodal is None:
        raise TypeError(
            f"tokensieve.sieve: {name} works on the vision encoder: model must be a LlavaForConditionalGeneration or a "
            f"LlavaNextForConditionalGeneration, got {type(parts.model).__name__}"
        )
    config = parts.multimodal.config
    kind, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
    if kind != "clip_vision_model" or strategy != "default" or feature_layer(parts) < 0:
        raise TypeError(
            f"tokensieve.sieve: {name} needs a CLIP vision tower whose CLS token is cut off (strategy 'default'), got {kind!r} with "
            f"strategy {strategy!r} and feature layer {config.vision_feature_layer}"
        )
