"""Which modules a sieve is attached to: a second one on the same module is an error."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

_THREADS = "tokensieve.sieve: a model inside a sieve must be run by one thread at a time, got two; give each thread its own model"
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


def refuse_copy(module: Any, *_: Any) -> None:
    """Raises RuntimeError for a module that no run holds: it is a copy of one that was, with half of the sieve. Also a forward pre-hook."""
    if not torch.compiler.is_compiling() and module not in _ACTIVE:  # a compiler would break its graph at the look-up
        raise RuntimeError(
            f"tokensieve.sieve: this {type(module).__name__} is a copy made inside a sieve and has half of its hooks; copy it outside"
        )


def guard(module: Any, enter: Callable[..., Any], leave: Callable[..., None]) -> list[Any]:
    """Hooks before and after a claimed module that refuse a copy of it (which carries half of the sieve) and a second thread.

    Returns:
        The handles. Both threads get the error: of a multimodal model, the second one has already told the run about its images.
    """
    inside: list[threading.Thread] = []  # the owner of the running call, then whoever came meanwhile

    def before(called: Any, args: Any, kwargs: Any) -> Any:
        refuse_copy(called)
        here = threading.current_thread()
        inside[:] = [thread for thread in inside if thread.is_alive() and thread is not here] + [here]
        if len(inside) > 1:
            raise RuntimeError(_THREADS)
        return enter(called, args, kwargs)

    def after(called: Any, args: Any, output: Any) -> None:
        if not inside or inside[0] is not threading.current_thread():
            return
        disturbed = len(inside) > 1
        inside.clear()
        leave(called, args, output)
        if disturbed:
            raise RuntimeError(_THREADS)

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after, always_call=True)]


def require_uncompiled(model: Any) -> None:
    """Raises RuntimeError for compiled modules: code that was compiled before runs without hooks, every token would stay, in silence."""
    compiled = [type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None]
    if compiled:
        raise RuntimeError(f"tokensieve.sieve: model must not be compiled, got a compiled {compiled[0]}")
