"""The ops: typed functions over `torch.ops.tokensieve.*`, their fakes and gradients."""

from .. import _load  # noqa: F401  (registers the C++ ops that the modules below look up)
from ._debug import debug_checks
from .budget import allocate_budget
from .complement import complement_index
from .density import Clusters, cluster_tokens, knn_density, nearest_center
from .diverse import select_diverse
from .gather import gather_tokens, gather_tokens_out
from .grids import pool_grid, pool_windows, space_to_depth
from .lse import attention_lse
from .match import MergePlan, bipartite_match
from .means import pool_runs, row_column_means
from .merge import Merged, assignment_matrix, merge_tokens, trace_tokens, unmerge_tokens
from .nearest import Nearest, merge_into_nearest
from .pack import Packed, pack_tokens, unpack_tokens
from .pagerank import attention_pagerank
from .pool import pool_scores
from .prune import PruneResult, prune_tokens
from .quantiles import score_quantiles, tukey_fence
from .ragged import Selection, select_mass, select_threshold
from .samples import select_samples
from .scatter import scatter_tokens
from .score import attention_scores
from .segments import fuse_dropped, merge_by_label, run_labels
from .select import select_topk
from .similarity import cosine_match, cosine_scores

__all__ = [
    "Clusters",
    "MergePlan",
    "Merged",
    "Nearest",
    "Packed",
    "PruneResult",
    "Selection",
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
    "nearest_center",
    "pack_tokens",
    "pool_grid",
    "pool_runs",
    "pool_scores",
    "pool_windows",
    "prune_tokens",
    "row_column_means",
    "run_labels",
    "scatter_tokens",
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
