"""sparsevlm15, sparsevlmplus: raters from the embeddings, then scores, kept and recycled tokens of every stage."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from tokensieve import ops
from tokensieve.methods import SparseVLM
from tokensieve.methods.raters import corrected_scores, distance_decay, rater_scores, rater_weights
from tokensieve.methods.sparsevlm import merge_dropped

from .base import Adapter, Case


def _run(case: Case, plus: bool) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = SparseVLM(layers=tuple(p["prune_layers"]), budget=tuple(p["budget"]), plus=plus, renumber=not plus)
    start, end = p["pre_text"], p["pre_text"] + p["n_visual"]
    share, weight = rater_weights(x["embeds"][:, start:end], x["embeds"][:, end:])
    raters = weight[0].nonzero()[:, 0]
    out: dict[str, Any] = {"rater_prob": share[0], "raters": raters}
    text = x["embeds"].shape[1] - p["n_visual"]
    present, positions = p["n_visual"], torch.arange(text + p["n_visual"])
    lengths = [len(positions)] * (max(method.layers) + 2)
    for stage, layer in enumerate(method.layers):
        known = len(positions) == present + text  # positions that are kept are not known behind a stage that a file leaves out
        if known and f"s{stage}_q_raters" in x:
            out |= _stage(case, method, stage, present, raters, positions)
            positions = out[f"s{stage}_next_positions"]
        present = method.keep_count(stage, p["n_visual"])
        positions = torch.arange(text + present) if method.renumber else positions
        lengths[layer + 1 :] = [text + present] * (len(lengths) - layer - 1)
    return {**out, "kv_len_after_prefill": torch.tensor(lengths)}


def _stage(case: Case, method: SparseVLM, stage: int, present: int, raters: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    p, x, at = case.params, case.inputs, f"s{stage}_"
    start, end = p["pre_text"], p["pre_text"] + present
    query, key = x[f"{at}q_raters"][None], x[f"{at}k"][None]
    rows, ones = (raters + end)[None], torch.ones(1, len(raters))
    out: dict[str, Any] = {}
    if method.plus:
        decay = distance_decay(ids[rows], ids[None, start:end], key.shape[-1])
        scores, mass, heads = corrected_scores(query, key, (start, end), ones, rows, decay, method.heads)
        out |= {f"{at}head_sum": mass[0], f"{at}heads": heads[0]}
    else:
        scores = rater_scores(query, key, (start, end), ones, rows)
    kept = ops.select_topk(scores, method.by_score(stage, present))
    out |= {f"{at}scores": scores[0], f"{at}kept_rel": kept[0]}
    taken, clusters = method.recycled(present - kept.shape[1])
    if taken:
        dropped = ops.complement_index(kept, present)
        out[f"{at}recycle_rel"] = dropped[0][ops.select_topk(scores.gather(1, dropped), taken, order="score")[0]]
        noise = x[f"{at}noise"][None] if f"{at}noise" in x else None
        out[f"{at}merged"] = merge_dropped(x[f"{at}recycle_x"][None], clusters, noise=noise)[0]
    stays = torch.cat([torch.arange(start), kept[0] + start, torch.arange(end, len(ids))])
    out[f"{at}next_positions"] = torch.arange(len(stays) + clusters) if method.renumber else ids[stays]
    return out


STAGES = tuple(f"s{stage}_{name}" for stage in range(32) for name in ("q_raters", "k", "recycle_x", "noise"))
SPARSEVLM15 = Adapter("sparsevlm15", ("embeds", *STAGES), partial(_run, plus=False))
# The decay that divides passes through 0, where the official float32 cosines are 1e-4 off.
SPARSEVLMPLUS = Adapter("sparsevlmplus", ("embeds", *STAGES), partial(_run, plus=True), rtol=5e-4, atol=1e-5)
