"""The recipes of the Makefile that start our programs find the package in a source checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "bench"])
def test_make_runs_the_program_from_a_checkout(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--old-file=build", target, f"PY={sys.executable}", "ARGS=--help"]  # build is up to date: this test runs after it
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--" in done.stdout
