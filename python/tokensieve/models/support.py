"""Which models a sieve can attach to, and where their parts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

try:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
    from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaModel
    from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration, LlavaNextModel
    from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model
except ImportError as error:
    raise ImportError(f"tokensieve.models needs transformers >= 5.23 (pip install 'tokensieve[models]'): {error}") from error

DECODERS: tuple[Any, ...] = (LlamaModel, Qwen2Model)
HEADED_DECODERS: tuple[Any, ...] = (LlamaForCausalLM, Qwen2ForCausalLM)
MULTIMODAL: tuple[Any, ...] = (LlavaModel, LlavaNextModel)
HEADED_MULTIMODAL: tuple[Any, ...] = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
SUPPORTED: tuple[Any, ...] = (*HEADED_MULTIMODAL, *MULTIMODAL, *HEADED_DECODERS, *DECODERS)


@dataclass(frozen=True)
class Parts:
    """The modules of one model that a sieve touches."""

    model: Any  # what the caller gave
    decoder: Any  # has .layers, .rotary_emb and .config
    multimodal: Any = None  # merges image features into the prompt; None for a plain decoder
    head: Any = None  # computes the loss; None for a bare model

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def vision(self) -> Any:
        return None if self.multimodal is None else self.multimodal.vision_tower

    @property
    def anyres(self) -> bool:
        return isinstance(self.multimodal, LlavaNextModel)


def find_parts(model: Any) -> Parts:
    """The parts of a supported model.

    Raises:
        TypeError: the model, or the decoder inside it, is not supported; the message names it and what is.
    """
    if isinstance(model, HEADED_MULTIMODAL):
        parts = Parts(model, model.model.language_model, model.model, model)
    elif isinstance(model, MULTIMODAL):
        parts = Parts(model, model.language_model, model)
    elif isinstance(model, HEADED_DECODERS):
        parts = Parts(model, model.model, head=model)
    else:
        parts = Parts(model, model)
    if not isinstance(parts.decoder, DECODERS):
        inside = "" if parts.decoder is model else f" with a {type(parts.decoder).__name__} inside"
        hint = "; it is compiled: sieve the model itself, uncompiled" if hasattr(model, "_orig_mod") else ""
        raise TypeError(
            f"tokensieve.sieve: model must be one of {', '.join(c.__name__ for c in SUPPORTED)} (decoders inside: "
            f"{', '.join(c.__name__ for c in DECODERS)}), got {type(model).__name__}{inside}{hint}"
        )
    sliding = {kind for kind in getattr(parts.decoder.config, "layer_types", None) or () if kind != "full_attention"}
    if sliding:
        raise TypeError(
            f"tokensieve.sieve: model must have full attention in every layer, got {type(model).__name__} with {', '.join(sorted(sliding))}"
        )
    return parts
