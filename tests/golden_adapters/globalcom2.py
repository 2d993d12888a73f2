"""globalcom2: logits, crop shares, combined scores, kept patches, sequence."""

from __future__ import annotations

from typing import Any

import torch
from tokensieve.methods import GlobalCom2
from tokensieve.methods.globalcom2 import cls_logits, crop_budgets, crop_scores, pack, select
from tokensieve.ops import gather_tokens, select_topk

from .base import Adapter, Case, pad_rows


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = GlobalCom2(ratio=p["retention_ratio"], temperature=p["temperature"])
    size, grid, side = tuple(p["image_size_wh"]), (p["crops_wide"], p["crops_high"]), (p["side"], p["N"] // p["side"])
    scores = cls_logits(x["q_cls"][:, :, None], x["k"])
    combined, shown = crop_scores(scores, size, grid, side)
    kept = select(scores, method, size, grid, side)
    counts = kept.counts.tolist()
    by_score = select_topk(combined, kept.counts, max_k=max(counts), candidates=shown, order="score")
    place = shown.cumsum(1) - 1  # a patch's number among those that are not padding
    rows = [row[mask] for row, mask in zip(combined, shown)]
    wide = torch.full((len(rows), max(map(len, rows))), torch.nan)
    for line, row in zip(wide, rows):
        line[: len(row)] = row
    tokens = torch.cat([x["features"].flatten(0, 1), x["newline"][None]])[None]
    index, count = pack(kept, method, grid, side)
    sequence = gather_tokens(tokens, index)[0, : int(count)]
    T = kept.thumbnail.shape[1]
    result = {
        "score": scores,
        "crop_scales": crop_budgets(scores, shown.sum(1), method, grid, side)[1],
        "crop_k": kept.counts,
        "crop_valid": shown.sum(1),
        "thumb_idx": kept.thumbnail[0],
        "comb_score": wide,
        "crop_idx": pad_rows([place[c][by_score[c, :n]] for c, n in enumerate(counts)], max(counts)),
        "out_thumb": sequence[:T],
    }
    if bool(shown.all()):
        result["out_crops"] = sequence[T:]
    return result


SHIFTED = "the official code puts the tokens of a padded mosaic back at places that are shifted by the padding"
GLOBALCOM2 = Adapter(
    "globalcom2",
    ("q_cls", "k", "features", "newline"),
    _run,
    {"retention_ratio": 0.25, "temperature": 10},
    skipped={"out_crops": SHIFTED},
)
