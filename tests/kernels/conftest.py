"""The kernel tests' module `_kernels` (csrc/testing): numpy only, so that they also run where torch must not be imported."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("TOKENSIEVE_KERNELS_DIR", ROOT / "build" / "testing"))

# (order, seed, resident blocks). One order alone misses things: descending does not see every dropped barrier, three seeds miss some
# too. The sanitizers judge addresses and the happens-before order, not the answer: two schedules do there, and one
# for the order (TSan takes 2 minutes a schedule).
SCHEDULES = {
    "none": [("ascending", 0, 1), ("descending", 0, 2), ("random", 1, 2), ("random", 2, 3), ("random", 3, 4)],
    "address": [("ascending", 0, 1), ("random", 1, 3)],
    "thread": [("random", 1, 3)],
}


def _load() -> ModuleType | str:
    if not (FOLDER / "_kernels.so").exists():
        return f"the kernel tests' module is not built: no {FOLDER / '_kernels.so'}; run `make testing`"
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("_kernels")
    except ImportError as error:
        return f"{FOLDER / '_kernels.so'} does not load; run `make testing` again: {error}"


_MODULE = _load()


@pytest.fixture
def kernels() -> ModuleType:
    """The module, in its default schedule: ascending, one block after the other."""
    if isinstance(_MODULE, str):
        # Whoever names a folder wants these tests to run.
        (pytest.fail if "TOKENSIEVE_KERNELS_DIR" in os.environ else pytest.skip)(_MODULE)
    _MODULE.configure("ascending", 0, 1)
    return _MODULE


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "scheduled" in metafunc.fixturenames:
        sanitizer = "none" if isinstance(_MODULE, str) else _MODULE.sanitizer
        schedules = SCHEDULES[sanitizer]
        names = [f"{order}{seed or ''}x{blocks}" for order, seed, blocks in schedules]
        metafunc.parametrize("scheduled", schedules, ids=names, indirect=True)


@pytest.fixture
def scheduled(request: pytest.FixtureRequest, kernels: ModuleType) -> ModuleType:
    """The module, once per thread schedule: the answer must not depend on it."""
    kernels.configure(*request.param)
    return kernels
