"""tokensieve: fused kernels for visual-token reduction, and the published methods on top of them.

Ops are in `tokensieve.ops` and re-exported here; methods are in `tokensieve.methods`; `sieve(model, method)` attaches a method to a model.
"""

from typing import TYPE_CHECKING, Any

from . import methods, ops, schedules
from ._version import __version__
from .ops import (
    Clusters,
    Merged,
    MergePlan,
    Nearest,
    Packed,
    PruneResult,
    Selection,
    allocate_budget,
    assignment_matrix,
    attention_lse,
    attention_pagerank,
    attention_scores,
    bipartite_match,
    cluster_tokens,
    complement_index,
    cosine_match,
    cosine_scores,
    debug_checks,
    fuse_dropped,
    gather_tokens,
    gather_tokens_out,
    knn_density,
    merge_by_label,
    merge_into_nearest,
    merge_tokens,
    nearest_center,
    pack_tokens,
    pool_grid,
    pool_runs,
    pool_scores,
    pool_windows,
    prune_tokens,
    row_column_means,
    run_labels,
    scatter_tokens,
    score_quantiles,
    select_diverse,
    select_mass,
    select_samples,
    select_threshold,
    select_topk,
    space_to_depth,
    trace_tokens,
    tukey_fence,
    unmerge_tokens,
    unpack_tokens,
)

if TYPE_CHECKING:
    from .models import attach as attach
    from .models import detach as detach
    from .models import sieve as sieve

# attach, detach and sieve are not in it: they come on first use
__all__ = [
    "Clusters",
    "MergePlan",
    "Merged",
    "Nearest",
    "Packed",
    "PruneResult",
    "Selection",
    "__version__",
    "allocate_budget",
    "assignment_matrix",
    "attention_lse",
    "attention_pagerank",
    "attention_scores",
    "bipartite_match",
    "cluster_tokens",
    "complement_index",
    "cosine_match",
    "cosine_scores",
    "debug_checks",
    "fuse_dropped",
    "gather_tokens",
    "gather_tokens_out",
    "knn_density",
    "merge_by_label",
    "merge_into_nearest",
    "merge_tokens",
    "methods",
    "nearest_center",
    "ops",
    "pack_tokens",
    "pool_grid",
    "pool_runs",
    "pool_scores",
    "pool_windows",
    "prune_tokens",
    "row_column_means",
    "run_labels",
    "scatter_tokens",
    "schedules",
    "score_quantiles",
    "select_diverse",
    "select_mass",
    "select_samples",
    "select_threshold",
    "select_topk",
    "space_to_depth",
    "trace_tokens",
    "tukey_fence",
    "unmerge_tokens",
    "unpack_tokens",
]


def __getattr__(name: str) -> Any:
    """The model side comes on first use; what needs transformers, at the first model that does (2 s of import time)."""
    if name in ("attach", "detach", "sieve"):
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module 'tokensieve' has no attribute {name!r}")
