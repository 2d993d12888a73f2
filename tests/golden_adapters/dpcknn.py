"""dpcknn: densities, centres, clusters and weighted means of TCFormer's clustering, with the noise given and with padding."""

from __future__ import annotations

from typing import Any

import tokensieve as ts
from tokensieve.methods.dpcknn import merge_clusters

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    masks = [x[name].view(x["noise"].shape) > 0 for name in x if "mask" in name]
    peaks = ts.cluster_tokens(x["x"], p["cluster_num"], k=p["k"], noise=x["noise"], mask=masks[0] if masks else None)
    labels = peaks.labels.masked_fill(~masks[0], 0) if masks else peaks.labels  # there, padding is equally far from all centres
    merged, share = merge_clusters(x["x"], labels, p["cluster_num"], x.get("token_score"))
    return {
        "density": peaks.density,
        "delta": peaks.distance,
        "centers": peaks.index,
        "idx_cluster": labels,
        "x_merged": merged,
        "agg_weight": share,
    }


DPCKNN_SET = Adapter("dpcknn", ("x", "noise", "token_score", "*mask*"), _run, half=False)
