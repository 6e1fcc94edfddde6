"""One row of a conformance table: a mechanism, how to build it small, and inputs to try it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

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
        growth: grids over which growth with N is counted; by default ``grid`` doubled until it has thousands of tokens.
        symbols: for growth in other symbols: name -> settings to override, smallest first, each with its value, e.g.
            ``{"agents": ((4, {"num_agents": 4}), (16, {"num_agents": 16}))}``.
        grid_setting: for mechanisms that are not resolution-free, the setting that holds the grid, so that the kit can
            build larger ones; it gets an int on sequences and a tuple otherwise.
        extras: further keyword arguments of every call, made from ``x``: a carry that the mechanism cannot do without,
            for example. It should look only at the shape, dtype and device of ``x``.
        streams: (*grid, C) of every stream of a fusion.
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
    grid_setting: str | None = None
    extras: Callable[[Tensor], Mapping[str, Any]] | None = None
    streams: tuple[tuple[int, ...], ...] | None = None

    @property
    def id(self) -> str:
        return f"{self.name}-{self.label}" if self.label else self.name
