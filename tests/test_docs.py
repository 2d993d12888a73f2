"""Everything that the documentation shows is run: docstrings as doctests, the python blocks of README.md and docs/*.md as programs."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import tokensieve
import torch
from tokensieve import info, ops

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "third_party" / "VERSIONS.md"]
SOURCES = ROOT / "python" / "tokensieve"
FILES = [path.relative_to(SOURCES.parent).with_suffix("") for path in SOURCES.rglob("*.py")]
MODULES = sorted(".".join(path.parts).removesuffix(".__init__") for path in FILES if path.name != "__main__")
NEEDS = {  # what the optional parts import
    "tokensieve.models": ("transformers",),
    "tokensieve.cli": ("typer", "rich"),
    "tokensieve.viz": ("PIL",),
    "tokensieve.demo": ("PIL", "rich", "transformers"),
}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_run(name: str) -> None:
    for prefix, packages in NEEDS.items():
        for package in packages if name.startswith(prefix) else ():
            pytest.importorskip(package)
    torch.manual_seed(0)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("name", [*tokensieve.__all__, "attach", "detach", "sieve"])
def test_public_names_have_docstrings_with_examples(name: str) -> None:
    if name in ("attach", "detach", "sieve"):
        pytest.importorskip("transformers")
    thing = getattr(tokensieve, name)
    if inspect.ismodule(thing) or isinstance(thing, str):
        return
    text = inspect.getdoc(thing) or ""
    assert text, f"{name} has no docstring"
    if inspect.isfunction(thing):
        for part in ("Args:", "Returns:", "Raises:", "Example:"):
            assert part in text, f"the docstring of {name} has no {part!r}"


@pytest.fixture(scope="module")
def subject() -> dict[str, Any]:
    """What the pages take as given: a LLaVA model, the inputs of one prompt, and its photo."""
    pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    from PIL import Image
    from tokensieve.demo.model import random_llava

    photo = Image.effect_mandelbrot((336, 336), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    subject = random_llava(photo, seed=0, layers=25, hidden=64)
    return {"model": subject.model, "inputs": subject.inputs, "image": photo}


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, subject: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text, module = page.read_text(), types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    vars(module).update(subject)
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        code = "\n" * line + block.group(1)  # so that a traceback names the page's own line
        exec(compile(code, str(page), "exec"), vars(module))


def table(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its header rows."""
    section = text.split(f"\n{heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_readme_method_table_equals_registry() -> None:
    def plain(cell: str) -> str:
        return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", cell)

    written = [tuple(plain(cell) for cell in row) for row in table((ROOT / "README.md").read_text(), "## Methods")]
    assert written == info.method_rows()


def test_readme_op_table_equals_ops() -> None:
    written = [row[0].strip("`").split("(")[0] for row in table((ROOT / "README.md").read_text(), "## Ops")]
    functions = [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))]
    assert sorted(written) == sorted(functions)


def test_readme_keeps_the_place_of_the_measured_table() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- bench:begin -->") == 1
    assert text.index("<!-- bench:begin -->") < text.index("<!-- bench:end -->")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_pages_name_what_exists(page: Path) -> None:
    """Every `make` target, link and path in code quotes of a page exists."""
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, f"{page.name} names `make {target}`, which the Makefile does not have"
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}, which does not exist"
    folders = "csrc|python|tests|bench|docs|tools|third_party"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        if path.startswith("bench/results"):  # made by a run
            continue
        assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"
