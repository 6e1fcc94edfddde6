"""What a test of a claim says: it holds, with evidence; it does not; or there is nothing to test."""

from __future__ import annotations

from dataclasses import dataclass


class Refuted(Exception):
    """A claim does not hold."""

    def __init__(self, why: str, measured: float | None = None, limit: float | None = None):
        super().__init__(why)
        self.why, self.measured, self.limit = why, measured, limit


class NotClaimed(Exception):
    """There is nothing to test."""


@dataclass(frozen=True)
class Evidence:
    """A claim held, and this is what was seen."""

    why: str
    measured: float | None = None
    limit: float | None = None
    loose: bool = False
