"""Gaze over shelves from a known policy: who searches, where they look next, and what they remember.

A shelf is a grid of things of a few colours; every thing has a shade of its own. A searcher starts in the middle, likes
things near the last fixation, right of it, and of the colour that is sought, avoids those that were looked at before,
now and then looks at the same thing again, and stops at the thing that is sought.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_int, check_real

#: Pixels per side of the picture of a thing, the least that OAT's net takes.
PIXELS = 19
_COLOURS = torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.25, 0.35, 0.9], [0.9, 0.85, 0.3]])


class Searched(NamedTuple):
    """Shelves and a path on each.

    Args:
        images: (B, N, 19, 19, 3) in [0, 1].
        places: (B, N, 2) row and column.
        sought: (B,) numbers of things.
        path: (B, L) numbers of things, -1 behind the end.
        colours: (B, N) which of four colours a thing has.
    """

    images: Tensor
    places: Tensor
    sought: Tensor
    path: Tensor
    colours: Tensor


def shelves(
    count: int,
    generator: torch.Generator,
    size: tuple[int, int] = (3, 4),
    longest: int = 16,
    places: Tensor | None = None,
) -> Searched:
    """Shelves and the path of one searcher on each.

    Args:
        count: shelves.
        generator: of everything.
        size: rows and columns.
        longest: fixations at most.
        places: (N, 2), to number things in another way; row by row by default.

    >>> made = shelves(2, torch.Generator().manual_seed(0))
    >>> made.images.shape, made.places.shape
    (torch.Size([2, 12, 19, 19, 3]), torch.Size([2, 12, 2]))
    """
    check_int("count", count, least=1)
    check_int("longest", longest, least=1)
    rows, columns = (check_int("size", n, least=1) for n in size)
    if places is None:
        grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack(grid, -1).reshape(-1, 2).float()
    things = len(places)
    colours = torch.randint(len(_COLOURS), (count, things), generator=generator)
    shade = _COLOURS[colours] + 0.08 * torch.randn(count, things, 3, generator=generator)
    images = shade.clamp(0, 1)[:, :, None, None].expand(-1, -1, PIXELS, PIXELS, -1).contiguous()
    sought = torch.randint(things, (count,), generator=generator)
    path = torch.stack([search(places, colours[i], int(sought[i]), generator, longest) for i in range(count)])
    return Searched(images, places.repeat(count, 1, 1), sought, path, colours)


def search(
    places: Tensor,
    colours: Tensor,
    sought: int,
    generator: torch.Generator,
    longest: int = 16,
    again: float = 0.08,
    reach: float = 0.3,
    liking: float = 3.0,
    memory: float = 3.0,
    drift: float = 1.0,
) -> Tensor:
    """(longest,) one searcher's path over one shelf, -1 behind its end.

    Args:
        places: (N, 2). colours: (N,). sought: number of the thing.
        generator: of choices.
        longest: fixations at most.
        again: how often the same thing is looked at once more.
        reach: distance over which things become e times less attractive.
        liking: how much the colour that is sought adds to the logarithm.
        memory: how much a thing that was looked at before loses.
        drift: how much things right of the last fixation gain, and those left of it lose.
    """
    check_int("longest", longest, least=1)
    check_real("again", again, least=0, below=1)
    check_real("reach", reach, above=0)
    at = (places.amin(0) + places.amax(0)) / 2
    seen = torch.zeros(len(places))
    path: list[int] = []
    for _ in range(longest):
        draw = float(torch.rand((), generator=generator))
        if path and (draw < again or len(places) == 1):
            path.append(path[-1])
            continue
        way = places - at
        log = drift * way[:, 1].clamp(-1, 1) - way.norm(dim=1) / reach
        log = log + liking * (colours == colours[sought]) - memory * seen
        if path:
            log[path[-1]] = float("-inf")
        chosen = int(log.softmax(0).multinomial(1, generator=generator))
        path.append(chosen)
        if chosen == sought:
            break
        seen[chosen], at = 1, places[chosen]
    return torch.tensor(path + [-1] * (longest - len(path)))
