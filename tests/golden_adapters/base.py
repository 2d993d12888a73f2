"""The shape of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

Arrays = dict[str, Tensor]
Dtypes = tuple[torch.dtype, ...]


@dataclass(frozen=True)
class Case:
    """One vector as an adapter sees it: params and inputs, floats already in the dtype under test."""

    params: dict[str, Any]
    inputs: Arrays
    dtype: torch.dtype

    def list(self, name: str) -> list[int]:
        """An integer input as a Python list."""
        return self.inputs[name].tolist()


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Adapter:
    """How one set runs through the public API.

    `inputs` are names of the arrays that it takes, prefixes that end in a dot, or patterns such as "l*_q"; `run` returns outputs by array
    name. `defaults` are the official values of parameters that a file may leave out; `skipped` says why an array is not produced. `half`
    allows float16 and bfloat16 where the file's inputs are exact in them. `rtol`, `atol` are for float32 outputs; `normwise`: atol is a
    share of the output's largest value, for sums of large terms that cancel, where what is left has the rounding of the largest.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[Case], dict[str, Any]]
    defaults: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    half: bool = True
    needs: str | None = None  # a module that may be missing on a machine with torch and numpy only
    rtol: float = 1e-5
    atol: float = 1e-6
    normwise: bool = False

    def params(self, given: dict[str, Any]) -> dict[str, Any]:
        """A file's parameters: counts that were written as 16.0 are ints, what is missing has its official value."""
        return {**self.defaults, **_whole(given)}

    def takes(self, array: str) -> bool:
        """Whether an array is an input."""
        return any(fnmatchcase(array, f"{name}*" if name.endswith(".") else name) for name in self.inputs)


def pad_rows(rows: list[Tensor], width: int, fill: int = -1) -> Tensor:
    """1-D tensors -> (len(rows), width), filled at the end."""
    out = torch.full((len(rows), width), fill, dtype=rows[0].dtype if rows else torch.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
