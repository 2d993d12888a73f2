"""pack_tokens and unpack_tokens: ragged rows laid end to end, as variable-length attention takes them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import explain
from .gather import check_gather, gather_tokens

_op = torch.ops.tokensieve.pack_index.default


class Packed(NamedTuple):
    """Result of `pack_tokens`.

    tensors: (capacity, ...) rows, a tensor for a tensor, a tuple for a sequence; zeros behind the last token.
    cu_seqlens: (B + 1,) int32, the first packed row of every sample, never above the capacity.
    slots: (B, K) int64, the packed row of every entry of index; -1 where index is -1 or the capacity is used up.
    total: () int64, the tokens that index names; more than the capacity means that the rest is missing.

    Example:
        >>> import torch, tokensieve as ts
        >>> packed = ts.pack_tokens(torch.arange(3.0).view(1, 3), torch.tensor([[2, -1]]), 4)
        >>> packed.tensors, packed.slots, packed.total
        (tensor([2., 0., 0., 0.]), tensor([[ 0, -1]]), tensor(1))
    """

    tensors: Any
    cu_seqlens: Tensor
    slots: Tensor
    total: Tensor


def pack_tokens(tensors: Tensor | Sequence[Tensor], index: Tensor, capacity: int) -> Packed:
    """The tokens that a ragged index names, sample after sample without padding, for attention with cu_seqlens.

    Methods that keep what passes a threshold (A-ViT, ATS, IA-RED2) leave a different number of tokens in every sample. The size of the
    outcome is a Python int, so nothing is read on the host; `index.numel()` is always enough.

    Args:
        tensors: one (B, N, ...) tensor or a sequence of them, as in `gather_tokens`. A view whose batch and token axes are not one axis
            apart (x[:, 35:611], transposed heads) is copied first.
        index: (B, K) int64 in [-1, N), -1 anywhere; no token twice in a row where gradients are needed.
        capacity: rows of the outcome, an int in [0, 2^31).

    Returns:
        Packed. Tokens keep the order of index. No sample has more than K tokens, which serves as the max_seqlen of varlen attention. Where
        `total > capacity`, the tokens from row `capacity` on are dropped (their slots are -1) and the samples there are cut or empty.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device, stride, capacity or (CPU) index that breaks a rule above.

    Differentiable in tensors. Deterministic; no host sync.

    Example:
        >>> import torch, tokensieve as ts
        >>> x, index = torch.arange(8.0).view(2, 4), torch.tensor([[0, 2, 3], [1, -1, -1]])
        >>> packed = ts.pack_tokens(x, index, 6)
        >>> packed.tensors, packed.cu_seqlens
        (tensor([0., 2., 3., 5., 0., 0.]), tensor([0, 3, 4], dtype=torch.int32))
        >>> ts.scatter_tokens(x, index, ts.unpack_tokens(packed.tensors * 10, packed.slots))
        tensor([[ 0.,  1., 20., 30.],
                [ 4., 50.,  6.,  7.]])
    """
    single = isinstance(tensors, Tensor)
    items: Any = [tensors] if single else tensors
    try:
        if _debug.enabled and _debug.readable(index):
            _debug.indices("pack_tokens", index, items[0].shape[1])
        _checks.no_bools(capacity)
        rows, slots, cu_seqlens, total = _op(index, items[0].shape[1], capacity)
        flat = [t.reshape(1, t.shape[0] * t.shape[1], *t.shape[2:]) for t in items]
        found = gather_tokens(flat, rows[None])
    except Exception as error:
        explain(error, _explain, items, index, capacity)
    out = tuple(t[0] for t in found)
    return Packed(out[0] if single else out, cu_seqlens, slots, total)


@overload
def unpack_tokens(packed: Tensor, slots: Tensor) -> Tensor: ...
@overload
def unpack_tokens(packed: Sequence[Tensor], slots: Tensor) -> tuple[Tensor, ...]: ...


def unpack_tokens(packed: Tensor | Sequence[Tensor], slots: Tensor) -> Tensor | tuple[Tensor, ...]:
    """The inverse of `pack_tokens`: packed rows as a padded batch.

    Args:
        packed: one (T, ...) tensor or a sequence of them, for example what a block made of `Packed.tensors`.
        slots: (B, K) int64, `Packed.slots`.

    Returns:
        (B, K, ...): the packed row of every entry of the index that was packed, zeros where slots is -1. With that index, `scatter_tokens`
        writes them back to where they came from; where tokens were dropped, with `index.where(slots >= 0, -1)`.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, device or (CPU) slot that breaks a rule above.

    Differentiable in packed. Deterministic; no host sync.

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.unpack_tokens(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([[0, 1], [2, -1]]))
        tensor([[5., 6.],
                [7., 0.]])
    """
    single = isinstance(packed, Tensor)
    items: Any = [packed] if single else packed
    try:
        found = gather_tokens([t[None] for t in items], slots.reshape(1, slots.shape[0] * slots.shape[1]).contiguous())
    except Exception as error:
        explain(error, check_unpack, items, slots)
    out = tuple(t.view(*slots.shape, *t.shape[2:]) for t in found)
    return out[0] if single else out


def _explain(tensors: Any, index: Any, capacity: Any) -> None:
    op = "pack_tokens"
    check_gather(op, tensors, index)
    _checks.integer(op, "capacity", capacity)
    if not 0 <= capacity < 2**31:
        _checks.bad_value(op, f"capacity must be in [0, 2^31), got {capacity}")
    if index.device.type == "cpu":
        _debug.positions(op, index, tensors[0].shape[1])


def check_unpack(packed: Any, slots: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "unpack_tokens"
    _checks.tensor(op, "slots", slots, 2, "(B, K)", (torch.int64,))
    if isinstance(packed, Tensor) or not isinstance(packed, Sequence):
        _checks.bad_type(op, f"packed must be a sequence of tensors, got {type(packed).__name__}")
    if len(packed) == 0:
        _checks.bad_value(op, "packed must hold at least one tensor, got none")
    for i, t in enumerate(packed):
        _checks.tensor(op, f"packed[{i}]", t)
        if t.dim() == 0 or (isinstance(packed[0], Tensor) and t.shape[0] != packed[0].shape[0]):
            _checks.bad_value(op, f"packed[{i}] must be (T, ...) with the T of all, got shape {_checks.shape(t)}")
        _checks.same_device(op, f"packed[{i}]", t, "slots", slots)
        if not _checks.segments_of_contiguous(t[None]):
            _checks.bad_value(op, f"packed[{i}] must have contiguous rows, got strides {tuple(t.stride())}; call .contiguous()")
    if slots.device.type == "cpu":
        T = packed[0].shape[0]
        wrong = (slots < -1) | (slots >= T)
        if bool(wrong.any()):
            _checks.bad_value(op, f"slots must be in [-1, T={T}), got {int(slots[wrong][0])}")


@torch.library.register_fake("tokensieve::pack_index")
def _fake(index: Tensor, N: int, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, K = index.shape
    return index.new_empty(capacity), index.new_empty(B, K), index.new_empty(B + 1, dtype=torch.int32), index.new_empty(())
