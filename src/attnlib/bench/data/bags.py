"""Bags whose instances are known one by one: digits among others, spots planted in a stained tissue.

Digits are scikit-learn's (1,797 of 8 x 8), the tissue is scikit-image's immunohistochemistry picture (512 x 512). What
bags for training are made of never comes in bags for testing: odd and even digits, left and right half of the tissue.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_int, check_real
from ...extras import need

#: Pixels per side of a patch of tissue, and patches per side of a piece of it.
PATCH, SIDE = 16, 8


class Bags(NamedTuple):
    """Bags of N instances each.

    Args:
        bags: (B, N, C) features.
        target: (B,) 1 where the bag holds what is looked for.
        truth: (B, N) boolean, which instances do.
        pictures: (B, h, w, 3) in [0, 1], the pieces of tissue; (B, N, 8, 8) digits.
    """

    bags: Tensor
    target: Tensor
    truth: Tensor
    pictures: Tensor


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: (1797, 8, 8) between 0 and 1, and what they are."""
    held: Any = need("sklearn.datasets", "bags of digits").load_digits()
    return torch.as_tensor(held.images / 16, dtype=torch.float32), torch.as_tensor(held.target, dtype=torch.long)


@functools.cache
def _tissue() -> Tensor:
    held: Any = need("skimage.data", "bags of tissue").immunohistochemistry()
    return torch.as_tensor(held / 255, dtype=torch.float32)


def _held(count: int, size: int, most: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every second bag is positive; how many instances of each then are: (B,), (B,)."""
    target = torch.arange(count) % 2
    low, high = most
    if not 1 <= low <= high <= size:
        raise ValueError(f"positives must be two numbers from 1 to {size}, the first no larger, got {most}")
    return target, target * torch.randint(low, high + 1, (count,), generator=generator)


def digit_bags(
    count: int,
    generator: torch.Generator,
    size: int = 100,
    positives: tuple[int, int] = (5, 20),
    noise: float = 0.3,
    wanted: int = 9,
    test: bool = False,
) -> Bags:
    """Bags of digits; every second one holds some of the one that is looked for.

    Args:
        count: bags.
        generator: of everything.
        size: digits a bag.
        positives: fewest and most that are looked for, in a positive bag.
        noise: standard deviation on pixels between 0 and 1.
        wanted: the digit.
        test: from the other half of the digits.

    >>> made = digit_bags(4, torch.Generator().manual_seed(0), size=12, positives=(1, 3))
    >>> made.bags.shape, made.target.tolist(), bool((made.truth.any(1) == made.target.bool()).all())
    (torch.Size([4, 12, 64]), [0, 1, 0, 1], True)
    """
    check_int("count", count, least=1)
    check_int("size", size, least=1)
    check_real("noise", noise, least=0)
    check_int("wanted", wanted, least=0, most=9)
    images, labels = (x[int(test) :: 2] for x in digits())
    right, wrong = ((labels == wanted).nonzero().flatten(), (labels != wanted).nonzero().flatten())
    target, many = _held(count, size, positives, generator)
    order = torch.rand(count, size, generator=generator).argsort(1)
    truth = order < many[:, None]
    drawn = torch.where(
        truth,
        right[torch.randint(len(right), (count, size), generator=generator)],
        wrong[torch.randint(len(wrong), (count, size), generator=generator)],
    )
    seen = images[drawn] + noise * torch.randn(count, size, 8, 8, generator=generator)
    return Bags(2 * seen.flatten(2) - 0.6, target, truth, seen)


def tissue_bags(
    count: int,
    generator: torch.Generator,
    positives: tuple[int, int] = (4, 16),
    strength: float = 0.7,
    test: bool = False,
) -> Bags:
    """Pieces of tissue, 8 x 8 patches of 16 pixels; in every second one, patches near each other hold a dark spot.

    Features of a patch are its colours at 4 x 4 places and their spread.

    Args:
        count: bags.
        generator: of everything.
        positives: fewest and most patches with a spot, in a positive bag.
        strength: of the spot, 0 to 1.
        test: from the right half of the tissue; the left half otherwise.

    >>> tissue_bags(2, torch.Generator().manual_seed(0)).bags.shape
    torch.Size([2, 64, 60])
    """
    check_int("count", count, least=1)
    check_real("strength", strength, least=0, most=1)
    whole, side = _tissue(), PATCH * SIDE
    half = whole[:, 256:] if test else whole[:, :256]
    target, many = _held(count, SIDE * SIDE, positives, generator)
    grid = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1).reshape(-1, 2)
    at = torch.arange(PATCH, dtype=torch.float32)
    pieces, truths = [], []
    for i in range(count):
        y, x, turn, flip = (
            int(torch.randint(n, (), generator=generator))
            for n in (half.shape[0] - side + 1, half.shape[1] - side + 1, 4, 2)
        )
        piece = half[y : y + side, x : x + side].rot90(turn, (0, 1)).clone()
        piece = piece.flip(0) if flip else piece
        middle = grid[torch.randint(SIDE * SIDE, (1,), generator=generator)]
        near = (grid - middle).square().sum(1) + torch.rand(SIDE * SIDE, generator=generator)
        truth = near.argsort().argsort() < many[i]
        for k in truth.nonzero().flatten().tolist():
            row, column = (int(n) * PATCH for n in grid[k])
            cy, cx = (4 + 8 * torch.rand(2, generator=generator)).tolist()
            spot = ((at[:, None] - cy).square() + (at - cx).square() < 3.0**2).float()[..., None] * strength
            patch = piece[row : row + PATCH, column : column + PATCH]
            patch.mul_(1 - spot).add_(spot * torch.tensor([0.25, 0.1, 0.3]))
        pieces.append(piece)
        truths.append(truth)
    pictures = torch.stack(pieces)
    patches = pictures.reshape(count, SIDE, PATCH, SIDE, PATCH, 3).permute(0, 1, 3, 5, 2, 4).flatten(1, 2)
    flat = patches.flatten(0, 1)
    seen = F.avg_pool2d(flat, PATCH // 4).flatten(1)
    quarters = flat.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4).std(-1).flatten(1)
    features = torch.cat([4 * (seen - 0.7), 10 * (quarters - 0.1)], 1)
    return Bags(features.reshape(count, SIDE * SIDE, -1), target, torch.stack(truths), pictures)
