"""fastv (one rank-and-drop step) and fastv_e2e (a whole decoder: prefill and cached decode)."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import FastV
from tokensieve.methods.fastv import rank_and_drop

from .base import Adapter, Case


def _method(case: Case) -> FastV:
    p = case.params
    rule = "floor" if str(p.get("budget", "")).startswith("int") else "round"
    if "r" not in p:
        return FastV(layer=p["K"], count=p["n_keep"])
    return FastV(layer=p["K"], ratio=p["r"], budget=rule)


def _rank(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    keep = _method(case).keep_count(0, p["n_image"])
    assert keep == p["n_keep"]
    span = (p["image_start"], p["image_start"] + p["n_image"])
    positions = torch.arange(x["k"].shape[-2])[None]
    out = rank_and_drop(x["q_last"][None, :, None], x["k"][None], [positions], keep, span)
    image = (out.index[0] >= span[0]) & (out.index[0] < span[1])
    return {"scores": out.scores[0], "kept_positions": out.index[0][image], "keep_all": out.tensors[0][0]}


def _whole(case: Case) -> dict[str, Any]:
    from tokensieve.models import sieve

    from .llama import build, prefill_and_decode

    p = case.params
    model, ranked = build(case), _rank(case)
    with sieve(model, _method(case), spans=[(p["image_start"], p["n_image"])]) as run:
        prefill, decode, lengths, positions = prefill_and_decode(model, case, run)
        assert torch.equal(run.kept[0][0][0] + p["image_start"], ranked["kept_positions"])
    assert all(len(set(step)) == 1 for step in positions)
    return {
        **ranked,
        "prefill_out": prefill,
        "decode_out": decode,
        "kv_len_after_prefill": torch.tensor(lengths),
        "decode_positions": torch.tensor([step[0] for step in positions]),
    }


FASTV = Adapter("fastv", ("q_last", "k"), _rank)
# half precision: a whole network rounds between layers, so the authors' float32 selections are not its answer
FASTV_E2E = Adapter(
    "fastv_e2e", ("q_last", "k", "inputs_embeds", "decode_embeds", "w."), _whole, half=False, needs="transformers", rtol=1e-4, atol=1e-5
)
