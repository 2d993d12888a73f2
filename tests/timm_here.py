"""timm where torchvision can't be loaded: the wheel of the package index needs the CUDA build of torch; ViTs use nothing of it.

`import timm_here` before `import timm`. With a torchvision that loads, it does nothing.
"""

from __future__ import annotations

import importlib
import sys
from enum import Enum
from types import ModuleType
from typing import Any

NAMES = ("", ".transforms", ".transforms.functional", ".datasets", ".ops", ".ops.misc")


class _Unused:
    """Stands for every class of torchvision; timm subclasses and names them at import, and a ViT never makes one."""


class _Empty(ModuleType):
    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name == "InterpolationMode":
            return Enum(name, {mode: mode.lower() for mode in ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")})
        if name.startswith("__"):
            raise AttributeError(name)
        return _Unused


def _stand_ins() -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {f"torchvision{name}": _Empty(f"torchvision{name}") for name in NAMES}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


def _load() -> None:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        modules = _stand_ins()
        sys.modules.update(modules)
        try:
            importlib.import_module("timm")
        finally:  # transformers asks whether there is a torchvision, and there is none
            for name in modules:
                sys.modules.pop(name, None)


_load()
