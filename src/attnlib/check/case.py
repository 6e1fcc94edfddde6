"""One row of a conformance table: a mechanism, how to build it small, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..grids import Layout


@dataclass(frozen=True)
class Case:
    """How to build and feed a mechanism in the conformance kit.

    Args:
        name: registry name, or ``"module:Class"``.
        config: small settings; ``dim`` at least.
        grid: grid of ``x``, e.g. ``(12,)`` or ``(8, 8)``.
        label: tells rows of one mechanism apart.
        context_grid: grid of ``context`` in cross patterns; by default another size than ``grid``.
        layout: flat layout to try besides the plain grid, when the mechanism takes one.
        odd_grid: another, awkward grid that must work (``None``: derived from the traits).
        growth: grids over which growth with N is counted; by default ``grid`` doubled twice on every axis.
        symbols: for growth in other symbols: name -> settings to override, smallest first, each with its value, e.g.
            ``{"agents": ((4, {"num_agents": 4}), (16, {"num_agents": 16}))}``.
    """

    name: str
    config: Mapping[str, Any]
    grid: tuple[int, ...]
    label: str = ""
    context_grid: tuple[int, ...] | None = None
    layout: Layout | None = None
    odd_grid: tuple[int, ...] | None = None
    growth: tuple[tuple[int, ...], ...] | None = None
    symbols: Mapping[str, tuple[tuple[float, Mapping[str, Any]], ...]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name
