"""info, methods, bench and help: what the commands print and how they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokensieve
import torch
from tokensieve import _load, info

pytest.importorskip("typer")
from tokensieve.cli import app
from typer.testing import CliRunner

PACKAGE = Path(tokensieve.__file__).parent


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "200"} | environment
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=120)


def test_info_says_what_loaded_and_by_what_it_was_built() -> None:
    out = invoke("info")
    f = info.facts()
    for word in (tokensieve.__version__, torch.__version__, f["cpu_level"], f["compiler"], f["torch_abi"], str(f["threads"])):
        assert str(word) in out
    if f["cuda_loaded"]:
        assert f["cuda_error"] is None
    else:
        assert f["cuda_error"]
        assert f["cuda_error"].split("/")[-1][:40] in out
    if f["cuda_built"]:
        assert f["cuda_built"]["nvcc"] in out
        assert all(f"sm_{arch}" in out for arch in f["cuda_built"]["archs"])


@pytest.mark.parametrize(("command", "columns"), [("info", "20"), ("methods", "20"), ("methods", "80")])
def test_narrow_terminals_lose_no_text(command: str, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "FOLDER", Path("/" + 200 * "x"))
    result = CliRunner().invoke(app, [command], env={"COLUMNS": columns})
    assert result.exit_code == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.output
    if command == "info":
        assert result.output.count("x") >= 200


def test_info_names_why_the_cuda_library_did_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    state = _load.LoadState("baseline", False, "_C_cuda.so (built by nvcc 13.0) did not load: [/opt/libfoo.so] is missing", {})
    monkeypatch.setattr(_load, "STATE", state)
    out = invoke("info")
    assert "not loaded: _C_cuda.so (built by nvcc 13.0) did not load: [/opt/libfoo.so] is missing" in out
    assert "none in this install" in out


def test_info_shows_a_lowered_cpu_level_and_leaves_it_as_it_was() -> None:
    code = "import tokensieve.info as i, torch; f = i.facts(); print(f['cpu_level'], torch.ops.tokensieve.cpu_level(), *f['cpu_levels'])"
    done = python("-c", code, TOKENSIEVE_CPU="baseline")
    assert done.returncode == 0, done.stderr
    level, number, *levels = done.stdout.split()
    assert (level, number) == ("baseline", "0")
    assert levels[0] == "baseline"


def test_info_refuses_an_unknown_cpu_level() -> None:
    done = python("-m", "tokensieve.info", TOKENSIEVE_CPU="mmx")
    assert done.returncode != 0
    assert "TOKENSIEVE_CPU must be one of baseline, avx2, avx512, got 'mmx'" in done.stderr


def test_info_runs_without_the_cli_packages() -> None:
    done = python("-m", "tokensieve.info")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tokensieve")
    assert "RuntimeWarning" not in done.stderr


def without(*modules: str) -> str:
    """Code that makes imports of these modules fail, as if they were not installed."""
    return f"import sys\nfor m in {modules!r}: sys.modules[m] = None\n"


def test_import_needs_no_cli_package_and_no_transformers() -> None:
    done = python("-c", without("typer", "rich", "PIL", "sklearn", "matplotlib", "transformers") + "import tokensieve, tokensieve.methods")
    assert done.returncode == 0, done.stderr
    loaded = python("-c", "import sys, tokensieve; print([m for m in ('typer', 'rich', 'PIL', 'transformers') if m in sys.modules])")
    assert loaded.stdout.strip() == "[]"


def test_command_line_without_typer_says_in_one_line_what_to_install() -> None:
    code = without("typer") + "import runpy; sys.argv = ['tokensieve', 'info']; runpy.run_module('tokensieve', run_name='__main__')"
    done = python("-c", code)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'tokensieve[cli]'" in done.stderr


def test_methods_lists_the_registry() -> None:
    out = invoke("methods")
    for name, method in tokensieve.methods.METHODS.items():
        assert name in out
        assert method.paper in out


def test_method_rows_have_a_summary_without_the_name() -> None:
    for name, paper, hook, what in info.method_rows():
        assert paper.startswith("arXiv ")
        assert hook in info.HOOKS.values()
        assert what
        assert not what.startswith(name)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []], ids=["--help", "-h", "nothing"])
def test_help_lists_all_commands(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert all(command in result.output for command in ("info", "demo", "methods", "bench"))


def test_unknown_command_is_exit_code_2() -> None:
    assert CliRunner().invoke(app, ["frobnicate"]).exit_code == 2


def test_bench_outside_a_checkout_says_where_the_benchmarks_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_load, "FOLDER", tmp_path / "python" / "tokensieve")
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 1
    assert "make bench" in result.output


def test_bench_in_a_checkout_passes_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text(
        "import sys, pathlib; pathlib.Path('seen').write_text(' '.join(sys.argv[1:])); sys.exit(3)"
    )
    monkeypatch.setattr(_load, "FOLDER", tmp_path / "python" / "tokensieve")
    assert CliRunner().invoke(app, ["bench", "--quick", "select"]).exit_code == 3
    assert (tmp_path / "seen").read_text() == "--quick select"
