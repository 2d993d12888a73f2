"""Methods inside transformers models: `sieve(model, method)`, or `attach` and `detach`."""

from .report import Report
from .run import SieveRun
from .context import attach, detach, sieve

__all__ = ["Report", "SieveRun", "attach", "detach", "sieve"]
