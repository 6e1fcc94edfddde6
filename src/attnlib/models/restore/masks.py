"""Masks of what is known of an image, True, and what is missing, False: one square, or strokes of a free form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import check_grid, check_int, check_ints, describe, readable


def square_masks(count: int, size: Sequence[int], side: int = 128, generator: torch.Generator | None = None) -> Tensor:
    """(count, 1, H, W): a square of ``side`` pixels is missing, anywhere.

    >>> int((~square_masks(2, (16, 16), 4)).sum())
    32
    """
    height, width = check_grid("size", size, (2,))
    check_int("side", side, least=1, most=min(height, width))
    known = torch.ones(check_int("count", count, least=0), 1, height, width, dtype=torch.bool)
    for mask in known:
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in (height, width))
        mask[:, top : top + side, left : left + side] = False
    return known


def stroke_masks(
    count: int, size: Sequence[int], *, strokes: tuple[int, int] = (3, 5), turns: tuple[int, int] = (5, 15),
    length: tuple[int, int] = (20, 50), width: tuple[int, int] = (15, 30), generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """(count, 1, H, W): broad strokes with turns are missing, of images of 256 pixels with these numbers.

    Args:
        count: masks.
        size: H and W.
        strokes: fewest and most.
        turns: of a stroke, fewest and most.
        length: of a part of a stroke.
        width: half the breadth of a stroke.
        generator: of the draws.
    """
    sides = check_grid("size", size, (2,))
    at = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in sides), indexing="ij"), -1)
    end = torch.tensor(sides, dtype=torch.float32) - 1
    known = torch.ones(check_int("count", count, least=0), 1, *sides, dtype=torch.bool)

    for name, pair in (("strokes", strokes), ("turns", turns), ("length", length), ("width", width)):
        if len(check_ints(name, pair, least=1)) != 2 or pair[0] > pair[1]:
            raise ValueError(f"{name} must be fewest and most, got {pair}")

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for mask in known:
        for _ in range(pick(*strokes)):
            here = torch.rand(2, generator=generator) * end
            half = pick(*width)
            for _ in range(pick(*turns)):
                angle = float(torch.rand((), generator=generator)) * 2 * math.pi
                step = pick(*length) * torch.tensor([math.sin(angle), math.cos(angle)])
                there = (here + step).clamp(min=torch.zeros(2), max=end)
                along = there - here
                share = ((at - here) @ along / along.square().sum().clamp(min=1e-6)).clamp(0, 1)
                mask[0] &= (at - here - share[..., None] * along).square().sum(-1) > half**2
                here = there
    return known


def checked_known(name: str, mask: Any, image: Tensor) -> Tensor:
    """A mask (B, 1, H, W) or (B, H, W), boolean or of 0 and 1, as booleans (B, 1, H, W): 1 is known.

    Raises:
        ValueError: another shape, other numbers, an image of which everything or nothing is missing.
    """
    shape = (image.shape[0], 1, *image.shape[2:])
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in (shape, (shape[0], *shape[2:])):
        raise ValueError(f"{name} must be {shape}, 1 where pixels are known, got {describe(mask)}")
    mask = mask.view(shape)
    if readable(mask) and mask.numel():
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{name} must hold 1 (known) and 0 (missing) only")
        shares = (mask != 0).flatten(1).float().mean(1)
        for share, what in (
            (0.0, "nothing is known, everything is missing"),
            (1.0, "everything is known, nothing missing"),
        ):
            if bool((shares == share).any()):
                at = int((shares == share).nonzero()[0])
                raise ValueError(f"{name}: of image {at} {what}; 1 is known here, give 1 - mask if yours means missing")
    return mask != 0
