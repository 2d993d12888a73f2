"""Methods inside models: `sieve(model, method)`, or `attach` and `detach`. What needs transformers is imported on first use."""

from typing import TYPE_CHECKING, Any

from .around import merge_around
from .block_run import BlockRun
from .context import attach, detach, sieve
from .report import Report

if TYPE_CHECKING:
    from .run import SieveRun as SieveRun

__all__ = ["BlockRun", "Report", "SieveRun", "attach", "detach", "merge_around", "sieve"]


def __getattr__(name: str) -> Any:
    """Timm models do without transformers."""
    if name == "SieveRun":
        from .run import SieveRun

        return SieveRun
    raise AttributeError(f"module 'tokensieve.models' has no attribute {name!r}")
