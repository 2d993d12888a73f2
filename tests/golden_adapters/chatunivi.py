"""chatunivi: one level of its clustering, with the noise given."""

from __future__ import annotations

from typing import Any

import tokensieve as ts
from tokensieve.methods import ChatUniVi
from tokensieve.methods.chatunivi import cluster_count
from tokensieve.methods.dpcknn import merge_clusters

from .base import Adapter, Case


def _run(case: Case) -> dict[str, Any]:
    p, x = case.params, case.inputs
    method = ChatUniVi(levels=(p["ratio"],), neighbors=(p["k"],))
    clusters = cluster_count(p["ratio"], x["x"].shape[1])
    peaks = ts.cluster_tokens(x["x"], clusters, k=method.neighbors_of(0, clusters), noise=x["noise"])
    return {
        "density": peaks.density,
        "score": peaks.density * peaks.distance,
        "centers": peaks.index,
        "labels": peaks.labels,
        "merged": merge_clusters(x["x"], peaks.labels, clusters)[0],
    }


CHATUNIVI = Adapter("chatunivi", ("x", "noise"), _run, {"k": 5}, half=False)
