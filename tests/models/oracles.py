"""Slow, independent ways to get what a sieve must give: plain masks on the unpruned model, and a stand-in for flash attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from tokensieve.models import sieve
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from models import tiny

FLASH = "tokensieve_test_unpadded"  # a name with "flash" would make transformers look for the real one


def _flash(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any) -> Any:
    """Follows flash attention's conventions: a 2-D padding mask or None, rows unpadded per sample, causal from the bottom right."""
    assert attention_mask is None or attention_mask.dim() == 2
    ids = kwargs.get("position_ids")
    if ids is not None and query.shape[0] == 1 and ids.shape[-1] > 1:
        assert bool((ids.diff() == 1).all()), "gaps in position_ids would be taken for packed sequences"
    B, H, L, D = query.shape
    N, groups = key.shape[2], H // key.shape[1]
    out = torch.zeros(B, L, H, D)
    for b in range(B):
        real = torch.ones(N, dtype=torch.bool) if attention_mask is None else attention_mask[b].bool()
        rows = real[N - L :]
        q, k, v = query[b][:, rows], key[b][:, real].repeat_interleave(groups, 0), value[b][:, real].repeat_interleave(groups, 0)
        behind = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
        weights = (q @ k.transpose(1, 2) * scaling).masked_fill(~behind, -torch.inf).softmax(-1)
        out[b, rows] = (weights @ v).transpose(0, 1)
    return out, None


def register_flash() -> str:
    """Registers the stand-in; the name for attn_implementation."""
    AttentionInterface.register(FLASH, _flash)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    return FLASH


@contextmanager
def hidden_keys(model: Any, first_layer: int, visible: Tensor) -> Iterator[None]:
    """The unpruned model (no padding), whose layers from first_layer on don't see the keys that are False in (B, N) visible."""
    layers = _layers(model)
    with ExitStack() as stack:
        for layer in layers[first_layer:]:
            stack.enter_context(_hidden(layer, visible))
        yield


@contextmanager
def hidden_keys_of_each_layer(model: Any, visible: Tensor) -> Iterator[None]:
    """The same for (layers, N) visible, of a batch of one."""
    with ExitStack() as stack:
        for layer, row in zip(_layers(model), visible):
            stack.enter_context(_hidden(layer, row[None]))
        yield


def _layers(model: Any) -> Any:
    decoder = getattr(model, "model", model)
    return getattr(decoder, "language_model", decoder).layers


@contextmanager
def _hidden(layer: Any, visible: Tensor) -> Iterator[None]:
    N = visible.shape[1]
    allowed = torch.ones(N, N).tril().bool() & visible[:, None, None, :]
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def replace(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": bias}

    handle = layer.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that a sieve could leave behind: hooks, attributes, configs, weights."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_backward_hooks"):
            state[f"{name}.{kind}"] = list(getattr(module, kind))
        plain = {k: id(v) for k, v in vars(module).items() if not isinstance(v, dict)}
        state[f"{name}.attributes"] = plain
        if hasattr(module, "config"):
            state[f"{name}.config"] = (module.config.to_dict(), module.config._attn_implementation)
    state["weights"] = {name: value.clone() for name, value in model.state_dict().items()}
    return state


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots are equal."""
    weights, new_weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert all(torch.equal(value, new_weights[name]) for name, value in weights.items())


@torch.no_grad()
def assert_each_picture_as_alone(method: Any) -> None:
    """Two pictures of different sizes in one batch of LLaVA-NeXT: the tokens kept and the text are those of each picture alone."""
    model, first = tiny.llava_next(), tiny.next_inputs()
    ids = tiny.prompt(4, 88, 6, seed=3)  # a 31 x 31 picture: a thumbnail and 2 x 2 crops
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_sizes": torch.tensor([[31, 31]])}
    second["pixel_values"] = torch.randn(1, 5, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    both: dict[str, Any] = dict(zip(("input_ids", "attention_mask"), tiny.pad([first["input_ids"], ids], "left")))
    padded = torch.nn.functional.pad(first["pixel_values"], (0, 0, 0, 0, 0, 0, 0, 2))
    both |= {"pixel_values": torch.cat([padded, second["pixel_values"]])}
    both |= {"image_sizes": torch.cat([first["image_sizes"], second["image_sizes"]])}
    with sieve(model, method) as run:
        batch = model.generate(**both, max_new_tokens=4, do_sample=False)
        kept = run.kept[-1]
        for b, x in enumerate((first, second)):
            alone = model.generate(**x, max_new_tokens=4, do_sample=False)
            assert batch[b, -4:].tolist() == alone[0, -4:].tolist()
            assert [image.tolist() for image in kept[b]] == [image.tolist() for image in run.kept[-1][0]]
