"""Analytic FLOPs of a decoder, from token counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def decoder_layer_flops(config: Any, tokens: int, cached: int = 0) -> float:
    """FLOPs of one decoder layer over `tokens` new tokens with `cached` keys before them; a multiply-add counts as two.

    Args:
        config: a transformers text config: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim.
        tokens, cached: token counts of one sample.

    Returns:
        Projections, gated MLP and attention. Attention counts every query-key pair of the rectangle, as the papers do: causal kernels do
        about half of it. Norms, RoPE and activations are left out (under 1 %).

    The papers (FastV, PyramidDrop) count a multiply-add once: half of this. LLaVA-1.5's 576 image tokens give their 3.82 "TFLOPs".

    Example:
        >>> from types import SimpleNamespace
        >>> vicuna = SimpleNamespace(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32)
        >>> round(32 * decoder_layer_flops(vicuna, 576) / 2 / 1e12, 2)
        3.82
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = tokens * hidden * head_dim * (2 * heads + 2 * kv_heads)
    attention = 2 * tokens * (cached + tokens) * heads * head_dim
    mlp = 3 * tokens * hidden * config.intermediate_size
    return 2.0 * (projections + attention + mlp)


def decoder_flops(config: Any, tokens_per_layer: Sequence[int], cached_per_layer: Sequence[int] | None = None) -> tuple[float, ...]:
    """`decoder_layer_flops` of every layer.

    Example:
        >>> from types import SimpleNamespace
        >>> tiny = SimpleNamespace(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
        >>> decoder_flops(tiny, (10, 5))
        (14720.0, 6560.0)
    """
    cached = cached_per_layer or [0] * len(tokens_per_layer)
    return tuple(decoder_layer_flops(config, n, c) for n, c in zip(tokens_per_layer, cached))


def encoder_block_flops(attention_weights: int, mlp_weights: int, width: int, tokens: int, tokens_left: int) -> float:
    """FLOPs of one encoder block over `tokens`, whose MLP sees `tokens_left`; a multiply-add counts as two.

    Args:
        attention_weights, mlp_weights: elements of their weight matrices.
        width: heads times head size.

    Returns:
        Projections, attention over all pairs and MLP. Norms, biases and activations are left out (under 1 %), and so is the method's step.

    Example:
        >>> deit_small = (4 * 384 * 384, 8 * 384 * 384, 384)
        >>> round(12 * encoder_block_flops(*deit_small, 197, 197) / 2 / 1e9, 2)
        4.54
    """
    return 2.0 * (tokens * attention_weights + 2 * tokens * tokens * width + tokens_left * mlp_weights)
