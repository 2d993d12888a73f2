"""One adapter per golden set: how its inputs reach the public API, and what comes back. Every module here is looked through."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Adapter, Case, Dtypes

ADAPTERS: dict[str, Adapter] = {
    value.name: value
    for module in iter_modules(__path__)
    for value in vars(import_module(f"{__name__}.{module.name}")).values()
    if isinstance(value, Adapter)
}

# The sets of METHODS.md. One without an adapter belongs to a method that a later issue builds; any other name is an error.
# fmt: off
SETS: frozenset[str] = frozenset(
    [
        "ademvl", "aim_merge", "aim_prune", "ats", "avit", "bvllm", "cambrian_sva", "chatunivi", "damro", "dart", "diffrate",
        "divprune", "dpcknn", "dycoke", "dynamicvit", "dyvte", "evit", "evs", "fastervlm", "fastv", "fastv_e2e", "fastvid", "feather",
        "fopru", "framefusion", "globalcom2", "hired", "leopard", "llava_ov_pool", "llavamini", "llavolta", "lrs", "lrs_text",
        "lscene", "mirage", "paint", "pitome", "ppllava", "prumerge", "prumerge_plus", "prunevid", "pyramiddrop", "pyramiddrop_e2e",
        "quecc", "quota", "slime", "slime_router", "sparsevlm15", "sparsevlmplus", "sparsifiner", "sttm", "stvit", "swinbert", "tofu",
        "tokenpacker", "tome", "tomesd", "topvim", "tsllava", "turbo", "var_sink", "vidcom2", "videollama3_difffp", "visionzip",
        "vispruner", "vtc_cls", "yopo", "zipcache_quant",
    ]
)
# fmt: on
NOT_BUILT_YET = SETS - set(ADAPTERS)

__all__ = ["ADAPTERS", "NOT_BUILT_YET", "SETS", "Adapter", "Case", "Dtypes"]
