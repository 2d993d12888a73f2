"""Tiny random models and prompts, float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

IMAGE = 90  # placeholder id
LAYERS = 5
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def _seeded(seed: int, cls: Any, config: Any, attention: str) -> Any:
    torch.manual_seed(seed)
    config._attn_implementation = attention
    model = cls(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # the default 0.02 makes attention flat and every token alike
    return model


def llama(attention: str = "sdpa", kv_heads: int = 4) -> LlamaForCausalLM:
    return _seeded(0, LlamaForCausalLM, LlamaConfig(**TEXT, num_key_value_heads=kv_heads), attention)


def qwen2(attention: str = "sdpa", kv_heads: int = 2) -> Qwen2ForCausalLM:
    return _seeded(1, Qwen2ForCausalLM, Qwen2Config(**TEXT, num_key_value_heads=kv_heads), attention)


def _vision() -> CLIPVisionConfig:
    return CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=3, image_size=16, patch_size=4)


def llava(attention: str = "sdpa", kv_heads: int = 2, tower: str = "clip") -> LlavaForConditionalGeneration:
    """16 patches an image."""
    text = LlamaConfig(**TEXT, num_key_value_heads=kv_heads)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
    towers = {"clip": _vision, "siglip": lambda: SiglipVisionConfig(**sizes, intermediate_size=32), "dinov2": lambda: Dinov2Config(**sizes)}
    config = LlavaConfig(
        vision_config=towers[tower](),
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",  # SigLIP has no CLS to drop
    )
    return _seeded(2, LlavaForConditionalGeneration, config, attention)


PINPOINTS = [[16, 32], [32, 16], [32, 32], [48, 16], [16, 48]]


def llava_next(attention: str = "sdpa") -> LlavaNextForConditionalGeneration:
    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    config = LlavaNextConfig(
        vision_config=_vision(),
        text_config=text,
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _seeded(3, LlavaNextForConditionalGeneration, config, attention)


def prompt(before: int, image: int, after: int, seed: int = 0) -> Tensor:
    """(1, S) ids: text, placeholders, text."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(2, 80, (before + after,), generator=generator)
    return torch.cat([text[:before], torch.full((image,), IMAGE), text[before:]])[None]


def pixels(images: int, seed: int = 0) -> Tensor:
    return torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """(1, S_i) ids -> (B, S) ids padded with 0, and their (B, S) mask."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = row.shape[1]
        where = slice(width - n, width) if side == "left" else slice(0, n)
        ids[i, where], mask[i, where] = row[0], 1
    return ids, mask


def llava_inputs(images: int = 1) -> dict[str, Tensor]:
    ids = torch.cat([prompt(4, 16, 6, seed=i) for i in range(images)], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(images)}


def next_inputs() -> dict[str, Tensor]:
    """A 31 x 10 picture: a thumbnail and 2 x 1 crops, of whose 4 patch rows 2 are padding: 16 + 2 * (8 + 1) = 34 tokens."""
    ids, sizes = prompt(4, 34, 6), torch.tensor([[10, 31]])
    values = torch.randn(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": values, "image_sizes": sizes}


MODELS = [(llava, llava_inputs), (llava_next, next_inputs)]
