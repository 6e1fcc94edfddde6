"""Balls in noise, in images and volumes: where they are is known, and how large each is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_grid, check_int, check_real


def blobs(
    count: int,
    grid: Sequence[int],
    *,
    num_classes: int = 2,
    most: int = 2,
    radius: tuple[float, float] = (0.1, 0.3),
    noise: float = 0.3,
    chans: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Images or volumes with up to ``most`` balls; the brightness of a ball tells its class.

    Args:
        count: images.
        grid: their sides.
        num_classes: with the background, which is class 0.
        most: balls in one image; at least one.
        radius: smallest and largest, as parts of the shortest side.
        noise: standard deviation of what is added to all.
        chans: channels, alike but for the noise.
        generator: for the draws.

    Returns:
        Images (count, chans, *grid), and labels (count, *grid).

    >>> x, y = blobs(2, (8, 9, 7), generator=torch.Generator().manual_seed(0))
    >>> x.shape, y.shape, bool((y > 0).any())
    (torch.Size([2, 1, 8, 9, 7]), torch.Size([2, 8, 9, 7]), True)
    """
    sides = check_grid("grid", grid)
    check_int("num_classes", num_classes, least=2)
    check_int("most", most, least=1)
    check_int("chans", chans, least=1)
    check_real("noise", noise, least=0)
    low, high = (check_real("radius", r, above=0) * min(sides) for r in radius)
    labels = torch.zeros(check_int("count", count, least=0), *sides, dtype=torch.long)
    at = torch.stack(torch.meshgrid(*(torch.arange(n) + 0.5 for n in sides), indexing="ij"), -1)
    for row in labels:
        for _ in range(int(torch.randint(1, most + 1, (), generator=generator))):
            size = low + (high - low) * float(torch.rand((), generator=generator))
            centre = torch.rand(len(sides), generator=generator) * torch.tensor(sides)
            kind = int(torch.randint(1, num_classes, (), generator=generator))
            row[(at - centre).square().sum(-1) <= max(size, 0.75) ** 2] = kind
    images = (labels.float() / (num_classes - 1))[:, None].expand(-1, chans, *labels.shape[1:])
    return images + noise * torch.randn(images.shape, generator=generator), labels
