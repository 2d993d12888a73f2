"""The wheel: its tag, size and contents, and one op in a clean environment. Run by `make test-wheel`."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).resolve().parents[2]
LIMIT_MB = 60
OTHER_TORCH = os.environ.get("TOKENSIEVE_WHEEL_TORCH", "")

USE = """
import sys, torch
import tokensieve as ts
from tokensieve import _load
assert "site-packages" in ts.__file__, ts.__file__
query, key, hidden = torch.randn(2, 4, 1, 64), torch.randn(2, 2, 577, 64), torch.randn(2, 577, 32, requires_grad=True)
kept = ts.prune_tokens(query, key, [hidden], 144, key_range=(1, 577))
want = (query @ key.repeat_interleave(2, 1).mT * 64**-0.5).softmax(-1)[..., 1:].mean((1, 2))
torch.testing.assert_close(kept.scores, want)
assert kept.index.shape == (2, 145) and kept.index.tolist() == [sorted(row) for row in kept.index.tolist()]
assert torch.equal(kept.tensors[0], hidden.gather(1, kept.index[..., None].expand(-1, -1, 32)))
kept.tensors[0].sum().backward()
assert hidden.grad.sum() == kept.tensors[0].numel()
torch.library.opcheck(torch.ops.tokensieve.select_topk.default, (torch.randn(2, 9), 3, None, None, None, 0))
print("ran", torch.__version__, _load.STATE.cpu_level, "cuda:", _load.STATE.cuda_error)
"""


def run(command: list[str], folder: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$TOKENSIEVE_WHEEL, or a wheel built here."""
    if given := os.environ.get("TOKENSIEVE_WHEEL"):
        path = Path(given)
        return path if path.is_absolute() else ROOT / path
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)], folder)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_is_for_every_python_of_this_platform(wheel: Path) -> None:
    assert re.fullmatch(rf"tokensieve-[0-9.]+-py3-none-(many)?linux(_\d+_\d+)?_{platform.machine()}\.whl", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/WHEEL"))
        metadata = archive.read(name).decode()
    assert "Root-Is-Purelib: false" in metadata
    assert re.findall(r"^Tag: (\S+)-linux", metadata, re.MULTILINE) == ["py3-none"]


def test_wheel_size(wheel: Path) -> None:
    size = wheel.stat().st_size / 2**20
    assert size < LIMIT_MB, f"{size:.1f} MB"


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if ".dist-info/" not in n]
        facts = json.loads(archive.read("tokensieve/_build_info.json"))
    assert {"tokensieve/__init__.py", "tokensieve/_C.so", "tokensieve/_build_info.json", "tokensieve/py.typed"} <= set(names)
    strange = [n for n in names if not re.fullmatch(r"tokensieve/([a-z_]+/)*[\w.]+\.(py|so|json|typed)", n)]
    assert not strange, strange
    libraries = {n for n in names if n.endswith(".so")}
    assert libraries <= {"tokensieve/_C.so", "tokensieve/_C_cuda.so"}, libraries  # no testing module
    assert ("tokensieve/_C_cuda.so" in libraries) == (facts["cuda"] is not None)
    assert not [n for n in names if re.search(r"(^|/)(tests?|bench|testing|conftest)", n)]
    source = {f"tokensieve/{p.relative_to(ROOT / 'python' / 'tokensieve')}" for p in (ROOT / "python" / "tokensieve").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == source


@pytest.mark.parametrize("requirement", ["torch==2.13.0", pytest.param(OTHER_TORCH, id=f"other-{OTHER_TORCH or 'none'}")])
def test_wheel_runs_an_op_in_a_clean_environment(requirement: str, wheel: Path, tmp_path: Path) -> None:
    if not requirement:
        pytest.skip('name a second torch: make test-wheel TORCH="torch==2.14.1"')
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    run([python, "-m", "pip", "install", "--quiet", requirement, str(wheel)], tmp_path)
    printed = run([python, "-I", "-c", USE], tmp_path)
    print(printed, end="")
    assert printed.startswith(f"ran {requirement.split('==')[-1]}"), printed
