"""Importing: quick, quiet, and clear about a library that is missing or broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ONE_OP = "print(ts.select_topk(torch.tensor([[0.1, 0.7, 0.7]]), 2).tolist())"
CUDA_TORCH = "import torch; torch.version.cuda = '13.0'; "  # what a CUDA build of torch says


@pytest.fixture
def package_copy(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The package in a folder of its own, without the compiled libraries named; returns a runner of code beside it."""
    spec = find_spec("tokensieve")
    assert spec is not None
    assert spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, tmp_path / "tokensieve", ignore=shutil.ignore_patterns("__pycache__"))

    def run(code: str, without: tuple[str, ...] = (), broken: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        for name in without:
            (tmp_path / "tokensieve" / name).unlink(missing_ok=True)
        for name in broken:
            (tmp_path / "tokensieve" / name).write_bytes(b"\x7fELF, but not for long")
        return subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)

    return run


def test_import_is_quiet_and_leaves_optional_packages_alone(run_python: Callable[..., Any]) -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import torch, sys; import tokensieve as ts;"
        "assert ts.__version__; late = {'transformers', 'timm', 'matplotlib', 'PIL', 'typer', 'rich', 'sklearn'} & set(sys.modules);"
        f"assert not late, late; {ONE_OP}"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[1, 2]]\n"
    assert done.stderr == ""


def test_public_names_are_there() -> None:
    import tokensieve as ts

    for name in ts.__all__:
        assert getattr(ts, name) is not None
    assert {"attention_scores", "select_topk", "gather_tokens", "gather_tokens_out", "prune_tokens", "debug_checks"} <= set(ts.__all__)


def test_star_import_needs_no_transformers(run_python: Callable[..., Any]) -> None:
    done = run_python(
        "import sys; sys.modules['transformers'] = None\n"
        "from tokensieve import *\n"
        "assert select_topk and methods\n"
        "import tokensieve\n"
        "try: tokensieve.sieve(None, methods.FastV())\n"
        "except ImportError as error: print(error)"
    )
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout


def test_missing_library_says_how_to_get_it(package_copy: Callable[..., Any]) -> None:
    done = package_copy("import tokensieve", without=("_C.so",))
    assert done.returncode != 0
    assert "ImportError: tokensieve: the compiled library _C.so is missing. Install the wheel, or run `make build`" in done.stderr


def test_cpu_torch_says_why_cuda_is_off(run_python: Callable[..., Any]) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is a CUDA build")
    done = run_python("from tokensieve import _load; print(_load.STATE.cuda_loaded, _load.STATE.cuda_error)")
    assert done.stdout == f"False torch {torch.__version__} is a CPU build\n", done.stderr


def test_wheel_without_cuda_library_says_so_and_works(package_copy: Callable[..., Any]) -> None:
    code = f"{CUDA_TORCH} import tokensieve as ts; from tokensieve import _load; print(_load.STATE.cuda_error); {ONE_OP}"
    done = package_copy(code, without=("_C_cuda.so",))
    assert done.stdout == "this wheel was built without nvcc and holds no CUDA library\n[[1, 2]]\n", done.stderr


def test_broken_cuda_library_leaves_the_cpu_side_alone(package_copy: Callable[..., Any]) -> None:
    code = f"{CUDA_TORCH} import tokensieve as ts; from tokensieve import _load; print(_load.STATE.cuda_error); {ONE_OP}"
    done = package_copy(code, broken=("_C_cuda.so",))
    first, second = done.stdout.splitlines()
    assert first.startswith("_C_cuda.so (built by nvcc "), done.stderr
    assert "did not load: " in first
    assert second == "[[1, 2]]"


def test_cuda_library_loads_under_cpu_torch(package_copy: Callable[..., Any], tmp_path: Path) -> None:
    """It is linked against CPU torch with weak CUDA symbols and a static cudart, so no card and no driver is needed to load it."""
    if not (tmp_path / "tokensieve" / "_C_cuda.so").exists():
        pytest.skip("_C_cuda.so was not built (no nvcc)")
    done = package_copy(f"{CUDA_TORCH} import tokensieve as ts; from tokensieve import _load; print(_load.STATE.cuda_error); {ONE_OP}")
    assert done.stdout == "None\n[[1, 2]]\n", done.stdout + done.stderr


def test_wgmma_is_asked_for_by_a_variable(run_python: Callable[..., Any], package_copy: Callable[..., Any], tmp_path: Path) -> None:
    done = run_python("import tokensieve", TOKENSIEVE_WGMMA="yes")
    assert "ImportError: tokensieve: TOKENSIEVE_WGMMA must be 0 or 1, got 'yes'" in done.stderr
    if not (tmp_path / "tokensieve" / "_C_cuda.so").exists():
        pytest.skip("_C_cuda.so was not built (no nvcc)")
    asked = "import os; os.environ['TOKENSIEVE_WGMMA'] = '1';"
    shown = "from tokensieve.info import lines; print(dict(lines())['CUDA library'])"
    assert package_copy(f"{asked} {CUDA_TORCH} {shown}").stdout == "loaded, with wgmma\n"
    assert package_copy(f"{CUDA_TORCH} {shown}").stdout == "loaded\n"


@pytest.mark.gpu
def test_import_does_not_start_cuda(run_python: Callable[..., Any], cuda: str) -> None:
    done = run_python("import torch, tokensieve; print(torch.cuda.is_initialized())")
    assert done.stdout == "False\n", done.stderr  # so a forked data loader still works
