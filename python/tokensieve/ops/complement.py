"""complement_index: the tokens that a selection leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _debug
from ._checks import explain

_op = torch.ops.tokensieve.complement_index.default


def complement_index(index: Tensor, N: int, *, capacity: int | None = None) -> Tensor:
    """Positions of [0, N) that a row of indices does not name, ascending: the dropped tokens of a selection.

    Args:
        index: (B, K) int64 in [-1, N), in any order; -1 names nothing, a position named twice is missing once. Rows may be strided.
        N: tokens a row (a Python int).
        capacity: width of the output (a Python int), default N - K. Where rows hold -1 or name a position twice more than N - K
            positions are left: give N then.

    Returns:
        (B, capacity) int64, -1 behind a row's last position.

    Raises:
        TypeError: a dtype or a Python type that is not taken.
        ValueError: a shape, size, device or stride that breaks a rule above; on the CPU also an index outside [-1, N), and a row that
            leaves more than capacity positions (on CUDA `debug_checks` finds both; without them the first positions are kept).

    Exact and unique, so the same on every back end. No host sync. One bitmap and one ordered pass instead of a mask and `nonzero`.

    Example:
        >>> import torch, tokensieve as ts
        >>> ts.complement_index(torch.tensor([[4, 1], [0, 3]]), 5)
        tensor([[0, 2, 3],
                [1, 2, 4]])
        >>> ts.complement_index(torch.tensor([[2, -1]]), 4, capacity=4)
        tensor([[ 0,  1,  3, -1]])
    """
    try:
        _checks.no_bools(N, capacity)
        width = N - index.shape[1] if capacity is None else capacity
        if _debug.enabled and _debug.readable(index):
            _debug_complement(index, N, width)
        return _op(index, N, width)
    except Exception as error:
        explain(error, _explain, index, N, capacity)


def _explain(index: Any, N: Any, capacity: Any) -> None:
    check_complement(index, N, capacity)
    if index.device.type == "cpu":
        _debug_complement(index, N, N - index.shape[1] if capacity is None else capacity)


def _debug_complement(index: Tensor, N: int, capacity: int) -> None:
    _debug.positions("complement_index", index, N)
    named = torch.zeros(index.shape[0], N + 1, dtype=torch.bool, device=index.device).scatter_(1, index.where(index >= 0, N), True)
    left = N - named[:, :N].sum(1)
    if bool((left > capacity).any()):
        row = int(left.argmax())
        _checks.bad_value("complement_index", f"index must leave at most capacity={capacity} positions, got {int(left[row])} in row {row}")


def check_complement(index: Any, N: Any, capacity: Any) -> None:
    """Raises the rule that these arguments break, if any."""
    op = "complement_index"
    _checks.tensor(op, "index", index, 2, "(B, K)", (torch.int64,))
    _checks.contiguous_last(op, "index", index)
    _checks.integer(op, "N", N)
    if N < 0:
        _checks.bad_value(op, f"N must be at least 0, got {N}")
    if capacity is None:
        if index.shape[1] > N:
            _checks.bad_value(op, f"capacity must be given where K > N={N}, got K={index.shape[1]}")
        return
    _checks.integer(op, "capacity", capacity)
    if capacity < 0:
        _checks.bad_value(op, f"capacity must be at least 0, got {capacity}")


@torch.library.register_fake("tokensieve::complement_index")
def _fake(index: Tensor, N: int, capacity: int) -> Tensor:
    check_complement(index, N, capacity)
    return index.new_empty((index.shape[0], capacity))
