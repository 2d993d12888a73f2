"""Value checks that read data back (a host sync on a GPU), so they are off unless asked for."""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _checks

enabled = os.environ.get("TOKENSIEVE_DEBUG", "0") not in ("", "0")


class debug_checks:
    """Turns the value checks on or off, for good or within a `with` block.

    They find NaN scores and wrong per-row k in the selections, duplicate or out-of-range indices in `gather_tokens`, `scatter_tokens`
    and `pack_tokens`, tokens in two lists of `bipartite_match`. Each reads data on the host, which stalls a GPU; meta tensors and code
    under torch.compile are not checked. The environment variable `TOKENSIEVE_DEBUG=1`, read once at import, turns them on from the start.

    Args:
        on: whether the checks run from now on.

    Example:
        >>> import torch, tokensieve as ts
        >>> with ts.debug_checks():
        ...     ts.select_topk(torch.tensor([[1.0, float("nan")]]), 1)
        Traceback (most recent call last):
        ...
        ValueError: tokensieve.select_topk: scores must hold no NaN (debug check), got 1, the first at (0, 1)
    """

    def __init__(self, on: bool = True) -> None:
        global enabled
        self._before = enabled
        enabled = on

    def __enter__(self) -> debug_checks:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        global enabled
        enabled = self._before


def readable(t: object) -> bool:
    """Whether t has values to check: a meta or fake tensor, and one that torch.compile traces, has none."""
    return isinstance(t, Tensor) and not t.is_meta and not isinstance(t, FakeTensor) and not torch.compiler.is_compiling()


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def selection(op: str, scores: Tensor, k_rows: Tensor | None, max_k: int) -> None:
    """Raises for NaN scores and for k outside [0, max_k]."""
    nan = torch.isnan(scores)
    if bool(nan.any()):
        _checks.bad_value(op, f"scores must hold no NaN (debug check), got {int(nan.sum())}, the first at {_first(nan)}")
    if k_rows is not None:
        counts(op, k_rows, max_k)


def counts(op: str, k_rows: Tensor, max_k: int) -> None:
    """Raises for k outside [0, max_k]; the CPU kernels refuse those too, so this also says which one they met."""
    wrong = (k_rows < 0) | (k_rows > max_k)
    if bool(wrong.any()):
        where = _first(wrong)
        _checks.bad_value(op, f"k must be in [0, max_k={max_k}] in every row, got {int(k_rows[where])} in row {where[0]}")


def shares(op: str, mass: Tensor) -> None:
    """Raises for a mass outside (0, 1]."""
    wrong = ~((mass > 0) & (mass <= 1))
    if bool(wrong.any()):
        where = _first(wrong)
        _checks.bad_value(op, f"mass must be in (0, 1] in every row (debug check), got {float(mass[where])} in row {where[0]}")


def positions(op: str, index: Tensor, N: int, name: str = "index") -> None:
    """Raises for indices outside [-1, N); the CPU kernels refuse those too, so this also says which one they met."""
    wrong = (index < -1) | (index >= N)
    if bool(wrong.any()):
        where = _first(wrong)
        _checks.bad_value(op, f"{name} must be in [-1, N={N}), got {int(index[where])} at {where}")


def indices(op: str, index: Tensor, N: int, name: str = "index") -> None:
    """Raises for indices outside [-1, N) and for a token that a row names twice."""
    positions(op, index, N, name)
    ordered = index.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        row, column = _first(twice)
        _checks.bad_value(op, f"{name} must name a token once per row (debug check), got {int(ordered[row, column])} twice in row {row}")


def first_picks(op: str, first: Tensor, N: int) -> None:
    """Raises for first picks outside [-1, N)."""
    wrong = (first < -1) | (first >= N)
    if bool(wrong.any()):
        row = _first(wrong)[0]
        _checks.bad_value(op, f"first must be in [-1, N={N}), got {int(first[row])} in row {row}")


def runs(op: str, starts: Tensor, length: int, S: int) -> None:
    """Raises for runs of `length` tokens that do not ascend, overlap or end outside [0, S)."""
    ends = torch.nn.functional.pad(starts[:, 1:], (0, 1), value=S)  # a run ends before the next one begins
    wrong = (starts < 0) | (starts + length > ends)
    if bool(wrong.any()):
        where = _first(wrong)
        _checks.bad_value(op, f"starts must be ascending, runs must not overlap and must end inside x, got {int(starts[where])} at {where}")


def rows(op: str, name: str, index: Tensor, count: int, letter: str) -> None:
    """Raises for rows or labels outside [-1, count)."""
    wrong = (index < -1) | (index >= count)
    if bool(wrong.any()):
        where = _first(wrong)
        _checks.bad_value(op, f"{name} must be in [-1, {letter}={count}), got {int(index[where])} at {where}")


def centers(op: str, index: Tensor, N: int) -> None:
    """Raises for centres outside [0, N), and with debug checks for one that a row names twice."""
    wrong = (index < 0) | (index >= N)
    if bool(wrong.any()):
        where = _first(wrong)
        _checks.bad_value(op, f"centers must be in [0, N={N}), got {int(index[where])} at {where}")
    if enabled:
        indices(op, index, N, "centers")
