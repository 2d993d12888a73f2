"""A timm vision transformer with merged or dropped tokens, as loops of plain torch in the dtype of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[int, Tensor, Tensor, Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]  # block, x, probabilities, keys, size


def vit(model: Any, image: Tensor, step: Step) -> Tensor:
    """The logits of a model that pools by CLS (distilled: by both tokens), or by a mean weighted by size."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image)))
    size: Tensor | None = None
    for number, block in enumerate(model.blocks):
        heads, h = block.attn.num_heads, block.norm1(x)
        B, N, C = h.shape
        q, k, v = (t.view(B, N, heads, -1).transpose(1, 2) for t in block.attn.qkv(h).chunk(3, -1))
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if size is not None:
            logits = logits + size.log()[:, None, None]
        probabilities = logits.softmax(-1)
        x = x + block.ls1(block.attn.proj((probabilities @ v).transpose(1, 2).reshape(B, N, C)))
        x, size = step(number, x, probabilities, k, size)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if hasattr(model, "head_dist"):
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    if model.global_pool == "avg":
        x, size = x[:, model.num_prefix_tokens :], None if size is None else size[:, model.num_prefix_tokens :]
        pooled = x.mean(1) if size is None else (x * size[..., None]).sum(1) / size.sum(1, keepdim=True)
    else:
        pooled = x[:, 0]
    return model.head(model.fc_norm(pooled))


def tome(r: int, prefix: int) -> Step:
    """ToMe: even positions look for their best odd one, the r best merge, means weighted by size; [prefix, sources that stay, odd]."""

    def step(_: int, x: Tensor, probabilities: Tensor, keys: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        B, N, C = x.shape
        count = min(r, (N - prefix) // 2)
        if count == 0:
            return x, size
        size = x.new_ones(B, N) if size is None else size
        metric = keys.mean(1)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        even = torch.arange(prefix + prefix % 2, N, 2)
        odd = torch.arange(prefix + 1 - prefix % 2, N, 2)
        best, to = (metric[:, even] @ metric[:, odd].transpose(1, 2)).max(-1)
        rank = best.argsort(dim=-1, descending=True, stable=True)
        source, stay = rank[:, :count], rank[:, count:].sort(-1).values
        onto = to.gather(1, source)
        weighted = x * size[..., None]
        wide = source[..., None].expand(-1, -1, C)
        receivers = weighted[:, odd].scatter_add(1, onto[..., None].expand(-1, -1, C), weighted[:, even].gather(1, wide))
        sums = size[:, odd].scatter_add(1, onto, size[:, even].gather(1, source))
        rest = x[:, even].gather(1, stay[..., None].expand(-1, -1, C))
        merged = torch.cat([x[:, :prefix], rest, receivers / sums[..., None]], 1)
        return merged, torch.cat([size[:, :prefix], size[:, even].gather(1, stay), sums], 1)

    return step


def evit(keep: float, layers: tuple[int, ...], prefix: int) -> Step:
    """EViT: the share `keep` of the patches by CLS's attention, best first, then the attention-weighted sum of the others."""

    def step(number: int, x: Tensor, probabilities: Tensor, keys: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        patches = x.shape[1] - prefix
        count = math.ceil(keep * patches)
        if number not in layers or count == patches:
            return x, size
        scores = probabilities[:, :, 0, prefix:].mean(1)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        kept, dropped = (i[..., None].expand(-1, -1, x.shape[2]) for i in (order[:, :count], order[:, count:].sort(-1).values))
        weights = scores.gather(1, dropped[..., 0])[..., None]
        fused = (weights * x[:, prefix:].gather(1, dropped)).sum(1, keepdim=True)
        return torch.cat([x[:, :prefix], x[:, prefix:].gather(1, kept), fused], 1), size

    return step
