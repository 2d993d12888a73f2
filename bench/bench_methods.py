"""The prune step of every registered method against its eager form, at the method's own default budget. The steps are in bench/steps."""

from __future__ import annotations

from collections.abc import Iterator

from tokensieve.methods import METHODS

from .harness import Case, Settings
from .steps import steps


def build(settings: Settings) -> Iterator[Case]:
    found = steps()
    for name in METHODS:
        if name in found:
            yield found[name](settings)


def missing() -> list[str]:
    """Registered methods that have no row here yet."""
    return [name for name in METHODS if name not in steps()]
