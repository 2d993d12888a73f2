"""The prune step beside the method's eager code on the same tensors: what the authors' code does without fused kernels."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..methods import DecoderMethod, FasterVLM
from ..methods.views import Attention, ImageView


@dataclass(frozen=True)
class StepTime:
    """One prune step, timed both ways: seconds, the best of several runs, because a busy machine only ever adds to them."""

    place: str
    tokens: int  # rows of the sequence that enters
    fused: float
    eager: float
    includes: str  # what both sides do


def step_times(model: Any, method: Any, start: int, images: int, length: int, repeats: int = 9) -> list[StepTime]:
    """Times every prune step of a method at the model's own shapes, on random tensors of its dtype and device.

    Args:
        model: a LLaVA model. method: a method of the registry.
        start, images: first image token of the prompt and their number. length: tokens of the prompt.
        repeats: timed runs, after one that is not counted.
    """
    if isinstance(method, FasterVLM):
        return [_encoder_step(model, method, repeats)]
    if not isinstance(method, DecoderMethod) or type(method).select is not DecoderMethod.select:
        return []  # eager code is here for methods that rank by CLS or by the last row
    decoder, result, before = model.model.language_model, [], images
    for i, stage in enumerate(method.stages):
        k = method.keep_count(i, images) or 0
        n = length - images + before
        hidden = torch.randn(1, n, decoder.config.hidden_size, dtype=model.dtype, device=model.device)
        span = (start, start + before)
        if stage.source == stage.layer:
            step = _projected_step(decoder, decoder.layers[stage.layer], hidden, span, k)
            includes = "norm, projections, RoPE, scores, top-k, gather"
        else:
            step = _map_step(decoder, hidden, span, k)
            includes = "scores, top-k, gather"
        fused, eager = (_best(run, repeats, model.device) for run in step)
        result.append(StepTime(f"before layer {stage.layer}", n, fused, eager, includes))
        before = k
    return result


def _best(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    seconds = []
    for _ in range(repeats + 1):
        wait()
        begin = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def _causal(n: int, like: Tensor) -> Tensor:
    """(n, n) additive mask, as transformers' eager attention takes it."""
    return torch.full((n, n), torch.finfo(like.dtype).min, dtype=like.dtype, device=like.device).triu(1)


def _choose(score: Tensor, span: tuple[int, int], k: int) -> Tensor:
    return score[span[0] : span[1]].topk(k).indices.add(span[0]).sort().values


def _map_step(decoder: Any, hidden: Tensor, span: tuple[int, int], k: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """FastV's form: the layer before has queries and keys; eager code gets its whole H x N x N map to read one row of it."""
    config, n = decoder.config, hidden.shape[1]
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query = torch.randn(1, heads, n, width, dtype=hidden.dtype, device=hidden.device)
    key = torch.randn(1, config.num_key_value_heads, n, width, dtype=hidden.dtype, device=hidden.device)
    positions = torch.arange(n, device=hidden.device)[None]

    def fused() -> Any:
        return ops.prune_tokens(query[:, :, -1:], key, [hidden, positions], k, key_range=span)

    def eager() -> Any:
        repeated = key.repeat_interleave(heads // key.shape[1], 1)
        weights = query @ repeated.transpose(2, 3) * width**-0.5 + _causal(n, query)
        weights = torch.softmax(weights, -1, dtype=torch.float32).to(query.dtype)
        best = _choose(weights.mean(1)[0, -1], span, k)
        keep = torch.cat([positions[0, : span[0]], best, positions[0, span[1] :]]).sort().values
        return hidden[:, keep], keep[None]

    return fused, eager


def _projected_step(
    decoder: Any, layer: nn.Module, hidden: Tensor, span: tuple[int, int], k: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """PyramidDrop's form: the layer about to run ranks; eager code projects q, k and v of all rows and builds an N x N mask."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention: Any = layer.self_attn
    norm: Any = layer.input_layernorm
    width, n = attention.head_dim, hidden.shape[1]
    positions = torch.arange(n, device=hidden.device)[None]

    def heads(x: Tensor) -> Tensor:
        return x.view(1, x.shape[1], -1, width).transpose(1, 2)

    def fused() -> Any:
        y = norm(hidden)
        cos, sin = decoder.rotary_emb(y, positions)
        query, key = heads(attention.q_proj(y[:, -1:])), heads(attention.k_proj(y))
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
        key, _ = apply_rotary_pos_emb(key, key[:, :1], cos, sin)
        return ops.prune_tokens(query, key, [hidden], k, key_range=span)

    def eager() -> Any:
        y = norm(hidden.clone())
        query, key, value = heads(attention.q_proj(y)), heads(attention.k_proj(y)), heads(attention.v_proj(y))
        cos, sin = decoder.rotary_emb(value, positions)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        weights = query[:, :, -1:] @ key.transpose(2, 3) / width**0.5 + _causal(n, query)[-1:]
        weights = torch.softmax(weights, -1, dtype=torch.float32).to(query.dtype)
        best = _choose(weights[0].mean(0)[0], span, k)
        return torch.cat([hidden[:, : span[0]], hidden[:, best], hidden[:, span[1] :]], 1)

    return fused, eager


def _encoder_step(model: Any, method: FasterVLM, repeats: int) -> StepTime:
    """FasterVLM's form: eager code gets the encoder layer's whole map to read its CLS row."""
    vision, text = model.config.vision_config, model.config.get_text_config()
    n, heads = (vision.image_size // vision.patch_size) ** 2, vision.num_attention_heads
    query, key = torch.randn(2, 1, heads, n + 1, vision.hidden_size // heads, dtype=model.dtype, device=model.device)
    features = torch.randn(1, n, text.hidden_size, dtype=model.dtype, device=model.device)
    k = method.keep_count(n)

    def fused() -> Any:
        index = method.select(ImageView(layers=(Attention(query[:, :, :1], key),), counts=[k]))
        return ops.gather_tokens(features, index)

    def eager() -> Any:
        weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, -1)
        mask = torch.zeros(1, n, dtype=torch.bool, device=model.device)
        mask.scatter_(1, weights.mean(1)[:, 0, 1:].topk(k).indices, True)
        return features[0][mask[0]]

    times = [_best(run, repeats, model.device) for run in (fused, eager)]
    return StepTime("before the language model", n, times[0], times[1], "CLS scores, top-k, gather")
