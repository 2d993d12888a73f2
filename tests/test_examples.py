"""The examples run, at a tiny size, and what is committed beside them came out of them."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "examples" / "digits"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("digits_example", DIGITS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_digits_runs_at_a_tiny_size(digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(digits, "SHARES", (1.0, 0.5))
    everything = digits.data

    def few(seed: int) -> Any:
        images, labels, test, truth = everything(seed)
        return images[:160], labels[:160], test[:60], truth[:60]

    monkeypatch.setattr(digits, "data", few)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = digits.main(["--seeds", "2", "--epochs", "2", "--width", "16", "--output", str(tmp_path)])
    torch.set_num_threads(before)
    assert {row["method"] for row in rows} == set(digits.METHODS)
    whole = {row["accuracy"] for row in rows if row["kept"] == 64}
    assert len(whole) == 1  # nothing left: every method is the model itself
    half = [row for row in rows if row["kept"] == 32]
    assert len(half) == 5
    assert len({row["mean_tokens"] for row in half}) == 1  # the same budget in every block, EViT's fused token counted
    assert all(0 <= row["accuracy"] <= 1 and row["seeds"] == 2 for row in rows)
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    assert len((tmp_path / "accuracy.csv").read_text().splitlines()) == 1 + len(rows)


def test_digits_committed_numbers_are_what_the_readme_says(digits: Any) -> None:
    """Every method and budget of the script is there, for 3 seeds; what beats random dropping, and where."""
    with (DIGITS / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    kept = {digits.counts(share)[-1] for share in digits.SHARES}
    assert {(row["method"], int(row["kept"])) for row in rows} == {(name, n) for name in digits.METHODS for n in kept}
    assert {row["seeds"] for row in rows} == {"3"}
    at = {(row["method"], int(row["kept"])): float(row["accuracy"]) for row in rows}
    for kept in (32, 26, 19, 13, 8):
        assert min(at["ToMe", kept], at["EViT", kept]) > max(at["random", kept], at["uniform", kept])
    readme = (ROOT / "README.md").read_text()
    assert "examples/digits/accuracy.png" in readme
    assert f"{at['ToMe', 32]:.1%}".replace("%", " %") in readme
    assert f"{at['EViT', 32]:.1%}".replace("%", " %") in readme
