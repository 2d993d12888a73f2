"""One adapter per golden set: how its inputs reach the public API, and what comes back."""

from .base import Adapter, Case, Dtypes
from .fastervlm import FASTERVLM
from .fastv import FASTV, FASTV_E2E
from .pyramiddrop import PYRAMIDDROP, PYRAMIDDROP_E2E

ADAPTERS: dict[str, Adapter] = {a.name: a for a in (PYRAMIDDROP, PYRAMIDDROP_E2E, FASTV, FASTV_E2E, FASTERVLM)}

# Sets of methods that later issues build (METHODS.md). Any other name without an adapter is an error.
# fmt: off
NOT_BUILT_YET: frozenset[str] = frozenset(
    [
        "ademvl", "aim_merge", "aim_prune", "ats", "avit", "bvllm", "cambrian_sva", "chatunivi", "damro", "dart", "diffrate",
        "divprune", "dpcknn", "dycoke", "dynamicvit", "dyvte", "evit", "evs", "fastvid", "feather", "fopru", "framefusion",
        "globalcom2", "hired", "leopard", "llava_ov_pool", "llavamini", "llavolta", "lrs", "lrs_text", "lscene", "mirage",
        "paint", "pitome", "ppllava", "prumerge", "prumerge_plus", "prunevid", "quecc", "quota", "slime", "slime_router",
        "sparsevlm15", "sparsevlmplus", "sparsifiner", "sttm", "stvit", "swinbert", "tofu", "tokenpacker", "tome", "tomesd",
        "topvim", "tsllava", "turbo", "var_sink", "vidcom2", "videollama3_difffp", "visionzip", "vispruner", "vtc_cls", "yopo",
        "zipcache_quant",
    ]
)
# fmt: on

__all__ = ["ADAPTERS", "NOT_BUILT_YET", "Adapter", "Case", "Dtypes"]
