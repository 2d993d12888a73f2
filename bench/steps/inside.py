"""Methods inside the decoder that read more than one row: maps, key norms, embeddings, gates. "Eager code" stores the maps, as they do."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokensieve import methods, ops
from tokensieve.methods import aim, atp_llava, dart, dyvte, feather, lscene, raters, var_sink, videollm_mod
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .. import cases, peers
from ..harness import Case, Inputs, Settings
from .plain import step

LLAVA = cases.LLAVA15
START, END = LLAVA.image
TEXT = LLAVA.N - END
QK_BYTES, MAP_FLOPS = 4 * 2 * LLAVA.H * LLAVA.N * LLAVA.D, 2 * LLAVA.H * LLAVA.N**2 * LLAVA.D


def attention_map(query: Tensor, key: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, H, L, N) causal softmax of the last L rows."""
    logits = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 / temperature)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).triu(key.shape[2] - query.shape[2] + 1)
    return logits.masked_fill(future, -math.inf).softmax(-1)


def _pair(device: str) -> Any:
    return lambda seed: cases.queries_keys(seed, LLAVA, 1, LLAVA.N, device=device)


def _dart(settings: Settings) -> Case:
    method, device = methods.DART(), settings.device
    position = torch.arange(LLAVA.N, device=device)[None]
    image, text = (position >= START) & (position < END), position >= END

    def inputs(seed: int) -> Inputs:
        return cases.randn(seed, 1, LLAVA.N, LLAVA.C, device=device), cases.queries_keys(seed, LLAVA, 1, 1, device=device)[1]

    def ours(hidden: Tensor, key: Tensor) -> tuple[Tensor]:
        return (dart.keep_different(method, hidden, key, image, text, [LLAVA.R])[0],)

    def eager(hidden: Tensor, key: Tensor) -> tuple[Tensor]:
        norms = key[0].transpose(0, 1).flatten(1).abs().sum(1)
        of_image = (norms[START:END].topk(method.image_pivots).indices + START).tolist()
        of_text = (norms[END:].topk(method.text_pivots).indices + END).tolist()
        valid = [n for n in range(START, END) if n not in set(of_image)]
        kept = list(of_image)
        for pivot in of_image + of_text:
            similarity = cosine_similarity(hidden[0, pivot][None], hidden[0, valid], dim=1)
            picked = {valid[i] for i in similarity.topk(method.per_pivot(LLAVA.R), largest=False).indices.tolist()}
            kept += picked
            valid = [n for n in valid if n not in picked]
        return (torch.tensor([sorted(kept)], device=device),)

    return step("DART", f"{LLAVA.label}, {LLAVA.R} keep 132", inputs, ours, eager, nbytes=4 * LLAVA.N * (LLAVA.C + LLAVA.H * LLAVA.D))


def _feather(settings: Settings) -> Case:
    method, shape = methods.FEATHER(), cases.SIGLIP
    grid = feather.strided_grid((27, 27), method.stride).to(settings.device)
    k = method.by_score(0, 729)

    def inputs(seed: int) -> Inputs:
        query = cases.randn(seed, 1, LLAVA.H, 1, LLAVA.D, device=settings.device)
        return query, cases.randn(seed + 1, 1, LLAVA.H, 729, LLAVA.D, device=settings.device)

    def ours(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scores = feather.image_scores(query, key)
        return scores, feather.keep_with_grid(scores, k, grid).index

    def eager(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scores = (query @ key.transpose(-1, -2) * LLAVA.D**-0.5).softmax(-1)[:, :, 0].mean(1)
        kept = torch.cat([scores[0].topk(k).indices, grid.nonzero()[:, 0]]).unique()
        return scores, kept[None]

    return step("FEATHER", f"{shape.N} of {LLAVA.H}x{LLAVA.D}, grid 81, keep {k}", inputs, ours, eager, nbytes=4 * LLAVA.H * 729 * LLAVA.D)


def _sparsevlm(settings: Settings) -> Case:
    method, device = methods.SparseVLM(), settings.device
    rows = torch.arange(END, LLAVA.N, device=device)[None]
    k = method.by_score(0, LLAVA.R)

    def inputs(seed: int) -> Inputs:
        query, key = cases.queries_keys(seed, LLAVA, 1, LLAVA.N, device=device)
        return query, key, cases.randn(seed + 2, 1, LLAVA.N, LLAVA.C, device=device) / 8

    def ours(query: Tensor, key: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        _, weights = raters.rater_weights(embeds[:, START:END], embeds[:, END:])
        scores = raters.rater_scores(query[:, :, END:], key, (START, END), weights, rows)
        return scores, ops.select_topk(scores, k)

    def eager(query: Tensor, key: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        share = (embeds[:, START:END] @ embeds[:, END:].transpose(1, 2)).softmax(-1).mean(1)
        raters = (share[0] > share[0].mean()).nonzero()[:, 0] + END
        scores = attention_map(query, key).mean(1)[:, raters, START:END].mean(1)
        return scores, peers.topk_sort(scores, k)

    return step(
        "SparseVLM", f"{LLAVA.label}, raters, {LLAVA.R} keep {k}", inputs, ours, eager, nbytes=QK_BYTES // 2 + 4 * LLAVA.N * LLAVA.C
    )


def _aim(settings: Settings) -> Case:
    method = methods.AIM()
    text = torch.ones(1, LLAVA.N, dtype=torch.bool, device=settings.device)
    text[:, START:END] = False
    keep = method.keep_count(0, LLAVA.R) + LLAVA.N - LLAVA.R

    def ours(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        scores = aim.importance(query, key)
        return scores, aim.next_mask(scores, torch.ones_like(text), text, keep).float()

    def eager(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        weights = attention_map(query, key, method.temperature)
        rank = weights.new_full((1, LLAVA.H, 1, LLAVA.N), 1 / LLAVA.N)
        for _ in range(method.iterations):
            rank = rank @ weights
        scores = rank[:, :, 0].square().mean(1).sqrt()
        order = scores.masked_fill(text, 1.0).argsort(descending=True)[:, :keep]
        return scores, torch.zeros_like(scores).scatter_(1, order, 1.0)

    return step("AIM", f"{LLAVA.label}, PageRank", _pair(settings.device), ours, eager, nbytes=QK_BYTES, flops=6 * MAP_FLOPS // 2)


def _dyvte(settings: Settings) -> Case:
    torch.manual_seed(0)
    gate = dyvte.ExitGate(LLAVA.C).to(settings.device)
    wide = dyvte.ExitGate(LLAVA.C).to(settings.device).double()
    wide.load_state_dict(gate.state_dict())
    question = torch.zeros(1, LLAVA.N, dtype=torch.bool, device=settings.device)
    question[:, END:-1] = True
    last = torch.tensor([LLAVA.N - 1], device=settings.device)

    def ours(hidden: Tensor) -> tuple[Tensor]:
        return (gate(dyvte.gate_features(hidden, question, last)),)

    def eager(hidden: Tensor) -> tuple[Tensor]:
        module = wide if hidden.dtype == torch.float64 else gate
        return (module(torch.cat([hidden[:, END:-1].mean(1), hidden[:, -1]], -1)),)

    nbytes = 4 * (2 * LLAVA.C * 2048 + TEXT * LLAVA.C)
    return step(
        "DyVTE",
        f"{LLAVA.label}, one gate",
        lambda seed: (cases.randn(seed, 1, LLAVA.N, LLAVA.C, device=settings.device),),
        torch.no_grad()(ours),
        torch.no_grad()(eager),
        nbytes=nbytes,
    )


def _atp(settings: Settings) -> Case:
    rows = torch.arange(END, LLAVA.N, device=settings.device)[None]

    def ours(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(atp_llava.redundancy(query[:, :, START:END], key, (START, END), query[:, :, END:], rows))  # type: ignore[return-value]

    def eager(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        logits = (query @ key.transpose(-1, -2) * LLAVA.D**-0.5)[..., START:END, START:END].mean(1)
        seen = torch.ones_like(logits[0]).tril()
        return (logits * seen).sum(-1) / seen.sum(-1), attention_map(query, key).mean(1)[:, END:, START:END].mean(1)

    return step("ATPLLaVA", f"{LLAVA.label}, both scores", _pair(settings.device), ours, eager, nbytes=QK_BYTES)


def _mod(settings: Settings) -> Case:
    """Route 64 frames of 49 tokens, gather, and add back; the layer between is left out."""
    frames, each, method = 64, 49, methods.VideoLLMMoD()
    k = method.frame_count(each)

    def inputs(seed: int) -> Inputs:
        hidden = cases.randn(seed, 1, frames * each + 64, LLAVA.C, device=settings.device)
        return hidden, cases.randn(seed + 1, 1, frames * each, device=settings.device)

    def ours(hidden: Tensor, scores: Tensor) -> tuple[Tensor]:
        index = videollm_mod.route(scores, frames, k)
        return (videollm_mod.mixture_of_depths(lambda x, _: x, hidden, scores, index, (0, frames * each)),)

    def eager(hidden: Tensor, scores: Tensor) -> tuple[Tensor]:
        out = hidden.clone()
        for frame in range(frames):
            top = scores[0, frame * each : frame * each + each].topk(k).indices.sort().values + frame * each
            out[0, top] = hidden[0, top] + scores[0, top, None] * hidden[0, top]
        out[:, frames * each :] += hidden[:, frames * each :]
        return (out,)

    total = frames * each + 64
    return step("VideoLLMMoD", f"{frames} frames of {each}, keep {k}", inputs, ours, eager, nbytes=8 * total * LLAVA.C)


def _var(settings: Settings) -> Case:
    method = methods.VAR(dims=(1, 2), tau=2.5)
    position = torch.arange(LLAVA.N, device=settings.device)[None]
    image = (position >= START) & (position < END)

    def inputs(seed: int) -> Inputs:
        return *cases.queries_keys(seed, LLAVA, 1, LLAVA.N, device=settings.device), cases.randn(
            seed, 1, LLAVA.N, 64, device=settings.device
        )

    def ours(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        sinks = var_sink.sink_score(hidden, method.dims) > method.tau
        heads = var_sink.image_heads(query[:, :, END:], key, image, sinks)
        return heads.sink_share, heads.image_mass

    def eager(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        sinks = (hidden[..., list(method.dims)] * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).abs().amax(-1) > method.tau
        weights = attention_map(query, key)[:, :, END:]
        on_image = weights[..., START:END]
        share = weights[..., (sinks & image)[0]].sum(-1) / (on_image + 1e-6).sum(-1)
        return share, on_image.sum(-1)

    return step("VAR", f"{LLAVA.label}, {TEXT} text rows", inputs, ours, eager, nbytes=QK_BYTES // 2)


def _lscene(settings: Settings) -> Case:
    def ours(query: Tensor, key: Tensor) -> tuple[Tensor]:
        return (lscene.open_scenes(query[:, :, END:], key, (START, START + 128)).float(),)

    def eager(query: Tensor, key: Tensor) -> tuple[Tensor]:
        scores = attention_map(query, key)[:, :, END:, START : START + 128].sum(1)
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        return (((scores - low) / (high - low) * 255 > 96).to(query.dtype),)

    return step("LSceneLLM", f"{LLAVA.label}, 128 scene tokens", _pair(settings.device), ours, eager, nbytes=QK_BYTES // 2)


STEPS = {
    "DART": _dart,
    "FEATHER": _feather,
    "SparseVLM": _sparsevlm,
    "AIM": _aim,
    "DyVTE": _dyvte,
    "ATPLLaVA": _atp,
    "VideoLLMMoD": _mod,
    "VAR": _var,
    "LSceneLLM": _lscene,
}
