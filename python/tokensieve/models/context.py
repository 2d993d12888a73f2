"""sieve(model, method): a method inside a transformers or timm model, for the length of a with block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from ..methods.base import BlockMethod, Method
from .block_run import BlockRun

if TYPE_CHECKING:
    from .run import SieveRun


@overload
def sieve(model: Any, method: BlockMethod, *, image_mask: None = None, spans: None = None) -> Any: ...
@overload
def sieve(model: Any, method: Method, *, image_mask: Tensor | None = None, spans: Sequence[Any] | None = None) -> SieveRun: ...
def sieve(model: Any, method: Method, *, image_mask: Tensor | None = None, spans: Sequence[Any] | None = None) -> SieveRun | BlockRun:
    """Attaches a method to a model for the length of a `with` block; forward and `generate` then run with fewer image tokens.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT, or a plain Llama or Qwen2 decoder of transformers, with or without its head. Any attention
            back end, padding on either side, grouped-query attention, a DynamicCache, several images, several turns.
            For a `BlockMethod` an image encoder: timm's ViT or DeiT (distilled and with registers too), or a CLIP, SigLIP or DINOv2 model
            of transformers, of which the tower is sieved; or a LLaVA, whose prompt then holds as many image tokens as the tower gives.
        method: an `EncoderMethod` (needs a LLaVA model), a `DecoderMethod` or a `BlockMethod`, such as those of `tokensieve.methods`.
        image_mask: (B, S) bool, image tokens of the prompt; for plain decoders. S counts from the first cached token.
        spans: instead of image_mask, (start, length) spans for every sample, or a list of such spans for each sample.

    Returns:
        A `SieveRun`, or for a `BlockMethod` a `BlockRun` (inside LLaVA a `SieveRun` whose `tower` is one), used once: `with sieve(...) as
        run`. On exit, also by an exception, the model is exactly as before.

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
    if isinstance(method, BlockMethod):
        if image_mask is not None or spans is not None:
            raise ValueError(f"tokensieve.sieve: image_mask and spans must be None for {type(method).__name__}: an encoder sees no text")
        if not (hasattr(model, "vision_tower") or hasattr(getattr(model, "model", None), "vision_tower")):
            return BlockRun(model, method)
    try:
        from .inside import InsideRun
        from .run import SieveRun
    except ModuleNotFoundError as error:
        raise ImportError(f"tokensieve.sieve of a {type(method).__name__} needs {error.name}: pip install 'tokensieve[models]'") from error
    return InsideRun(model, method) if isinstance(method, BlockMethod) else SieveRun(model, method, image_mask, spans)


def attach(model: Any, method: Method, *, image_mask: Tensor | None = None, spans: Sequence[Any] | None = None) -> SieveRun | BlockRun:
    """`sieve` without a with block.

    Args:
        model, method, image_mask, spans: as in `sieve`.

    Returns:
        The attached `SieveRun` or `BlockRun`; `detach` undoes it.

    Raises:
        TypeError, ValueError, RuntimeError: as `sieve`.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> from tokensieve.methods import FastV
        >>> config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)
        >>> run = attach(LlamaModel(config), FastV(layer=1), spans=[(2, 8)])
        >>> detach(run)
    """
    return sieve(model, method, image_mask=image_mask, spans=spans).__enter__()


def detach(run: SieveRun | BlockRun) -> None:
    """Undoes `attach`: the model is exactly as before.

    Args:
        run: what `attach` returned; it keeps its report. Detaching twice does nothing.

    Returns:
        None.

    Raises:
        AttributeError: run is neither.

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
