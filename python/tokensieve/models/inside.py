"""A method inside the blocks of LLaVA's vision tower: fewer image features, and a prompt that holds as many places for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods.base import BlockMethod, EncoderMethod
from ..methods.views import ImageView
from .block_run import BlockRun
from .run import SieveRun
from .support import find_parts
from .vision import feature_layer


class TowerChoice(EncoderMethod):
    """The places in the prompt that the tower's tokens take: of the patch that each stands on.

    A token that stands on no patch (EViT's fused one) takes the last place that is free. The projector sees the tower's tokens alone; what
    it makes of them is spread over all patches, because the model counts as many features as placeholders, and the rest leaves.
    """

    def __init__(self, blocks: BlockRun, feature: int, cut: int) -> None:
        self._blocks, self._feature, self._cut = blocks, feature, cut
        self._place: Tensor | None = None

    def layers(self, depth: int, feature: int) -> tuple[int, ...]:
        return ()

    def spread(self, _module: Any, _args: Any, features: Tensor) -> Tensor | None:
        """Projected tokens (crops, M, C) -> (crops, N, C), zero where no token stands. None: as they are, nothing was merged."""
        stands = self._blocks.stands(self._feature + 1)[:, self._cut :] - self._cut
        N = self._blocks.entered - self._cut
        self._place = None
        if stands.shape[1] == N:
            return None
        taken = torch.zeros(len(stands), N + 1, dtype=torch.bool, device=stands.device).scatter(1, torch.where(stands < 0, N, stands), True)
        free = (torch.arange(1, N + 1, device=stands.device) * ~taken[:, :N]).argsort(1, descending=True)
        made = (stands < 0).cumsum(1) - 1
        self._place = torch.where(stands < 0, free.gather(1, made.clamp(min=0)), stands)
        where = self._place[..., None].expand_as(features)
        return features.new_zeros(len(features), N, features.shape[2]).scatter(1, where, features)

    def select(self, view: ImageView) -> Tensor | None:
        place = self._place
        if place is None or view.candidates is None:
            return place
        return torch.where(view.candidates.gather(1, place), place, -1)


class InsideRun(SieveRun):
    """A `BlockMethod` in a LLaVA model's vision tower: a `SieveRun` of what the decoder sees; `tower` is the encoder's `BlockRun`."""

    def __init__(self, model: Any, method: BlockMethod) -> None:
        parts = find_parts(model)
        if parts.multimodal is None:
            raise TypeError(f"tokensieve.sieve: {type(method).__name__} needs an image encoder, got {type(model).__name__} without one")
        layer, strategy = parts.multimodal.config.vision_feature_layer, parts.multimodal.config.vision_feature_select_strategy
        if not isinstance(layer, int):
            raise TypeError(f"tokensieve.sieve: model must take its features from one layer: their tokens differ, got layers {layer}")
        self.tower = BlockRun(parts.vision, method)
        self._feature = feature_layer(parts)
        choice = TowerChoice(self.tower, self._feature, int(strategy == "default"))
        super().__init__(model, choice)
        self.method = method  # type: ignore[assignment]
        self._choice = choice

    def _attach(self) -> None:
        super()._attach()
        self._handles.append(self._parts.multimodal.multi_modal_projector.register_forward_hook(self._choice.spread))
        self.tower.install()

    def _detach(self) -> None:
        super()._detach()
        self.tower.remove()

    def overlay(self, image: Any, *, sample: int = 0, image_index: int = 0, stage: int = -1, grid: tuple[int, int] | None = None) -> Any:
        """The picture with every merged group in its mean colour and a border, dropped patches dark.

        Args:
            image: PIL.Image.Image that the model saw.
            sample, image_index: which image of the prompts; of an any-resolution one the thumbnail.
            stage: not used here; grid: (rows, columns) of patches, needed only where the model does not say it.

        Returns:
            PIL.Image.Image.
        """
        self._kept_of(sample, image_index, stage)  # raises where there is no such image
        assert self._vision is not None
        number = sum(len(images) for images in self._decoder.image_runs(self._decoder.prompt)[:sample]) + image_index
        crop = sum(self._vision.crops[: number % len(self._vision.crops)]) if self._parts.anyres else number % self._vision.images
        return self.tower.overlay(image, sample=crop, block=self._feature, grid=grid)
