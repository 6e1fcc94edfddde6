"""How many tiles of keys a tiled kernel visits under (generalized) neighborhood attention: integers, no tensors.

A kernel cuts queries and keys into tiles and, for each tile of queries, visits the tiles of keys that the windows of
its queries touch. The quotient of all tiles and visited tiles bounds the speedup over dense attention at the same
speed per tile; ``prod(grid) / prod(kernel)`` is the bound by arithmetic alone.

Reference: Hassani et al., 2025, arXiv 2504.16922, section 4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ..checks import check_ints
from ..types import check_choice, to_tuple
from .neighborhood import AxisRule, axis_rules


class TileCount(NamedTuple):
    """Result of :func:`visited_tiles`.

    Args:
        q_tiles: tiles of queries.
        kv_tiles: tiles of keys of the whole problem, what dense attention visits for each tile of queries.
        visited: visits over all tiles of queries.
        most: visits of the busiest tile of queries.
        flop_speedup: ``prod(grid) / prod(kernel)``.
        block_sparse: no visited tile needs a mask.
    """

    q_tiles: int
    kv_tiles: int
    visited: int
    most: int
    flop_speedup: float
    block_sparse: bool

    @property
    def speedup(self) -> float:
        """Upper bound of the speedup over dense attention, all tiles costing the same."""
        return self.q_tiles * self.kv_tiles / self.visited

    @property
    def worst_speedup(self) -> float:
        """The same, if every tile of queries took as long as the busiest."""
        return self.kv_tiles / self.most


def _axis_tiles(rule: AxisRule, q_tile: int, kv_tile: int, kv_tiling: str) -> tuple[list[int], bool]:
    """Visits of each tile of queries along one axis, and whether all of them are free of masks."""
    visits, clean = [], not rule.causal
    for group in range(rule.dilation):
        length = rule.group_length(group)
        for start in range(0, length, q_tile):
            windows = {rule.window(i, length) for i in range(start, min(start + q_tile, length))}
            low, high = min(w[0] for w in windows), max(w[1] for w in windows)
            if kv_tiling == "static":
                visits.append(high // kv_tile - low // kv_tile + 1)
                aligned = low % kv_tile == 0 and (high + 1) % kv_tile == 0
            else:
                visits.append(-(-(high - low + 1) // kv_tile))
                aligned = (high - low + 1) % kv_tile == 0
            clean = clean and aligned and len(windows) == 1
    return visits, clean


def _flat_tiles(rules: tuple[AxisRule, ...], q_tile: int, kv_tile: int) -> tuple[list[int], bool]:
    """The same for tiles of consecutive tokens of the flattened grid."""
    grid = [r.length for r in rules]
    weight = [math.prod(grid[a + 1 :]) for a in range(len(grid))]
    keys: list[list[list[int]]] = []  # of every axis and coordinate: the coordinates its window holds
    for r in rules:
        rows = []
        for x in range(r.length):
            group = x % r.dilation
            low, high = r.window(x // r.dilation, r.group_length(group))
            rows.append([group + j * r.dilation for j in range(low, high + 1)])
        keys.append(rows)
    total, visits, clean = math.prod(grid), [], True
    for start in range(0, total, q_tile):
        seen: dict[int, int] = {}
        rows_here = range(start, min(start + q_tile, total))
        for q in rows_here:
            place = [q // w % x for w, x in zip(weight, grid, strict=True)]
            for key in itertools.product(*(keys[a][p] for a, p in enumerate(place))):
                tile = sum(k * w for k, w in zip(key, weight, strict=True)) // kv_tile
                seen[tile] = seen.get(tile, 0) + 1
        visits.append(len(seen))
        clean = clean and all(n == len(rows_here) * min(kv_tile, total - t * kv_tile) for t, n in seen.items())
    return visits, clean


def visited_tiles(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    q_tile: int | Sequence[int] = 64,
    kv_tile: int | Sequence[int] = 64,
    tiling: str = "grid",
    kv_tiling: str = "static",
) -> TileCount:
    """Count the tiles of keys that tiles of queries visit.

    Args:
        grid: 1 to 3 axes.
        kernel_size: window per axis.
        stride: queries that share a window, per axis.
        dilation: per axis; each residue class is a problem of its own.
        causal: per axis.
        q_tile: queries per tile: one number per axis, or for ``tiling="flat"`` a single number of tokens.
        kv_tile: the same for keys.
        tiling: ``"grid"``: tiles are boxes of the grid; ``"flat"``: tiles are runs of the flattened sequence, whose
            windows spread over many tiles as soon as the grid has two axes.
        kv_tiling: ``"static"``: tiles of keys start at multiples of ``kv_tile``; ``"dynamic"``: at the first window of
            the tile of queries. Flat tilings are static.

    Returns:
        A :class:`TileCount`. Where ``kv_tile`` divides the grid, a bidirectional problem has
        ``speedup <= flop_speedup`` under static tiles.

    Raises:
        ValueError: settings that :func:`attnlib.ops.neighborhood.axis_rules` refuses, or tiles below 1.

    >>> count = visited_tiles((4096,), 1024, stride=256, q_tile=256, kv_tile=128)
    >>> count.speedup, count.flop_speedup, count.block_sparse
    (4.0, 4.0, True)
    """
    rules = axis_rules(grid, kernel_size, dilation, stride, causal)
    check_choice("tiling", tiling, ("grid", "flat"))
    check_choice("kv_tiling", kv_tiling, ("static", "dynamic"))
    flop_speedup = math.prod(r.length / r.kernel for r in rules)
    shape = len(rules) if tiling == "grid" else 1
    q_tiles, kv_tiles = to_tuple("q_tile", q_tile, shape), to_tuple("kv_tile", kv_tile, shape)
    q_tiles, kv_tiles = check_ints("q_tile", q_tiles, least=1), check_ints("kv_tile", kv_tiles, least=1)
    if tiling == "flat":
        if kv_tiling != "static":
            raise ValueError("kv_tiling='dynamic' is not possible with tiling='flat'; choose 'static'")
        visits, clean = _flat_tiles(rules, q_tiles[0], kv_tiles[0])
        whole = -(-math.prod(r.length for r in rules) // kv_tiles[0])
        return TileCount(len(visits), whole, sum(visits), max(visits), flop_speedup, clean)
    axes = [_axis_tiles(r, q, kv, kv_tiling) for r, q, kv in zip(rules, q_tiles, kv_tiles, strict=True)]
    return TileCount(
        math.prod(len(visits) for visits, _ in axes),
        math.prod(-(-r.length // kv) for r, kv in zip(rules, kv_tiles, strict=True)),
        math.prod(sum(visits) for visits, _ in axes),
        math.prod(max(visits) for visits, _ in axes),
        flop_speedup,
        all(clean for _, clean in axes),
    )
