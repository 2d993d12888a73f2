"""Every golden vector of a folder, made by the authors' own code, through the public API. TOKENSIEVE_GOLDEN names the folder."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_adapters import ADAPTERS, NOT_BUILT_YET, Case
from golden_adapters.base import Adapter

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("TOKENSIEVE_GOLDEN", ROOT.parent / "shared" / "golden"))
STEMS = sorted(path.stem for path in FOLDER.glob("*.json") if path.with_suffix(".npz").exists())


def set_of(stem: str) -> str:
    return re.sub(r"_(dev|holdout)_\d+$", "", stem)


BUILT = [stem for stem in STEMS if set_of(stem) not in NOT_BUILT_YET]
LATER = [stem for stem in STEMS if set_of(stem) in NOT_BUILT_YET]
HALVES = (torch.bfloat16, torch.float16)


def load(stem: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    facts = json.loads((FOLDER / f"{stem}.json").read_text())
    with np.load(FOLDER / f"{stem}.npz") as arrays:
        return facts, {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def exact_in(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> bool:
    return all(torch.equal(x.to(dtype).to(x.dtype), x) for x in inputs.values() if x.is_floating_point())


def compare(stem: str, name: str, got: Any, want: torch.Tensor, adapter: Adapter) -> None:
    got = torch.as_tensor(got)
    where = f"{stem}.{name}"
    if want.is_floating_point() and got.numel() == want.numel():
        got = got.reshape(want.shape)  # a vector may say (T, C) where the API says (1, T, C)
    assert got.shape == want.shape, f"{where}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    if want.is_floating_point():
        largest = want[want.isfinite()].abs().max().item() if adapter.normwise and want.isfinite().any() else 1.0
        options = {"rtol": adapter.rtol, "atol": adapter.atol * max(1.0, largest), "equal_nan": True}
        torch.testing.assert_close(got.to(want.dtype), want, **options, msg=lambda m: f"{where}: {m}")
    else:
        wrong = (got.long() != want.long()).nonzero()
        assert not len(wrong), f"{where}: {len(wrong)} of {want.numel()} differ, first at {wrong[0].tolist()}"


@pytest.mark.skipif(not STEMS, reason=f"no golden vectors in {FOLDER}: set TOKENSIEVE_GOLDEN to a folder of them")
@pytest.mark.parametrize("stem", BUILT)
def test_golden(stem: str) -> None:
    assert set_of(stem) in ADAPTERS, f"{stem}: no adapter for the set {set_of(stem)!r}, and it is not listed as not built yet"
    if ADAPTERS[set_of(stem)].needs:
        pytest.importorskip(ADAPTERS[set_of(stem)].needs)
    adapter, (facts, arrays) = ADAPTERS[set_of(stem)], load(stem)
    inputs = {name: value for name, value in arrays.items() if adapter.takes(name)}
    halves = [dtype for dtype in HALVES if adapter.half and exact_in(inputs, dtype)]
    for dtype in (torch.float32, *halves):
        cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        outputs = adapter.run(Case(adapter.params(facts["params"]), cast, dtype))
        compared, silent = [], []
        for name, want in arrays.items():
            if name in outputs:
                compare(f"{stem}[{dtype}]", name, outputs[name], want, adapter)
                compared.append(name)
            elif name not in inputs:
                silent.append(f"{name} ({adapter.skipped.get(name, 'neither taken nor returned by the adapter')})")
        assert compared, f"{stem}: no output was compared"
        print(f"{stem} {dtype}: compared {', '.join(compared)}" + (f"; not compared: {'; '.join(silent)}" if silent else ""))


def test_golden_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """Says how many vectors ran; the sets of later methods are counted, not skipped in silence."""
    if not STEMS:
        pytest.skip(f"no golden vectors in {FOLDER}: set TOKENSIEVE_GOLDEN to a folder of them")
    sets = sorted({set_of(stem) for stem in LATER})
    with capsys.disabled():
        print(f"\ngolden vectors in {FOLDER.name}: {len(BUILT)} run, {len(LATER)} of {len(sets)} later sets have no adapter yet")
    assert not set(ADAPTERS) & NOT_BUILT_YET
    assert BUILT, f"no vector in {FOLDER} has an adapter"
