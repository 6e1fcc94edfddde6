"""Which patches are hidden: boolean masks, True for hidden, and the tokens of those that are not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checks import check_grid, check_int, check_real, describe, readable


def block_mask(
    grid: tuple[int, int],
    count: int | None = None,
    ratio: float = 0.4,
    batch: int = 1,
    least: int = 16,
    most: int | None = None,
    min_aspect: float = 0.3,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(batch, h, w) boolean: rectangles of patches to hide, until so many are hidden (BEiT, EVA).

    A rectangle has an area between ``least`` and what is left to hide, and an aspect ratio between ``min_aspect`` and
    its inverse, even in the logarithm. One that would hide too many, or nothing new, is thrown away; after ten of these
    in a row the mask stays as it is, so that it may hide fewer than ``count``; where not even one fitted, one patch is
    hidden.

    Args:
        grid: patches (h, w).
        count: patches to hide.
        ratio: the same as a share of all, where ``count`` is not given.
        batch: masks.
        least: smallest area of a rectangle.
        most: largest area; ``count`` by default.
        min_aspect: narrowest rectangle, height over width or the inverse.
        generator: of the random numbers; the global one by default.

    Raises:
        ValueError: nothing to predict, more patches than there are, an aspect ratio outside (0, 1].
    """
    height, width = check_grid("grid", grid, (2,))
    total = height * width
    if count is None:
        check_real("ratio", ratio, least=0, most=1)
        count = int(ratio * total)
        given = f"ratio={ratio} of {total} patches"
    else:
        given = f"count={check_int('count', count)}"
    if count < 1:
        raise ValueError(f"{given} leaves nothing to predict; at least one patch of the grid {grid} must be hidden")
    if count > total:
        raise ValueError(f"{given} is more than the {total} patches of the grid {grid}")
    check_int("batch", batch, least=1)
    check_int("least", least, least=1)
    top = count if most is None else check_int("most", most, least=1)
    check_real("min_aspect", min_aspect, above=0, most=1)
    span = math.log(min_aspect)

    def draw() -> float:
        return float(torch.rand((), generator=generator, dtype=torch.float64))

    masks = torch.zeros(batch, height, width, dtype=torch.bool)
    for mask in masks:
        hidden = 0
        while hidden < count:
            room, new = min(count - hidden, top), 0
            for _ in range(10):
                area = least + (room - least) * draw()
                aspect = math.exp(span - 2 * span * draw())
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h >= height or w >= width:
                    continue
                row, column = int(draw() * (height - h + 1)), int(draw() * (width - w + 1))
                part = mask[row : row + h, column : column + w]
                fresh = h * w - int(part.sum())
                if 0 < fresh <= room:
                    part.fill_(True)
                    new = fresh
                    break
            if not new:
                break
            hidden += new
        if not hidden:  # the authors' masks hide nothing then, on grids that are small beside ``least``
            mask[int(draw() * height), int(draw() * width)] = True
    return masks


def random_mask(
    batch: int,
    total: int,
    count: int | None = None,
    ratio: float = 0.9,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """(batch, total) boolean: exactly ``count`` patches of every sample, chosen uniformly, are hidden.

    Args:
        batch, total: samples, and patches of each.
        count: patches to hide.
        ratio: the same as a share, ``int(ratio * total)``, where ``count`` is not given.
        generator: of the random numbers.
        noise: (batch, total) instead of them; the places whose entry in its argsort is below ``count`` are hidden.
        device: of the mask.

    Raises:
        ValueError: nothing would be hidden, or everything.

    >>> random_mask(2, 196).sum(1).tolist()
    [176, 176]
    """
    check_int("batch", batch, least=0)
    check_int("total", total, least=1)
    if count is None:
        check_real("ratio", ratio, least=0, most=1)
        count, given = int(ratio * total), f"ratio={ratio}"
    else:
        given = f"count={check_int('count', count)}"
    if not 0 < count < total:
        what = "nothing to predict" if count < 1 else "nothing to see"
        raise ValueError(f"{given} of {total} patches leaves {what}; between 1 and {total - 1} patches can be hidden")
    if noise is None:
        noise = torch.rand(batch, total, generator=generator, device=device)
    elif not isinstance(noise, Tensor) or noise.shape != (batch, total):
        raise ValueError(f"noise must be ({batch}, {total}), got {describe(noise)}")
    return noise.argsort(1) < count


def check_mask(mask: Tensor, batch: int, grid: tuple[int, ...], usual: int) -> tuple[Tensor, int]:
    """``mask`` as (B, N), and how many patches of every sample are hidden.

    Args:
        mask: (B, N) or (B, *grid) boolean, True for hidden.
        batch: B.
        grid: of the patches.
        usual: how many are hidden where values cannot be read, as in an export.

    Raises:
        TypeError: no boolean tensor.
        ValueError: another shape, samples that differ in number, nothing hidden or nothing left.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True for hidden patches, got {describe(mask)}")
    total = math.prod(grid)
    if tuple(mask.shape) not in ((batch, total), (batch, *grid)):
        raise ValueError(f"mask must be {(batch, total)} or {(batch, *grid)}, got {tuple(mask.shape)}")
    mask = mask.flatten(1)
    if not readable(mask) or not batch:
        return mask, usual
    counts = mask.sum(1)
    low, high = int(counts.min()), int(counts.max())
    if low != high:
        raise ValueError(f"mask must hide equally many patches of every sample, got {low} to {high}")
    if not low or low == total:
        what = "nothing: there is nothing to predict" if not low else "everything: there is nothing to see"
        raise ValueError(f"mask hides {what} (True is hidden)")
    return mask, low


def visible_first(mask: Tensor) -> Tensor:
    """(B, N) places in the order: those that are seen, then those that are hidden, each in their order.

    >>> visible_first(torch.tensor([[True, False, True, False]])).tolist()
    [[1, 3, 0, 2]]
    """
    return mask.to(torch.uint8).argsort(dim=1, stable=True)


def take(x: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, N, C) at places (B, M)."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
