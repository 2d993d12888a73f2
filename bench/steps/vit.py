"""Methods inside vision transformers and state-space models: the step at inference beside the authors' argsort, loops and masks."""

from __future__ import annotations

import torch
from tokensieve import methods
from tokensieve.methods import ats, avit, dynamicvit, ia_red2, topvim
from torch import Tensor

from .. import cases
from ..harness import Case, Inputs, Settings
from .plain import step

B, N, C, H, D = 8, 196, 384, 6, 64  # DeiT-S on 8 images of 224


def _tokens(device: str, extra: int = 1) -> object:
    def make(seed: int) -> Inputs:
        return cases.randn(seed, B, N + extra, C, device=device), cases.randn(seed + 1, B, N, device=device)

    return make


def _dynamicvit(settings: Settings) -> Case:
    k = methods.DynamicViT().keep_count(0, N)

    def eager(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        index = scores.argsort(1, descending=True)[:, :k]
        wide = torch.cat([index.new_zeros(B, 1), index + 1], 1)[..., None].expand(-1, -1, C)
        return tokens.gather(1, wide), index

    def ours(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return dynamicvit.keep_best(tokens, scores, k)

    what = f"DeiT-S, {B} images, {N} keep {k}"
    return step("DynamicViT", what, _tokens(settings.device), ours, eager, nbytes=8 * B * k * C)  # type: ignore[arg-type]


def _avit(settings: Settings) -> Case:
    """Compacts the half of the tokens that still run, hands them to a block (left out), and writes them back; theirs masks everything."""

    def inputs(seed: int) -> Inputs:
        return cases.randn(seed, B, N, C, device=settings.device), (cases.randn(seed + 1, B, N, device=settings.device) > 0).float()

    def ours(tokens: Tensor, alive: Tensor) -> tuple[Tensor]:
        return (avit.run_alive(lambda x, real: x, tokens, alive, N)[0],)

    def eager(tokens: Tensor, alive: Tensor) -> tuple[Tensor]:
        out = torch.zeros_like(tokens)
        for image in range(tokens.shape[0]):
            index = alive[image].nonzero()[:, 0]
            out[image, index] = tokens[image, index]
        return (out,)

    return step("AViT", f"DeiT-S, {B} images, half of {N} run", inputs, ours, eager, nbytes=8 * B * N * C)


def _ats(settings: Settings) -> Case:
    def inputs(seed: int) -> Inputs:
        return tuple(cases.randn(seed + i, B, H, N + 1, D, device=settings.device) for i in range(3))

    def ours(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scores = ats.significance(query[:, :, :1], key, value)
        return scores, ats.sample_tokens(scores, N).index

    def eager(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        attention = (query @ key.transpose(-1, -2) * D**-0.5).softmax(-1)
        scores = attention[:, :, 0].sum(1) * value.transpose(1, 2).flatten(2).norm(dim=-1)
        scores = scores[:, 1:] / scores[:, 1:].sum(1, keepdim=True)
        ordered, index = scores.sort(1)
        cdf = ordered.cumsum(1)
        cdf = (cdf - cdf[:, :1]) / (cdf[:, -1:] - cdf[:, :1])
        first = cdf.masked_fill(cdf == 0, 2.0).amin(1, keepdim=True)
        points = first + (1 - first) * torch.arange(N, device=cdf.device, dtype=cdf.dtype) / (N - 1)
        picks = (points[:, :, None] - cdf[:, None]).abs().argmin(2)
        kept = torch.full_like(index, -1)
        for image in range(B):
            unique = picks[image].unique()
            kept[image, : len(unique)] = index[image, unique]
        return scores, kept

    return step("ATS", f"DeiT-S, {B} images, {N} samples", inputs, ours, eager, nbytes=12 * B * (N + 1) * C)


def _ia_red2(settings: Settings) -> Case:
    def ours(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        kept, chosen = ia_red2.keep_informative(tokens, scores, N, threshold=0.0)
        return kept, chosen.index

    def eager(tokens: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        rows = [tokens[image][scores[image] >= 0] for image in range(B)]
        index = [(scores[image] >= 0).nonzero()[:, 0] for image in range(B)]
        pad = torch.nn.utils.rnn.pad_sequence
        out = tokens.new_zeros(B, N, C)
        out[:, : max(map(len, rows))] = pad(rows, batch_first=True)
        where = torch.full((B, N), -1, device=tokens.device)
        where[:, : max(map(len, index))] = pad(index, batch_first=True, padding_value=-1)
        return out, where

    what = f"DeiT-S, {B} images, about half of {N} stay"
    return step("IARed2", what, _tokens(settings.device, 0), ours, eager, nbytes=8 * B * N * C)  # type: ignore[arg-type]


def _topvim(settings: Settings) -> Case:
    method, scan, width = methods.ToPViM(), 768, N + 1
    k = method.keep_count(N)

    def inputs(seed: int) -> Inputs:
        hidden = [cases.randn(seed + i, B, width, C, device=settings.device) for i in range(2)]
        return cases.randn(seed + 5, B, scan, width, device=settings.device), hidden

    def ours(output: Tensor, hidden: list[Tensor]) -> tuple[Tensor, ...]:
        tensors, index = topvim.keep_around_cls(topvim.scan_scores(output), hidden, k)
        return *tensors, index

    def eager(output: Tensor, hidden: list[Tensor]) -> tuple[Tensor, ...]:
        scores = output.clamp(min=0).sum(1)
        scores[:, width // 2] = -torch.inf
        index = scores.argsort(1, descending=True)[:, :k].sort(1).values
        order = torch.cat([index[:, : k // 2], index.new_full((B, 1), width // 2), index[:, k // 2 :]], 1)
        return *(x.gather(1, order[..., None].expand(-1, -1, C)) for x in hidden), index

    what = f"Vim-S, {B} images, {N} keep {k}"
    return step("ToPViM", what, inputs, ours, eager, nbytes=4 * B * width * scan + 16 * B * k * C)


STEPS = {"DynamicViT": _dynamicvit, "AViT": _avit, "ATS": _ats, "IARed2": _ia_red2, "ToPViM": _topvim}
