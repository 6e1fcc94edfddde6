"""Sequences that a model reads: what is remembered of one travels with its cache.

A cache is the one thing that stays the same through all calls of a sequence, whoever makes them and in whatever order.
A session puts a :class:`Sequence` on the cache of each prompt, and finds it there again: calls of two sequences may be
mixed, and a copy of a cache goes on with what was known when it was copied.
"""

from __future__ import annotations

import copy
from typing import Any

from .notes import Notes
from .recompute import Shared
from .tokens import TypeTracker

#: Under this name a cache carries its sequence.
NAME = "attnlib_sequence"


class Sequence(Shared):
    """One sequence of one branch of a session.

    Args:
        session: whose it is.
        branch: of the session.
        notes: what is remembered of it.
        tracker: its token types.
    """

    def __init__(self, session: Any, branch: str | None, notes: Notes, tracker: TypeTracker | None):
        self.session, self.branch, self.notes, self.tracker = session, branch, notes, tracker
        self.prompt = object()  # the same in all that went on from one prompt

    def __copy__(self) -> Sequence:
        new = Sequence(self.session, self.branch, copy.copy(self.notes), copy.copy(self.tracker))
        new.notes.kept = dict(self.notes.kept)
        new.notes._own = dict(self.notes._own)
        new.prompt = self.prompt
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequence:
        return self.__copy__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(None), ()  # a cache that was saved belongs to no session


def sequence_of(cache: Any) -> Sequence | None:
    """The sequence that a cache carries."""
    return getattr(cache, "__dict__", {}).get(NAME)


def put(cache: Any, sequence: Sequence) -> None:
    """Let a cache carry a sequence, where it can carry anything."""
    if hasattr(cache, "__dict__"):
        cache.__dict__[NAME] = sequence
