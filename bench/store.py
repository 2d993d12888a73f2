"""Result files: one JSON a family, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from . import ROOT

RESULTS = ROOT / "bench" / "results"
FIELDS = ("op", "case", "dtype", "device", "median_us", "p10_us", "p90_us", "floor_us", "peers", "correct")
_OPS = ("select", "gather", "ragged", "score", "colsum", "similarity", "match", "merge", "pool")
ORDER = (*_OPS, "prune", "methods", "encoder", "overhead", "memory")


def save(folder: Path, family: str, content: dict[str, Any]) -> Path:
    """Writes folder/family.json through a temporary file, so a reader or Ctrl-C never meets half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{family}.json"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(rounded(content), file, indent=1)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def rounded(value: Any) -> Any:
    """Floats to 5 significant digits: the rest is noise and makes diffs long."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """{family: content} of a machine's folder, in the order of ORDER."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else len(ORDER), item[0])))


def machines() -> list[Path]:
    """Folders of bench/results, the newest measurement first."""
    folders = [path for path in RESULTS.glob("*") if any(path.glob("*.json"))]
    return sorted(folders, key=lambda path: max(content["machine"]["date"] for content in load(path).values()), reverse=True)
