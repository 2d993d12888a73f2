"""Which modules a sieve is attached to: a second one on the same module is an error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

_ACTIVE: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def claim(model: Any, modules: Sequence[Any], run: Any) -> None:
    """Notes that `run` holds the modules.

    Raises:
        RuntimeError: another run holds one of them.
    """
    for module in modules:
        other = _ACTIVE.get(module)
        if other is not None:
            raise RuntimeError(
                f"tokensieve.sieve: this {type(model).__name__} is already inside a sieve with {other.method!r}; leave that one first "
                "(a sieve can't be nested)"
            )
    for module in modules:
        _ACTIVE[module] = run


def release(modules: Sequence[Any]) -> None:
    """Undoes `claim`."""
    for module in modules:
        _ACTIVE.pop(module, None)


def require_uncompiled(model: Any) -> None:
    """Raises RuntimeError for compiled modules: code that was compiled before runs without hooks, every token would stay, in silence."""
    compiled = [type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None]
    if compiled:
        raise RuntimeError(f"tokensieve.sieve: model must not be compiled, got a compiled {compiled[0]}")
