"""Named real shapes and their random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One layer of a real model on one real input: N tokens of width C, H query and Hkv key heads of D, and where the image lies."""

    name: str
    N: int
    H: int
    Hkv: int
    D: int
    C: int
    image: tuple[int, int]
    keep: int  # image tokens that a typical budget leaves

    @property
    def R(self) -> int:
        return self.image[1] - self.image[0]

    @property
    def label(self) -> str:
        heads = f"{self.H}" if self.Hkv == self.H else f"{self.H}/{self.Hkv}"
        return f"{self.name} {self.N}x{heads}x{self.D}"


CLIP = Shape("CLIP-L", 577, 16, 16, 64, 1024, (1, 577), 144)  # ViT-L/14 at 336, key 0 is CLS
SIGLIP = Shape("SigLIP", 729, 16, 16, 72, 1152, (0, 729), 128)  # so400m/14 at 384, no CLS
LLAVA15 = Shape("LLaVA-1.5", 640, 32, 32, 128, 4096, (35, 611), 144)  # 7B: system prompt 35, image 576, question 29
LLAVA_NEXT = Shape("LLaVA-NeXT", 2944, 32, 32, 128, 4096, (35, 2915), 640)  # 7B: 5 crops of 576
QWEN_16K = Shape("Qwen2.5-VL", 16384, 28, 4, 128, 3584, (15, 16335), 4096)  # 7B, one large document page
VIDEO_12K = Shape("video 12.5k", 12608, 28, 4, 128, 3584, (15, 12559), 3136)  # 64 frames of 196
VIDEO_50K = Shape("video 50k", 50240, 28, 4, 128, 3584, (15, 50191), 5017)  # 256 frames of 196

SELECT_SIZES = ((576, 144), (577, 192), (729, 128), (2880, 640), (12544, 3136), (50176, 5017))  # (N, k)
DIVERSE_SIZES = ((576, 64, 4096), (2880, 320, 4096))  # (N, k, C): LLaVA-1.5 and LLaVA-NeXT embeddings
GATHER_SIZES = ((576, 144, 4096), (2880, 640, 4096), (12544, 3136, 3584))  # (N, k, C)


def name(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64", torch.float64: "f64"}[dtype]


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def attention_like(seed: int, B: int, N: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """(B, N) scores that look like attention: positive, sum 1, spread over orders of magnitude (bf16 ones tie often)."""
    return torch.softmax(2 * randn(seed, B, N, device=device), -1).to(dtype)


def random_index(seed: int, B: int, N: int, k: int, device: str = "cpu") -> Tensor:
    """(B, k) int64, ascending and unique."""
    return randn(seed, B, N, device=device).topk(k).indices.sort().values


def queries_keys(
    seed: int, shape: Shape, B: int, rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(B, H, rows, D) and (B, Hkv, N, D); logits have a standard deviation of 1."""
    query = randn(seed, B, shape.H, rows, shape.D, dtype=dtype, device=device)
    return query, randn(seed + 1, B, shape.Hkv, shape.N, shape.D, dtype=dtype, device=device)
