"""sieve(model, method): a method inside a transformers model, for the length of a with block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..methods.base import Method
from .run import SieveRun


def sieve(model: Any, method: Method, *, image_mask: Tensor | None = None, spans: Sequence[Any] | None = None) -> SieveRun:
    """Attaches a method to a model for the length of a `with` block; forward and `generate` then run with fewer image tokens.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT, or a plain Llama or Qwen2 decoder of transformers, with or without its head. Any attention
            back end, padding on either side, grouped-query attention, a DynamicCache, several images, several turns.
        method: an `EncoderMethod` (needs a LLaVA model) or a `DecoderMethod`, such as those of `tokensieve.methods`.
        image_mask: (B, S) bool, image tokens of the prompt; for plain decoders. S counts from the first cached token.
        spans: instead of image_mask, (start, length) spans for every sample, or a list of such spans for each sample.

    Returns:
        A `SieveRun`, used once: `with sieve(...) as run`. On exit, also by an exception, the model is exactly as before.

    Raises:
        TypeError: a model or method that is not supported; the message says what is.
        ValueError: a method that does not fit the model's depth.
        RuntimeError: on entering twice, inside another sieve of the same model, or with a model whose modules are compiled.

    The hooks belong to the model, so one thread at a time may run it. Assisted and prompt-lookup decoding work, but their first call
    already carries guessed tokens, the last of which ranks, so they may keep other tokens than greedy decoding does.

    A pruned cache holds a different number of tokens in each layer: continue it only inside a sieve with the same method. All images of a
    prompt share one budget. Outputs are shorter than inputs: logits[:, -1] is the last token for unpadded and left-padded prompts.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaModel
        >>> from tokensieve.methods import FastV
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaModel(config).eval()
        >>> with torch.no_grad(), sieve(model, FastV(layer=1, ratio=0.5), spans=[(2, 8)]) as run:
        ...     out = model(torch.arange(14)[None])
        >>> out.last_hidden_state.shape, run.report.tokens
        (torch.Size([1, 10, 32]), (14, 10, 10))
    """
    return SieveRun(model, method, image_mask, spans)


def attach(model: Any, method: Method, *, image_mask: Tensor | None = None, spans: Sequence[Any] | None = None) -> SieveRun:
    """`sieve` without a with block.

    Args:
        model, method, image_mask, spans: as in `sieve`.

    Returns:
        The attached `SieveRun`; `detach` undoes it.

    Raises:
        TypeError, ValueError, RuntimeError: as `sieve`.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> from tokensieve.methods import FastV
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
        >>> run = attach(LlamaModel(config), FastV(layer=1), spans=[(2, 8)])
        >>> detach(run)
    """
    return SieveRun(model, method, image_mask, spans).__enter__()


def detach(run: SieveRun) -> None:
    """Undoes `attach`: the model is exactly as before.

    Args:
        run: what `attach` returned; it keeps its report. Detaching twice does nothing.

    Returns:
        None.

    Raises:
        AttributeError: run is not a `SieveRun`.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> from tokensieve.methods import FastV
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
        >>> model = LlamaModel(config)
        >>> detach(attach(model, FastV(layer=1), spans=[(2, 8)]))
        >>> len(model._forward_pre_hooks)
        0
    """
    run.__exit__(None, None, None)
