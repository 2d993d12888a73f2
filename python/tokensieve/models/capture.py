"""Reads the queries and keys of one attention module through transformers' attention interface: any back end, no attention map."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

NAME = "tokensieve_capture"
OnCapture = Callable[[Tensor, Tensor], None]


def _captured_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Hands (query, key) to the listener, then runs the attention that the model is configured for."""
    listening: Any = module.config
    module.config = listening.tokensieve_original  # flash attention looks its own name up in module.config
    listening.tokensieve_listener(query, key)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(listening.tokensieve_original._attn_implementation, eager)
    return attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, _captured_attention)


def listen(module: Any, listener: OnCapture, wanted: Callable[[], bool]) -> list[Any]:
    """Hooks an attention module: whenever wanted() it calls listener(query (B, H, L, D), key (B, Hkv, N, D)), both after RoPE and cache.

    The module's config is swapped for a copy only between the start of its forward and its attention call; nothing else sees it.
    """
    original = module.config

    def before(_module: Any, _args: Any, _kwargs: Any) -> None:
        if wanted():
            config = copy.copy(original)
            config._attn_implementation_internal = NAME
            config.tokensieve_original = original
            config.tokensieve_listener = listener
            module.config = config

    def after(_module: Any, _args: Any, _output: Any) -> None:
        module.config = original

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after, always_call=True)]
