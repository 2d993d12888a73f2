"""Tokens made by pooling and small attentions: our layer beside the authors' layout of the same weights, or the plain one of the paper."""

from __future__ import annotations

import torch
from tokensieve import methods, ops
from tokensieve.methods import pvc, red_villm, stvit, stvit_layers, texthawk2
from torch import Tensor
from torch.nn import functional as F

from .. import cases
from ..harness import Case, Inputs, Settings
from .plain import step


def _attention(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """(B, M, C), (B, N, 2 C) -> (B, M, C), the map in memory."""
    B, M, C = q.shape
    k, v = kv.view(B, -1, 2, heads, C // heads).permute(2, 0, 3, 1, 4)
    q = q.view(B, M, heads, C // heads).transpose(1, 2) * (C // heads) ** -0.5
    return ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(B, M, C)


def _stvit(settings: Settings) -> Case:
    B, S, C, heads, method = 4, 14, 384, 12, methods.STViT()
    W, M = method.window, method.sample
    device = settings.device
    layer = stvit_layers.Generate(C, heads, method).to(device).requires_grad_(False)

    def inputs(seed: int) -> Inputs:
        q, kv = cases.randn(seed + 1, C, C, device=device) * C**-0.5, cases.randn(seed + 2, 2 * C, C, device=device) * C**-0.5
        return cases.randn(seed, B, S * S, C, device=device), q, kv

    def ours(x: Tensor, q: Tensor, kv: Tensor) -> tuple[Tensor]:
        layer.q.weight, layer.kv.weight = torch.nn.Parameter(q, False), torch.nn.Parameter(kv, False)
        pooled = stvit.window_maxima(x, (S, S), W, M)
        return (layer.attend(pooled, layer.seen(pooled, x, (S, S))),)

    def eager(x: Tensor, q: Tensor, kv: Tensor) -> tuple[Tensor]:
        image = x.transpose(1, 2).reshape(B, C, S, S)
        windows = image.view(B, C, S // W, W, S // W, W).permute(0, 2, 4, 1, 3, 5).reshape(-1, C, W, W)
        pooled = F.adaptive_max_pool2d(windows, M).flatten(2).transpose(1, 2)
        patch = F.unfold(image, method.key_window, stride=4).view(B, C, method.key_window**2, -1)
        known = torch.cat([pooled, patch.permute(0, 3, 2, 1).reshape(len(pooled), -1, C)], 1)
        bias = layer.q.bias.to(x.dtype), layer.kv.bias.to(x.dtype)
        tokens = F.layer_norm(pooled, (C,)) @ q.T + bias[0]
        out = _attention(tokens, F.layer_norm(known, (C,)) @ kv.T + bias[1], heads)
        return (out.view(B, -1, M * M, C),)

    flops = 2 * B * 196 * C * 2 * C
    return step("STViT", f"{B} maps of {S} x {S}, C={C}", inputs, ours, eager, nbytes=4 * B * C * (3 * 196 + 36), flops=flops)


def _texthawk2(settings: Settings) -> Case:
    B, S, C, method = 4, 16, 1152, methods.TextHawk2()

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, B, S * S, C, device=settings.device),)

    def ours(x: Tensor) -> tuple[Tensor]:
        _, columns = method.queries((S, S))
        return (texthawk2.rearrange(ops.pool_grid(x, (S, S), window=method.pool), columns, method.group),)

    def eager(x: Tensor) -> tuple[Tensor]:
        pooled = F.avg_pool2d(x.transpose(1, 2).reshape(B, C, S, S), method.pool)
        groups = pooled.view(B, C, S // 2, -1, method.group).permute(0, 2, 3, 4, 1)
        return (groups.reshape(B, -1, method.group * C),)

    return step("TextHawk2", f"queries of {B} views of {S} x {S}, C={C}", inputs, ours, eager, nbytes=5 * B * S * S * C)


def _pvc(settings: Settings) -> Case:
    T, N, C, heads = 16, 256, 256, 4
    layer = pvc.TemporalAttention(C, heads).to(settings.device).requires_grad_(False)
    layer.gate.fill_(0.5)

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, 1, T, N, C, device=settings.device),)

    def ours(x: Tensor) -> tuple[Tensor]:
        return (layer(x),)

    def eager(x: Tensor) -> tuple[Tensor]:
        """Positions as a batch of sequences, transposed there and back."""
        known = F.layer_norm(x, (C,))[0].transpose(0, 1)
        weights = [(part.weight.to(x.dtype), part.bias.to(x.dtype)) for part in (layer.q, layer.k, layer.v, layer.proj)]
        q, k, v = (F.linear(known, *pair).reshape(N, T, heads, -1).transpose(1, 2) for pair in weights[:3])
        logits = (q @ k.transpose(-2, -1)) * (C // heads) ** -0.5
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        out = logits.masked_fill(later, -torch.inf).softmax(-1) @ v
        out = F.linear(out.transpose(1, 2).reshape(N, T, C), *weights[3])
        return (x + layer.gate.to(x.dtype).tanh() * out.transpose(0, 1)[None],)

    return step("PVC", f"{T} frames of {N} patches, C={C}", inputs, ours, eager, nbytes=4 * 7 * T * N * C, flops=8 * T * N * C * C)


def _red_villm(settings: Settings) -> Case:
    T, N, C = 100, 256, 1024

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, 1, T, N, C, device=settings.device),)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        return red_villm.pool_axes(x)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(1), x.mean(2)

    return step("REDVILLM", f"{T} frames of {N}, C={C}", inputs, ours, eager, nbytes=4 * C * (T * N + T + N))


STEPS = {"STViT": _stvit, "TextHawk2": _texthawk2, "PVC": _pvc, "REDVILLM": _red_villm}
