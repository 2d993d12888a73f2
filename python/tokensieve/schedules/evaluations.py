"""What a search asks the user's callback, remembered: in memory, and in a file from which an interrupted search goes on."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Rates = tuple[float, ...]
Score = Callable[[Rates], float]


class SearchResult(NamedTuple):
    """The schedule found, its score, and how many schedules the callback scored (those of a resumed file included)."""

    rates: Rates
    score: float
    evaluations: int


class Evaluations:
    """Scores each schedule once. With a path, every score is on disk before the next one is asked for.

    A search asks in an order that depends only on its settings and on the scores, so replaying the file brings an interrupted search back
    to where it stopped. The file is replaced as a whole, so Ctrl-C leaves either the old one or the new one.
    """

    def __init__(self, name: str, score: Score, settings: dict[str, Any], path: str | os.PathLike[str] | None, progress: bool) -> None:
        self.name, self.score, self.progress = name, score, progress
        self.settings = json.loads(json.dumps(settings))
        self.path = None if path is None else Path(path)
        self.scores: dict[Rates, float] = {}
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def _load(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text())
            settings, scores = stored["settings"], {tuple(entry["rates"]): float(entry["score"]) for entry in stored["evaluations"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"tokensieve.schedules.{self.name}: resume must be a file that this search wrote, got {path}") from error
        if settings != self.settings:
            wrong = sorted(key for key in {*settings, *self.settings} if settings.get(key) != self.settings.get(key))
            raise ValueError(
                f"tokensieve.schedules.{self.name}: resume must hold the same search, got another {', '.join(wrong)} in {path}; "
                "name another file to start anew"
            )
        self.scores = scores

    def __call__(self, rates: Rates) -> float:
        """The score of a schedule, from memory where it is known."""
        if rates not in self.scores:
            value = float(self.score(rates))
            if math.isnan(value):
                raise ValueError(f"tokensieve.schedules.{self.name}: score must return a number, got nan for {rates}")
            self.scores[rates] = value
            self._save()
        return self.scores[rates]

    def _save(self) -> None:
        if self.path is None:
            return
        entries = [{"rates": list(rates), "score": value} for rates, value in self.scores.items()]
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text(json.dumps({"settings": self.settings, "evaluations": entries}, indent=1) + "\n")
        os.replace(temporary, self.path)

    def tell(self, done: int, total: int, text: str) -> None:
        """One line of progress on standard error, rewritten in place on a terminal."""
        if not self.progress:
            return
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"{self.name}: {done}/{total} {text}, {len(self.scores)} schedules scored".ljust(78), end=end, file=sys.stderr, flush=True)
