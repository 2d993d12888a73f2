"""tokensieve: fused kernels for visual-token reduction, and the published methods on top of them.

Ops are in `tokensieve.ops` and re-exported here; methods are in `tokensieve.methods`; `sieve(model, method)` attaches a method to a model.
"""

from . import ops
from ._version import __version__
from .ops import (
    PruneResult,
    attention_scores,
    debug_checks,
    gather_tokens,
    gather_tokens_out,
    prune_tokens,
    select_topk,
)

__all__ = [
    "PruneResult",
    "__version__",
    "attention_scores",
    "debug_checks",
    "gather_tokens",
    "gather_tokens_out",
    "ops",
    "prune_tokens",
    "select_topk",
]
