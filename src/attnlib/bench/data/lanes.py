"""Made-up roads seen from above: what sensors see of them, with parts hidden, and a coarse map that is metres off."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_int, check_real
from ...models.maps.standard import Roads, collate, draw, moved

REACH = (32.0, 32.0)


def lanes(
    count: int, generator: torch.Generator, size: int = 24, hidden: float = 0.5, off: float = 1.5
) -> tuple[Tensor, Roads, Tensor]:
    """Scenes with one to three roads.

    Args:
        count: of scenes.
        generator: of everything.
        size: cells a side, of 64 metres.
        hidden: share of a side of the square that sensors do not see.
        off: metres by which a map is moved, as a standard deviation.

    Returns:
        What sensors see (count, 2, size, size), which is lanes in noise and where nothing is seen; the maps; lanes
        (count, size, size).
    """
    check_int("count", count, least=0)
    check_int("count", count, least=0)
    check_int("size", size, least=4)
    check_real("hidden", hidden, least=0, most=1)
    check_real("off", off, least=0)
    exact, coarse = [], []
    for _ in range(count):
        mine: list[tuple[Tensor, int]] = []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            angle = float(torch.rand((), generator=generator)) * 6.2832
            bend, aside = (torch.rand(2, generator=generator) - 0.5).tolist()
            along = torch.linspace(-45, 45, 11)
            line = torch.stack([along, 40 * aside + 12 * bend * (along / 30) ** 2], 1)
            mine.append((moved(line, angle), int(torch.randint(5, (), generator=generator))))
        exact.append(mine)
        turn, shift = 0.03 * torch.randn((), generator=generator), off * torch.randn(2, generator=generator)
        coarse.append([(moved(line, float(turn), shift.tolist()), kind) for line, kind in mine])
    truth = draw(collate(exact), (size, size), 5, REACH, 4.0).amax(1)
    seen = truth + 0.7 * torch.randn(count, size, size, generator=generator)
    side = round(hidden * size)
    covered = torch.zeros(count, size, size, dtype=torch.bool)
    for i in range(count):
        y, x = (int(torch.randint(0, size - side + 1, (), generator=generator)) for _ in range(2))
        covered[i, y : y + side, x : x + side] = True
    return torch.stack([seen.masked_fill(covered, 0.0), covered.float()], 1), collate(coarse), truth


def recovered(probability: Tensor, truth: Tensor, covered: Tensor) -> float:
    """Intersection over union of lanes where sensors saw nothing."""
    found, there, where = probability > 0.5, truth > 0.5, covered > 0.5
    return float((found & there & where).sum() / ((found | there) & where).sum().clamp(min=1))
