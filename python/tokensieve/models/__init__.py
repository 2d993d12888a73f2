"""Methods inside transformers models: `sieve(model, method)`, or `attach` and `detach`."""

from .context import attach, detach, sieve
from .report import Report
from .run import SieveRun

__all__ = ["Report", "SieveRun", "attach", "detach", "sieve"]
