"""Pictures and volumes as rows of patches, their positions, and the error of hidden ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_float, check_ints, describe, readable
from ...positions import resized, sincos
from ...types import stats_dtype


def patch_sides(name: str, size: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """``size`` as ``rank`` sides."""
    sides = check_ints(name, (size,) * rank if isinstance(size, int) else size, least=1)
    if len(sides) != rank:
        raise ValueError(f"{name} must be one side or {rank} of them, got {sides}")
    return sides


def padded(x: Tensor, sides: Sequence[int]) -> Tensor:
    """(B, C, *grid) with zeros at the ends of axes until every side is a multiple."""
    missing = [-side % p for side, p in zip(x.shape[2:], sides, strict=True)]
    return F.pad(x, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else x


def to_patches(x: Tensor, size: int | Sequence[int]) -> Tensor:
    """(B, C, *grid) -> (B, N, P C): patches row by row, of each its pixels row by row, of each its channels.

    >>> to_patches(torch.arange(8.0).view(1, 1, 2, 4), 2).tolist()
    [[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]]
    """
    rank = x.dim() - 2
    if rank < 1:
        raise ValueError(f"x must be (B, C, *grid), got {describe(x)}")
    sides = patch_sides("size", size, rank)
    x = padded(x, sides)
    for axis, side in enumerate(sides):
        x = x.unflatten(2 + 2 * axis, (-1, side))
    cells, pixels = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    return x.permute(0, *cells, *pixels, 1).flatten(1 + rank).flatten(1, rank)


def from_patches(rows: Tensor, shape: Sequence[int], size: int | Sequence[int], channels: int | None = None) -> Tensor:
    """The inverse of :func:`to_patches`: (B, N, P C) -> (B, C, *shape), without what was padded.

    Raises:
        ValueError: rows of another number, or of a width that is no multiple of the patch, or not of ``channels``.
    """
    sides = patch_sides("size", size, len(shape))
    grid = [-(-n // p) for n, p in zip(shape, sides, strict=True)]
    rank, pixels = len(shape), math.prod(sides)
    count = math.prod(grid)
    if rows.dim() != 3 or rows.shape[1] != count or rows.shape[2] % pixels:
        raise ValueError(f"rows must be (B, {count}, {pixels} C) for {tuple(shape)}, got {describe(rows)}")
    if channels is not None and rows.shape[2] != pixels * channels:
        raise ValueError(
            f"rows must be (B, {count}, {pixels * channels}) for {channels} channels, got {describe(rows)}"
        )
    x = rows.unflatten(2, (*sides, -1)).unflatten(1, grid)
    order = [n for axis in range(rank) for n in (1 + axis, 1 + rank + axis)]
    x = x.permute(0, 1 + 2 * rank, *order)
    for axis in range(rank):
        x = x.flatten(2 + axis, 3 + axis)
    return x[(..., *(slice(n) for n in shape))]


def known_pixels(picture: Tensor, size: int | Sequence[int]) -> Tensor | None:
    """(1, N, P C) ones for pixels of the picture and zeros for padded ones; ``None`` where none were padded."""
    sides = patch_sides("size", size, picture.dim() - 2)
    if not any(n % p for n, p in zip(picture.shape[2:], sides, strict=True)):
        return None
    one = torch.ones(1, *picture.shape[1:], dtype=picture.dtype, device=picture.device)
    return to_patches(one, sides)


def standardized(rows: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B, N, P) with mean 0 and variance 1 each (unbiased, 1e-6 added), their means and their deviations."""
    if known is None:
        mean, var = rows.mean(-1, keepdim=True), rows.var(-1, keepdim=True)
    else:
        count = known.sum(-1, keepdim=True)
        mean = (rows * known).sum(-1, keepdim=True) / count
        var = ((rows - mean) * known).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    deviation = (var + 1e-6).sqrt()
    return (rows - mean) / deviation, mean, deviation


def patch_error(
    prediction: Tensor, picture: Tensor, mask: Tensor | None, size: int | Sequence[int], normalize: bool = False
) -> Tensor:
    """Mean squared error of patches, of the hidden ones where there is a mask; pixels that were padded do not count.

    Args:
        prediction: (B, N, P C).
        picture: (B, C, *grid).
        mask: (B, N) boolean, True for hidden.
        size: of a patch.
        normalize: whether every patch of the picture is standardized first.

    Raises:
        ValueError: another shape, or a mask that hides nothing.
    """
    sides = patch_sides("size", size, picture.dim() - 2)
    rows = to_patches(picture, sides)
    check_float("prediction", prediction)
    if prediction.shape != rows.shape:
        raise ValueError(f"prediction must be {tuple(rows.shape)} for this picture, got {describe(prediction)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != rows.shape[:2]):
        raise ValueError(f"mask must be boolean {tuple(rows.shape[:2])}, True for hidden, got {describe(mask)}")
    if mask is not None and readable(mask) and not bool(mask.any()):
        raise ValueError(f"mask hides nothing: there is nothing to compare, got {describe(mask)}")
    known = known_pixels(picture, sides)
    work = stats_dtype(prediction.dtype)
    rows = rows.to(work)
    if normalize:
        rows = standardized(rows, known)[0]
    error = (prediction.to(work) - rows).square()
    error = error.mean(-1) if known is None else (error * known).sum(-1) / known.sum(-1)
    if mask is None:
        return error.mean()
    return (error * mask).sum() / mask.sum()


def fixed_positions(grid: Sequence[int], dim: int) -> Tensor:
    """(N, dim) sine-cosine positions on a grid, the last axis first, as in MAE; what does not divide stays zero."""
    lines = [torch.arange(n, dtype=torch.float64) for n in grid]
    coords = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)
    rank = len(lines)
    whole = dim - dim % (2 * rank)
    if not whole:
        raise ValueError(f"dim={dim} must be at least {2 * rank} for positions on {rank} axes")
    table = sincos(coords.flip(-1), whole).float()
    return F.pad(table, (0, dim - whole))


def grid_coords(grid: Sequence[int], device: torch.device | None = None) -> Tensor:
    """(N, r) whole coordinates of a grid, row by row."""
    lines = [torch.arange(n, device=device) for n in grid]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)


def stretched(table: Tensor, own: Sequence[int], grid: Sequence[int]) -> Tensor:
    """A table (N, C) of a grid, bicubic (trilinear in 3-D) for another; as it is where they agree."""
    if tuple(own) == tuple(grid):
        return table
    places = table.mT.unflatten(1, tuple(own))
    if len(own) < 3:
        return resized(places, grid).flatten(1).mT
    found = F.interpolate(places[None].float(), size=tuple(grid), mode="trilinear", align_corners=False)
    return found[0].flatten(1).mT.to(table.dtype)
