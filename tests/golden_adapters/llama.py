"""The tiny Llama that the end-to-end vectors were made with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaModel

from .base import Case


def build(case: Case, attention: str = "sdpa") -> LlamaModel:
    """LlamaModel with the vector's weights."""
    weights = {name[2:]: value for name, value in case.inputs.items() if name.startswith("w.")}
    hidden = case.inputs["inputs_embeds"].shape[-1]
    heads, head_dim = case.params["heads"], case.params["head_dim"]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=weights["layers.0.mlp.gate_proj.weight"].shape[0],
        num_hidden_layers=case.params["layers"],
        num_attention_heads=heads,
        num_key_value_heads=weights["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        head_dim=head_dim,
        vocab_size=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        attn_implementation=attention,
    )
    model = LlamaModel(config).eval().to(case.dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["embed_tokens.weight"]
    assert not unexpected
    return model


def prefill_and_decode(model: LlamaModel, case: Case, run: object) -> tuple[Tensor, Tensor, list[int], list[list[int]]]:
    """Prefill output, decode outputs, cache length per layer after the prefill, position per decode step and layer."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(inputs_embeds=case.inputs["inputs_embeds"], past_key_values=cache, use_cache=True)
        lengths = [cache.get_seq_length(layer) for layer in range(model.config.num_hidden_layers)]
        outputs, positions = [], []
        for step in case.inputs["decode_embeds"].split(1, 1):
            outputs.append(model(inputs_embeds=step, past_key_values=cache, use_cache=True).last_hidden_state)
            positions.append([int(p[0, 0]) for p in run.positions])  # type: ignore[attr-defined]
    return first.last_hidden_state, torch.cat(outputs, 1), lengths, positions
