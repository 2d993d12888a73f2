"""Tiny vision encoders with random weights, float32, 16 or 64 patches; and methods of two lines, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm_here  # noqa: F401
import tokensieve as ts
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tokensieve.methods import BlockMethod, BlockStep, BlockView
from torch import Tensor
from transformers import (
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.clip import CLIPConfig
from transformers.models.siglip import SiglipConfig

DEPTH = 4
TIMM: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 32,
    "depth": DEPTH,
    "num_heads": 4,
    "num_classes": 7,
    "qkv_bias": True,
}
HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
TIMM_MODELS: dict[str, dict[str, Any]] = {
    "vit": {},
    "registers": {"reg_tokens": 3, "init_values": 0.5},
    "registers_only": {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
    "qk_norm": {"qk_norm": True, "no_embed_class": True},
    "mean": {"global_pool": "avg"},
    "mean_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "avgmax": {"global_pool": "avgmax", "class_token": False},
    "map": {"global_pool": "map", "class_token": False},
    "drop_path": {"drop_path_rate": 0.2, "proj_drop_rate": 0.1},
}


def _spread(model: Any) -> Any:
    """Larger weights, so that attention is not flat and tokens differ; norms stay."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model.eval()


def timm_model(kind: str = "vit", **options: Any) -> Any:
    torch.manual_seed(0)
    if kind == "distilled":
        return _spread(VisionTransformerDistilled(**TIMM, **options))
    return _spread(VisionTransformer(**{**TIMM, **TIMM_MODELS[kind], **options}))


def _clip() -> Any:
    return CLIPVisionConfig(**HF, intermediate_size=48, projection_dim=16)


def _siglip() -> Any:
    return SiglipVisionConfig(**HF, intermediate_size=48)


def _dino(**options: Any) -> Any:
    return Dinov2Config(**HF, mlp_ratio=2, num_labels=7, **options)


HF_MODELS: dict[str, Any] = {
    "clip": lambda: CLIPVisionModel(_clip()),
    "clip_projection": lambda: CLIPVisionModelWithProjection(_clip()),
    "clip_classifier": lambda: CLIPForImageClassification(CLIPConfig(vision_config=_clip(), num_labels=7)),
    "siglip": lambda: SiglipVisionModel(_siglip()),
    "siglip_classifier": lambda: SiglipForImageClassification(SiglipConfig(vision_config=_siglip(), num_labels=7)),
    "dinov2": lambda: Dinov2Model(_dino()),
    "dinov2_swiglu": lambda: Dinov2Model(_dino(use_swiglu_ffn=True, drop_path_rate=0.1)),
    "dinov2_classifier": lambda: Dinov2ForImageClassification(_dino()),
}
MODELS = ["distilled", *TIMM_MODELS, *HF_MODELS]


def encoder(kind: str, attention: str = "sdpa") -> Any:
    """A model of that kind in eval mode."""
    if kind in HF_MODELS:
        torch.manual_seed(0)
        model = HF_MODELS[kind]()
        model.set_attn_implementation(attention)
        return _spread(model)
    return timm_model(kind)


def run_encoder(model: Any, pixels: Tensor) -> Tensor:
    """The logits or pooled output."""
    out = model(pixels)
    if isinstance(out, Tensor):
        return out
    for name in ("logits", "image_embeds", "pooler_output"):
        if getattr(out, name, None) is not None:
            result: Tensor = getattr(out, name)
            return result
    raise AssertionError(type(out))


def pixels(batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class PairMerge(BlockMethod):
    """Patches 2i and 2i + 1 become their mean weighted by size, in the given blocks; nothing is lost where they are equal."""

    at: tuple[int, ...] = (1, 2)

    def blocks(self, depth: int) -> tuple[int, ...]:
        return self.at

    def step(self, view: BlockView) -> BlockStep:
        B, N, _ = view.tokens.shape
        place = torch.arange(N)
        rows = torch.where(place < view.prefix, place, view.prefix + (place - view.prefix) // 2)
        M = view.prefix + (N - view.prefix + 1) // 2
        size = torch.ones(B, N) if view.size is None else view.size
        onto = torch.nn.functional.one_hot(rows, M).float()
        total = size @ onto
        mean = (onto.T @ (view.tokens.float() * size[..., None])) / total[..., None]
        index = torch.cat([place[: view.prefix], view.prefix + 2 * torch.arange(M - view.prefix)])
        return BlockStep(mean.to(view.tokens.dtype), index.expand(B, M), rows.expand(B, N), total)


@dataclass(frozen=True)
class KeepSeen(BlockMethod):
    """Keeps the k patches that CLS attends to most, by tokensieve's ops, in order; counts its steps in the state it hands on."""

    keep: tuple[tuple[int, int], ...] = ((1, 40), (2, 20))
    needs_cls = True

    def blocks(self, depth: int) -> tuple[int, ...]:
        return tuple(block for block, _ in self.keep)

    def step(self, view: BlockView) -> BlockStep | None:
        k, N = dict(self.keep)[view.block], view.tokens.shape[1]
        if k == N - view.prefix:
            return None
        kept = ts.select_topk(view.cls_scores(key_range=(view.prefix, N)), k) + view.prefix
        index = torch.cat([torch.arange(view.prefix, device=kept.device).expand(len(kept), -1), kept], 1)
        steps = torch.zeros((), dtype=torch.int64) if view.state is None else view.state
        return BlockStep(ts.gather_tokens(view.tokens, index), index, state=steps + 1)
