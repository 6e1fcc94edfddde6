"""Finished pieces of a measurement, one a line of a file, so that a measurement that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...clock import now
from ...small import Progress
from ...store import identity, plain


class Kept:
    """Pieces by name, each computed once.

    Args:
        file: takes every piece as soon as it is there; ``None`` keeps them in memory.
        key: what all pieces depend on; pieces of another key are not taken.
        progress: told of every piece.

    >>> kept = Kept(None, {"seed": 0})
    >>> kept("a piece", lambda: {"value": 1}), kept("a piece", lambda: {"value": 2})
    ({'value': 1}, {'value': 1})
    """

    def __init__(self, file: str | Path | None, key: Any, progress: Progress | None = None):
        self.file, self.mark, self.progress = None if file is None else Path(file), identity(key), progress
        self.found: dict[str, Any] = {}
        self.seconds = 0.0  # that all pieces took, whenever they were computed
        if self.file is not None and self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                held = json.loads(line)
                if held.get("key") == self.mark and "piece" in held:
                    self.found[held["piece"]] = held["value"]
                    self.seconds += held.get("seconds", 0.0)

    def __call__(self, piece: str, compute: Callable[[], Any]) -> Any:
        """The piece of that name: a plain value, as JSON gives it back."""
        if piece not in self.found:
            started = now()
            value = self.found[piece] = json.loads(json.dumps(plain(compute())))
            took = round(now() - started, 3)
            self.seconds += took
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"piece": piece, "key": self.mark, "value": value, "seconds": took}) + "\n")
            if self.progress is not None:
                self.progress(piece)
        return self.found[piece]
