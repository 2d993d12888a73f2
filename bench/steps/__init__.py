"""The prune step of every method, one module per group. A module here with STEPS, {registry name: settings -> Case}, is found by itself."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from ..harness import Case, Settings

Build = Callable[[Settings], Case]


def steps() -> dict[str, Build]:
    """Of every module here, by registry name."""
    found: dict[str, Build] = {}
    for module in iter_modules(__path__):
        for name, build in getattr(import_module(f"{__name__}.{module.name}"), "STEPS", {}).items():
            if name in found:
                raise ValueError(f"bench.steps: two modules have a step for {name}")
            found[name] = build
    return found
