"""lscene: the dense token selector."""

from __future__ import annotations

from typing import Any

from tokensieve.methods.lscene import open_scenes

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    scene = (p["scene_start"], p["scene_start"] + p["n_scene"])
    return {"select_mask": open_scenes(x["q0"][None], x["k0"][None], scene, threshold=p["threshold"])[0]}


LATER = "attention with a key set per row is not built yet"
INPUTS = ("q0", "k0", "q1", "k1", "v1", "k_dense_norope", "v_dense")
LSCENE = Adapter("lscene", INPUTS, _run, {"threshold": 96}, skipped={"attn_out": LATER})
