"""A model on images or volumes that do not fit memory: tiles with context around them, which fade into each other.

>>> tiled(lambda x: x + 1, torch.zeros(1, 1, 5, 7), (2, 3), overlap=1).unique().tolist()
[1.0]
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_float, check_int, check_ints, describe


def tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tile: int | Sequence[int] | None,
    *,
    overlap: int = 32,
    blend: int | None = None,
    align: int = 1,
    scale: int = 1,
) -> Tensor:
    """``run(x)`` in tiles.

    Every tile is read with ``overlap`` pixels around it, and more up to the next multiple of ``align``. Over the inner
    ``blend`` of these, neighbours fade into each other in straight lines. Where no pixel reads further than ``overlap -
    blend`` pixels in the model, the tiles are exactly the whole.

    Args:
        run: (B, C, *grid) to (B, K, *(scale * grid)), for any grid.
        x: (B, C, *grid), with one axis or more in the grid.
        tile: sides of a tile in pixels of ``x``; one for all axes; ``None``: everything at once.
        overlap: pixels of context on every side of a tile.
        blend: pixels over which neighbours fade, on each side of their border; half of ``overlap`` by default, 0 cuts.
        align: pixels after which what the model lays over an image (windows, strides) begins anew.
        scale: pixels a side that come out for one that goes in.

    Raises:
        ValueError: no grid, no pixels, a tile of none, ``blend`` beyond ``overlap``, or outputs of another size.
    """
    check_float("x", x)
    if x.dim() < 3 or not x.shape[2:].numel():
        raise ValueError(f"x must be (B, C, *grid) with at least one pixel, got {describe(x)}")
    for name, value in (("align", align), ("scale", scale)):
        check_int(name, value, least=1)
    overlap = check_int("overlap", overlap, least=0)
    blend = overlap // 2 if blend is None else check_int("blend", blend, least=0, most=overlap)
    if tile is None:
        return run(x)
    rank = x.dim() - 2
    sides = check_ints("tile", tile if isinstance(tile, Sequence) else (tile,) * rank, least=1)
    if len(sides) != rank:
        raise ValueError(f"tile={tuple(sides)} must have a side for each of the {rank} axes of x {tuple(x.shape)}")
    axes = [spans(n, side, overlap, blend, align, scale) for n, side in zip(x.shape[2:], sides, strict=True)]
    out: Tensor | None = None
    for place in itertools.product(*axes):
        reads, keeps = [r for r, _, _ in place], [k for _, k, _ in place]
        part = run(_cut(x, reads))
        wanted = [scale * (high - low) for low, high in reads]
        if list(part.shape[2:]) != wanted:
            raise ValueError(f"run gave {tuple(part.shape)} for a tile that should become (B, K, {wanted})")
        pairs = zip(keeps, reads, strict=True)
        part = _cut(part, [((a - r[0]) * scale, (b - r[0]) * scale) for (a, b), r in pairs])
        for axis, (_, _, w) in enumerate(place):
            part = part * w.to(part).view(-1, *[1] * (rank - axis - 1))
        if out is None:
            out = part.new_zeros(*part.shape[:2], *(n * scale for n in x.shape[2:]))
        _cut(out, [(a * scale, b * scale) for a, b in keeps]).add_(part)
    assert out is not None
    return out


def _cut(x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """A view of (B, C, *grid): a range of every axis of the grid."""
    for axis, (low, high) in enumerate(ranges):
        x = x.narrow(axis + 2, low, high - low)
    return x


def spans(n: int, tile: int, overlap: int, blend: int, align: int = 1, scale: int = 1) -> list[tuple[Any, Any, Tensor]]:
    """Per tile along an axis of ``n`` pixels: what is read, what is kept of it, and the weights of that.

    Weights rise and fall in straight lines over ``blend`` pixels on both sides of a border; those of a pixel sum to 1.
    """
    found, total = [], torch.zeros(n * scale, dtype=torch.float64)
    for start in range(0, n, tile):
        end = min(start + tile, n)
        low = max(0, start - overlap) // align * align
        high = min(n, -(-(end + overlap) // align) * align)
        first, last = max(0, start - blend), min(n, end + blend)
        at = (torch.arange(first * scale, last * scale, dtype=torch.float64) + 0.5) / scale
        weights = torch.ones_like(at)
        if start and blend:
            weights = weights * ((at - start + blend) / (2 * blend)).clamp(max=1)
        if end < n and blend:
            weights = weights * ((end + blend - at) / (2 * blend)).clamp(max=1)
        total[first * scale : last * scale] += weights
        found.append(((low, high), (first, last), weights))
    return [(r, (a, b), w / total[a * scale : b * scale]) for r, (a, b), w in found]
