"""pyramiddrop (one rank-and-drop step) and pyramiddrop_e2e (a whole decoder: prefill and cached decode)."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import PyramidDrop
from tokensieve.methods.pyramiddrop import rank_and_drop

from .base import Adapter, Case, pad_rows


def _step(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    ratios, stage = p["ratio_list"], p["stage"]
    before = PyramidDrop(layers=tuple(range(1, len(ratios) + 1)), keep=ratios)
    start = case.list("image_pos")
    planned = [[before.keep_count(at, n) for n in p["n_image_full"]] for at in (stage, stage + 1)]
    current, keep = ([n if s >= 0 else 0 for n, s in zip(counts, start)] for counts in planned)
    rows = x["q_positions"].long()
    unranked = (rows < 0).all(1).tolist()  # training sample without an answer: passes unchanged
    keep = [n if passes else k for n, k, passes in zip(current, keep, unranked)]
    lengths = x["valid_mask"].sum(1).tolist()
    labels = x["labels"].long() if "labels" in x else None
    out = rank_and_drop(
        x["q_rows"],
        x["k"],
        x["features"],
        image_start=start,
        image_count=current,
        keep=keep,
        lengths=lengths,
        query_positions=rows,
        labels=labels,
    )
    ranked = [0 if passes else n for n, passes in zip(current, unranked)]  # NaN pads the vectors' scores
    image = [row[(row >= s) & (row < s + n)] if s >= 0 else row[:0] for row, s, n in zip(out.index, start, current)]
    result = {
        "n_image_cur": torch.tensor(planned[0]),
        "n_keep": torch.tensor(planned[1]),
        "scores": torch.stack([row.where(torch.arange(len(row)) < n, torch.nan) for row, n in zip(out.scores, ranked)]),
        "kept_positions": pad_rows(image, max(len(row) for row in image)),
        "out_features": out.features,
        "out_position_ids": out.position_ids,
        "out_len": torch.tensor(out.lengths),
    }
    if out.labels is not None:
        result["out_labels"] = out.labels
    return result


def _whole(case: Case) -> dict[str, Any]:
    from tokensieve.models import sieve

    from .llama import build, prefill_and_decode

    p = case.params
    method = PyramidDrop(layers=p["layer_list"], keep=p["ratio_list"][1:])
    model = build(case)
    with sieve(model, method, spans=[(p["pre_text"], p["n_image"])]) as run:
        prefill, decode, lengths, positions = prefill_and_decode(model, case, run)
        kept = [stage[0][0] for stage in run.kept]
    result: dict[str, Any] = {
        "prefill_out": prefill,
        "decode_out": decode,
        "kv_len_after_prefill": torch.tensor(lengths),
        "decode_position_per_layer": torch.tensor(positions),
    }
    previous = torch.arange(p["n_image"])
    for stage, patches in enumerate(kept):
        result[f"stage{stage}_kept_rel"] = torch.searchsorted(previous, patches)
        previous = patches
    return result


PYRAMIDDROP = Adapter("pyramiddrop", ("features", "valid_mask", "position_ids", "q_rows", "q_positions", "k", "image_pos", "labels"), _step)
# half precision: a whole network rounds between layers, so the authors' float32 selections are not its answer
PYRAMIDDROP_E2E = Adapter(
    "pyramiddrop_e2e", ("inputs_embeds", "decode_embeds", "w."), _whole, half=False, needs="transformers", rtol=1e-4, atol=1e-5
)
