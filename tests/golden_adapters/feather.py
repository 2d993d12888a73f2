"""feather: one or two stages of scores before RoPE with a strided grid, and the authors' FastV baselines."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import FEATHER
from tokensieve.methods.feather import image_scores, keep_with_grid, strided_grid
from tokensieve.ops import select_topk

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p = case.params
    method = FEATHER(layers=tuple(p["prune_layers"]), ratio=p["fastv_ratio_removed"], stride=p["stride"] or 0, rope=p["mode"] == "rope")
    start, (rows, columns) = p["image_start"], p["grid"]
    text = torch.arange(start + rows * columns, p["seq_len"])
    alive = torch.arange(rows * columns)
    out: dict[str, Any] = {}
    lengths = [p["seq_len"]] * p["layers"]
    for stage, layer in enumerate(method.layers):
        query, key = case.inputs[f"s{stage}_q_last"][None, :, None], case.inputs[f"s{stage}_k_img"][None]
        scores = image_scores(query, key)
        k = method.by_score(stage, len(alive))
        chosen = keep_with_grid(scores, k, strided_grid((rows, columns), method.stride) if stage == 0 else None)
        out[f"s{stage}_scores"] = scores[0]
        out[f"s{stage}_top_rel"] = select_topk(scores, k)[0]
        alive = alive[chosen.index[0, : int(chosen.counts[0])]]
        out[f"s{stage}_kept_grid"] = alive
        out[f"s{stage}_positions"] = torch.cat([torch.arange(start), alive + start, text])
        lengths[layer:] = [len(out[f"s{stage}_positions"])] * (p["layers"] - layer)
    return {**out, "kv_len_after_prefill": torch.tensor(lengths)}


STAGES = tuple(f"s{stage}_{name}" for stage in range(32) for name in ("q_last", "k_img"))
FEATHER_SET = Adapter("feather", STAGES, _run, {"mode": "feather", "stride": None})
