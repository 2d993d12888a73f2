"""The rules of the ops' arguments as TypeError and ValueError.

The ops call C++ directly and come here only when that refused (or from a fake), so a good call pays nothing for its checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _load

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS: dict[str | None, int] = {None: 0, "mean": 1, "sum": 2, "max": 3}
ROW_REDUCTIONS: dict[str | None, int] = {**REDUCTIONS, "visible_mean": 4}
ACTIVATIONS = {"softmax": 0, "logit": 1, "sigmoid": 2}
NORMALIZATIONS = {"row": 0, "range": 1}
ORDERS = {"position": 0, "score": 1}


def explain(error: Exception, check: Callable[..., None], *arguments: Any) -> NoReturn:
    """Turns what C++ refused into the Python error of the rule that was broken; anything else is raised as it came.

    The arguments of the check come apart from it: a lambda would make every argument of the op a cell, at 20 ns each in a good call.
    """
    if isinstance(error, RuntimeError):
        _explain_vmap(str(error))
    check(*arguments)
    if isinstance(error, RuntimeError) and str(error).startswith("tokensieve."):
        raise ValueError(str(error)) from None
    raise error


def _explain_vmap(text: str) -> None:
    """torch runs an op sample by sample under vmap, but not one that takes a list of tensors; the checks cannot read those either."""
    if text.startswith("Batching rule not implemented for tokensieve::"):
        op = text.split("tokensieve::")[1].split(".")[0]
        bad_value(op, "tensors must not be those of torch.func.vmap, got a batched one; every op takes a batch: fold the dimension into B")


def bad_value(op: str, text: str) -> NoReturn:
    raise ValueError(f"tokensieve.{op}: {text}")


def bad_type(op: str, text: str) -> NoReturn:
    raise TypeError(f"tokensieve.{op}: {text}")


def shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def tensor(op: str, name: str, value: Any, rank: int | None = None, layout: str = "", dtypes: Sequence[torch.dtype] = ()) -> None:
    """`value` is a dense tensor of this rank and one of these dtypes, on a device that a loaded library serves."""
    if not isinstance(value, Tensor):
        bad_type(op, f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout).removeprefix("torch.")
        bad_value(op, f"{name} must be a dense (strided) tensor, got {kind}")
    if dtypes and value.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        bad_type(op, f"{name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if rank is not None and value.dim() != rank:
        bad_value(op, f"{name} must be {layout}, got shape {shape(value)}")
    if value.device.type == "cuda" and not _load.STATE.cuda_loaded:
        raise RuntimeError(f"tokensieve.{op}: {name} is on {value.device}, but the CUDA library is not loaded: {_load.STATE.cuda_error}")
    if value.device.type not in ("cpu", "cuda", "meta"):
        bad_value(op, f"{name} must be on a cpu, cuda or meta device, got {value.device}")


def contiguous_last(op: str, name: str, t: Tensor) -> None:
    if t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
        bad_value(op, f"{name} must be contiguous in its last dimension (stride 1), got stride {t.stride(-1)}; call .contiguous()")


def same_device(op: str, name: str, t: Tensor, reference_name: str, reference: Tensor) -> None:
    if t.device != reference.device:
        bad_value(op, f"{name} must be on the device of {reference_name} ({reference.device}), got {t.device}")


def exact_shape(op: str, name: str, t: Tensor, expected: Sequence[int], layout: str) -> None:
    if tuple(t.shape) != tuple(expected):
        bad_value(op, f"{name} must be {layout} = {tuple(expected)}, got shape {shape(t)}")


def option(op: str, name: str, value: Any, allowed: dict[Any, int]) -> None:
    if not isinstance(value, (str, type(None))) or value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        bad_value(op, f"{name} must be one of {names}, got {value!r}")


def integer(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        bad_type(op, f"{name} must be an int, got {type(value).__name__}")


def no_bools(*values: Any) -> None:
    """Refuses what C++ would read as 0 or 1; `explain` then says which argument it was."""
    for value in values:
        if isinstance(value, bool):
            raise TypeError("a number, not a bool")


def flag(op: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        bad_type(op, f"{name} must be a bool, got {type(value).__name__}")


def token_mask(op: str, name: str, mask: Any, tokens_name: str, tokens: Tensor) -> None:
    """`mask` is (B, N) bool over the tokens of a (B, N, ...) tensor."""
    tensor(op, name, mask, 2, "(B, N)", (torch.bool,))
    exact_shape(op, name, mask, tuple(tokens.shape[:2]), "(B, N)")
    same_device(op, name, mask, tokens_name, tokens)
    contiguous_last(op, name, mask)


def key_range(op: str, value: Any, N: int) -> None:
    if not isinstance(value, Sequence) or len(value) != 2:
        bad_type(op, f"key_range must be a pair (start, end) of ints, got {value!r}")
    for part in value:
        integer(op, "key_range", part)
    start, end = value
    if not 0 <= start <= end <= N:
        bad_value(op, f"key_range must satisfy 0 <= start <= end <= N={N}, got ({start}, {end})")


def token_tensors(op: str, tensors: Any, B: int, N: int, reference_name: str, reference: Tensor) -> None:
    """`tensors` is a sequence of (B, N, ...) tensors whose trailing axes are M segments of contiguous elements."""
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        bad_type(op, f"tensors must be a sequence of tensors, got {type(tensors).__name__}")
    if len(tensors) == 0:
        bad_value(op, "tensors must hold at least one tensor, got none")
    for i, t in enumerate(tensors):
        name = f"tensors[{i}]"
        tensor(op, name, t)
        if t.dim() < 2 or t.shape[0] != B or t.shape[1] != N:
            bad_value(op, f"{name} must be (B={B}, N={N}, ...), got shape {shape(t)}")
        same_device(op, name, t, reference_name, reference)
        token_layout(op, name, t)


def token_layout(op: str, name: str, t: Tensor) -> None:
    """`t` is (B, N, ...) whose trailing axes are M segments of contiguous elements."""
    if not segments_of_contiguous(t):
        rule = f"{name} must have at most one strided axis over contiguous elements after (B, N)"
        bad_value(op, f"{rule}, got shape {shape(t)} with strides {tuple(t.stride())}; call .contiguous()")


def segments_of_contiguous(t: Tensor) -> bool:
    axes = [(size, stride) for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True) if size != 1]
    width = 1
    while axes and axes[-1][1] == width:
        width *= axes.pop()[0]
    return all(outer == size * inner for (_, outer), (size, inner) in pairwise(axes))
