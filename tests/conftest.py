"""Devices and seeds that all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

try:
    import hypothesis

    hypothesis.settings.register_profile("tokensieve", deadline=None, derandomize=True, max_examples=60)
    hypothesis.settings.load_profile("tokensieve")
except ImportError:  # a GPU machine may have torch, numpy and pytest only
    pass

CUDA = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.fixture(params=["cpu", *CUDA])
def device(request: pytest.FixtureRequest) -> str:
    """Every op test runs on the CPU and, unchanged, on a GPU where there is one."""
    return str(request.param)


@pytest.fixture
def cuda() -> str:
    """For tests that make no sense on a CPU (graphs, syncs); mark them gpu."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(code, NAME=value, ...): the code in a fresh interpreter that finds the same package, with these environment variables."""
    package = find_spec("tokensieve")
    assert package is not None
    assert package.origin is not None
    path = os.pathsep.join(filter(None, [str(Path(package.origin).parent.parent), os.environ.get("PYTHONPATH")]))

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        full = os.environ | {"PYTHONPATH": path} | environment
        return subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True)

    return run
