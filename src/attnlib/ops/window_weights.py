"""Weights that are given, not scored: every token of a grid sums the values of its window, by its own numbers.

A window is as of :func:`attnlib.ops.neighborhood_attention` with its border clamped: ``kernel_size`` tokens along every
axis, shifted inside where it would leave the grid, so that every token reads as many as every other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_device, check_dtype, check_float, check_grid, check_rank, fixed
from ..types import traced_as_constant
from ._dispatch import Operator
from .neighborhood import axis_rules

#: Queries of a tile along an axis, over the kernel: the weights of a tile lie in a matrix of all its queries and keys.
_TILE = 0.75


class _Axis(NamedTuple):
    """One axis: for every token its window's first key; and how it is cut into tiles of queries and boxes of keys."""

    starts: tuple[int, ...]
    tile: int
    queries: tuple[int, ...]  # first query of every tile; the last one is moved back inside
    boxes: tuple[int, ...]  # first key of every box
    box: int


@lru_cache(maxsize=1024)
def _axis(length: int, kernel: int) -> _Axis:
    left = kernel // 2
    starts = tuple(min(max(i - left, 0), length - kernel) for i in range(length))
    count = max(1, round(length / max(1.0, _TILE * kernel)))
    tile = -(-length // count)
    queries = tuple(min(i * tile, length - tile) for i in range(-(-length // tile)))
    box = min(length, tile + kernel - 1)
    boxes = tuple(min(starts[q], length - box) for q in queries)
    return _Axis(starts, tile, queries, boxes, box)


@traced_as_constant
def _axes(grid: tuple[int, ...], kernel: tuple[int, ...]) -> tuple[_Axis, ...]:
    return tuple(_axis(n, k) for n, k in zip(grid, kernel, strict=True))


class _Call(NamedTuple):
    """A checked problem."""

    weights: Tensor  # (B, H, *grid, K)
    v: Tensor  # (B, H, *grid, D)
    grid: tuple[int, ...]
    kernel: tuple[int, ...]

    def inputs(self) -> list[Tensor]:
        return [self.weights, self.v]


def _prepare(weights: Tensor, v: Tensor, kernel_size: int | Sequence[int] = 7) -> _Call:
    check_rank("v", v, (4, 5, 6), "(B, H, *grid, D) with a grid of rank 1, 2 or 3")
    grid = tuple([fixed(n) for n in v.shape[2:-1]])
    kernel = tuple([r.kernel for r in axis_rules(grid, kernel_size)])
    check_float("weights", weights)
    if weights.dim() != v.dim() or tuple(weights.shape[:-1]) != tuple(v.shape[:-1]):
        raise ValueError(f"weights must be {(*v.shape[:-1], 'K')} like v, got {tuple(weights.shape)}")
    if weights.shape[-1] != math.prod(kernel):
        raise ValueError(
            f"weights must have one number for each of {math.prod(kernel)} keys of kernel_size={kernel}, "
            f"got {weights.shape[-1]}"
        )
    check_dtype(weights=weights, v=v)
    check_device(weights=weights, v=v)
    return _Call(weights, v, grid, kernel)


def _numbers(starts: Sequence[int], count: int, device: torch.device) -> Tensor:
    return torch.tensor(starts, device=device)[:, None] + torch.arange(count, device=device)


def _flat(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Coordinates (n_a, m_a) of every axis -> row-major numbers (prod n, prod m) in a grid of ``sizes``."""
    total = parts[0]
    for part, size in zip(parts[1:], sizes[1:], strict=True):
        total = (total[:, None, :, None] * size + part[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return total


def window_keys(
    grid: Sequence[int], kernel_size: int | Sequence[int] = 7, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Which tokens the window of every token holds, in the order in which weights for it are given.

    Args:
        grid: sides.
        kernel_size: tokens per axis.
        device: of the answer.

    Returns:
        (N, K) row-major numbers of keys, and (N, K) places in a flat table of (2 kernel - 1) per axis, at
        ``key - query + kernel - 1``: where a relative bias is read.

    Raises:
        ValueError: a kernel below 2 or larger than the grid.

    >>> keys, places = window_keys((4,), 3)
    >>> keys.tolist(), places[0].tolist()
    ([[0, 1, 2], [0, 1, 2], [1, 2, 3], [1, 2, 3]], [2, 3, 4])
    """
    grid = check_grid("grid", grid)
    kernel = tuple([r.kernel for r in axis_rules(grid, kernel_size)])
    where = torch.device("cpu") if device is None else torch.device(device)
    keys, steps = [], []
    for axis, k in zip(_axes(grid, kernel), kernel, strict=True):
        keys.append(_numbers(axis.starts, k, where))
        steps.append(keys[-1] - torch.arange(len(axis.starts), device=where)[:, None] + k - 1)
    return _flat(keys, grid), _flat(steps, [2 * k - 1 for k in kernel])


def _tiles(call: _Call) -> Tensor:
    """Weights of a tile of queries as one matrix over a box of keys, zero beyond each window; a product with the box.

    A box is at most ``(tile + kernel - 1)`` tokens wide, so that values are copied a few times, never once a key.
    """
    device, axes = call.v.device, _axes(call.grid, call.kernel)
    q_parts, k_parts, places = [], [], []
    for axis, kernel in zip(axes, call.kernel, strict=True):
        q_parts.append(_numbers(axis.queries, axis.tile, device))
        k_parts.append(_numbers(axis.boxes, axis.box, device))
        first = torch.tensor(axis.starts, device=device)[q_parts[-1]] - torch.tensor(axis.boxes, device=device)[:, None]
        places.append((first[..., None] + torch.arange(kernel, device=device)).flatten(1))  # (tiles, tile * kernel)
    queries, keys = _flat(q_parts, call.grid), _flat(k_parts, call.grid)
    tiles, size, box = len(queries), queries.shape[1], keys.shape[1]
    inside = _flat(places, [a.box for a in axes])
    # From (tile_1, k_1, tile_2, k_2, ...) to queries before keys.
    inside = inside.unflatten(1, [n for a, k in zip(axes, call.kernel, strict=True) for n in (a.tile, k)])
    rank = len(axes)
    inside = inside.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2)).reshape(tiles, size, -1)

    weights = call.weights.flatten(2, -2).index_select(2, queries.flatten()).unflatten(2, (tiles, size))
    whole = weights.new_zeros(*weights.shape[:-1], box).scatter(-1, inside.expand(weights.shape), weights)
    values = call.v.flatten(2, -2).index_select(2, keys.flatten()).unflatten(2, (tiles, box))
    out = (whole @ values).flatten(2, 3)
    order = torch.zeros(math.prod(call.grid), dtype=torch.long, device=device)
    order = order.scatter(0, queries.flatten(), torch.arange(tiles * size, device=device))
    return out.index_select(2, order).unflatten(2, call.grid)


def _shifts(call: _Call) -> Tensor:
    """A sum over the keys of a window."""
    out = torch.zeros_like(call.v)
    steps = [torch.tensor(a.starts, device=call.v.device) for a in _axes(call.grid, call.kernel)]
    for number, offset in enumerate(itertools.product(*[range(k) for k in call.kernel])):
        moved = call.v
        for axis, (start, step) in enumerate(zip(steps, offset, strict=True), 2):
            moved = moved.index_select(axis, start + step)
        out = out + call.weights[..., number : number + 1] * moved
    return out


_OPERATOR = Operator("neighborhood_av", _prepare)
_OPERATOR.register("tiles", _tiles)
_OPERATOR.register("eager", _shifts)


def neighborhood_av(
    weights: Tensor, v: Tensor, kernel_size: int | Sequence[int] = 7, *, backend: str | None = None
) -> Tensor:
    """Sums of the values in the window of every token, by weights that are given: ``out[p] = sum_o w[p, o] v[o]``.

    Args:
        weights: (B, H, *grid, K) with K the product of ``kernel_size``, keys in row-major order of the window; any
            numbers.
        v: (B, H, *grid, D) values.
        kernel_size: tokens per axis, at least 2 and at most the grid's.
        backend: ``"tiles"``, also by default; ``"eager"``, a sum over the keys of a window (the specification).

    Returns:
        (B, H, *grid, D).

    Raises:
        ValueError: shapes that do not fit, a window larger than the grid.

    >>> w, v = torch.full((1, 1, 5, 3), 1 / 3), torch.arange(5.0).view(1, 1, 5, 1)
    >>> neighborhood_av(w, v, 3).flatten().tolist()
    [1.0, 1.0, 2.0, 3.0, 3.0]
    """
    return _OPERATOR.run(_prepare(weights, v, kernel_size), backend)
