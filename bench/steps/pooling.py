"""Clustering and pooling of image tokens: our step beside the authors' matrices, loops and layouts."""

from __future__ import annotations

import math

import tokensieve as ts
import torch
from tokensieve import methods
from tokensieve.methods import chatunivi, leopard, llava_ov_pool, llavolta
from torch import Tensor
from torch.nn import functional as F

from .. import cases, peers
from ..harness import Case, Inputs, Settings
from .plain import step


def _eager_merge(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    B, N, C = x.shape
    at = (labels + torch.arange(B, device=x.device)[:, None] * clusters).reshape(-1)
    total = x.new_zeros(B * clusters, 1).index_add_(0, at, x.new_ones(B * N, 1)) + 1e-6
    share = 1 / total[at]
    return x.new_zeros(B * clusters, C).index_add_(0, at, x.reshape(B * N, C) * share).view(B, clusters, C)


def _tokens(device: str, B: int, N: int, C: int) -> object:
    """Tokens around a few centres of their own, so that float64 finds the same clusters."""

    def make(seed: int) -> Inputs:
        near = cases.randn(seed, B, N // 8, C, device=device).repeat_interleave(8, 1)[:, :N]
        return near + 0.4 * cases.randn(seed + 1, B, N, C, device=device), cases.randn(seed + 2, B, N, device=device).sigmoid()

    return make


def _dpcknn(settings: Settings) -> Case:
    B, N, C = 1, 784, 128
    method = methods.DPCKNN()
    K = method.clusters(N)

    def ours(x: Tensor, noise: Tensor) -> tuple[Tensor]:
        return (ts.cluster_tokens(x, K, k=method.neighbors, noise=noise).index,)

    def eager(x: Tensor, noise: Tensor) -> tuple[Tensor]:
        return (peers.density_clusters(x, K, method.neighbors, noise)[0],)

    inputs = _tokens(settings.device, B, N, C)
    return step("DPCKNN", f"{N} to {K}, C={C}", inputs, ours, eager, nbytes=4 * B * N * (C + N), flops=2 * B * N * N * C)  # type: ignore[arg-type]


def _chatunivi(settings: Settings) -> Case:
    B, N, C = 1, 256, 1024
    method = methods.ChatUniVi(levels=(64,), neighbors=(5,))

    def ours(x: Tensor, noise: Tensor) -> tuple[Tensor]:
        return (chatunivi.merge_levels(x, method, noise=(noise,)),)

    def eager(x: Tensor, noise: Tensor) -> tuple[Tensor]:
        return (_eager_merge(x, peers.density_clusters(x, 64, 5, noise)[1], 64),)

    inputs = _tokens(settings.device, B, N, C)
    return step("ChatUniVi", f"{N} to 64, C={C}", inputs, ours, eager, nbytes=4 * B * N * (C + N), flops=2 * B * N * N * C)  # type: ignore[arg-type]


def _llavolta(settings: Settings) -> Case:
    B, S, V, start, C = 1, 640, 576, 35, 4096
    stride = methods.LLaVolta().stage(0)[1]
    ids = torch.arange(S, device=settings.device)[None]

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, B, S, C, device=settings.device),)

    def ours(hidden: Tensor) -> tuple[Tensor]:
        return (llavolta.pool_sequence(hidden, ids, [[start]], V, stride)[0],)

    def eager(hidden: Tensor) -> tuple[Tensor]:
        rows = []
        for row in hidden:
            image = F.avg_pool1d(row[start : start + V].T[None], stride, stride)[0].T
            rows.append(torch.cat([row[:start], image, row[start + V :]]))
        return (torch.stack(rows),)

    return step("LLaVolta", f"{V} image tokens by {stride}, C={C}", inputs, ours, eager, nbytes=4 * B * C * (2 * S - V + V // stride))


def _onevision(settings: Settings) -> Case:
    T, S, C = 4, 27, 1024
    method = methods.LLaVAOneVision()

    def inputs(seed: int) -> Inputs:
        return cases.randn(seed, T, S * S, C, device=settings.device), cases.randn(seed + 1, C, device=settings.device)

    def ours(frames: Tensor, newline: Tensor) -> tuple[Tensor]:
        return (llava_ov_pool.pool_frames(frames, method, newline),)

    def eager(frames: Tensor, newline: Tensor) -> tuple[Tensor]:
        side = math.ceil(S / 2)
        image = F.interpolate(frames.view(T, S, S, C).permute(0, 3, 1, 2).contiguous(), (side, side), mode="bilinear")
        rows = image.permute(1, 0, 2, 3).reshape(C, T * side, side)
        return (torch.cat([rows, newline[:, None, None].expand(C, T * side, 1)], 2).flatten(1).T,)

    return step("LLaVAOneVision", f"{T} frames of {S} x {S}, C={C}", inputs, ours, eager, nbytes=4 * T * C * (S * S + 210))


def _leopard(settings: Settings) -> Case:
    B, S, C = 8, 26, 1152

    def inputs(seed: int) -> Inputs:
        return (cases.randn(seed, B, S * S, C, device=settings.device),)

    def ours(x: Tensor) -> tuple[Tensor]:
        return (leopard.space_to_depth(x, (S, S)),)

    def eager(x: Tensor) -> tuple[Tensor]:
        wide = x.view(B, S, S // 2, 2 * C).permute(0, 2, 1, 3).contiguous()
        return (wide.view(B, S // 2, S // 2, 4 * C).permute(0, 2, 1, 3).reshape(B, S * S // 4, 4 * C),)

    return step("Leopard", f"{B} views of {S} x {S}, C={C}", inputs, ours, eager, nbytes=8 * B * S * S * C)


STEPS = {
    "DPCKNN": _dpcknn,
    "ChatUniVi": _chatunivi,
    "LLaVolta": _llavolta,
    "LLaVAOneVision": _onevision,
    "Leopard": _leopard,
}
