"""Clips with sound: digits move over a grid, one of them now and then has a tone; an event is both seen and heard.

In every clip three digits of other kinds move from cell to cell. Two of them are there all the time and silent. The
third comes and goes, and its tone comes and goes by itself, so that it is unheard for a while, or heard and unseen. As
in the data set AVE, segments hold an event where it is seen *and* heard; everything else is background.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_int, check_real
from .bags import digits

#: Cells per side, kinds of digits, bands of sound.
GRID, KINDS, BANDS = 3, 4, 12


class Clips(NamedTuple):
    """Clips of T segments.

    Args:
        video: (B, T, 3, 3, 64), pixels of each cell.
        audio: (B, T, 12), bands.
        target: (B, T), the kind that is seen and heard, or 4.
        seen, heard: (B, T) boolean.
        at: (B, T) the cell of the digit that sounds, also where it is not seen.
    """

    video: Tensor
    audio: Tensor
    target: Tensor
    seen: Tensor
    heard: Tensor
    at: Tensor


def _stretch(count: int, length: int, generator: torch.Generator) -> Tensor:
    """(count, length) boolean, half of the length or more at one go."""
    size = torch.randint(length // 2, length, (count, 1), generator=generator)
    start = (torch.rand(count, 1, generator=generator) * (length - size + 1)).long()
    at = torch.arange(length)
    return (at >= start) & (at < start + size)


def clips(
    count: int, generator: torch.Generator, length: int = 8, noise: float = 0.4, hum: float = 0.6, test: bool = False
) -> Clips:
    """Clips, and what is where.

    Args:
        count: clips.
        generator: of everything.
        length: segments, 2 at least.
        noise: standard deviation on pixels between 0 and 1.
        hum: on bands, beside a tone of 1.
        test: from the half of the digits that training never sees.

    >>> made = clips(3, torch.Generator().manual_seed(0))
    >>> made.video.shape, made.audio.shape, bool(((made.target < 4) == (made.seen & made.heard)).all())
    (torch.Size([3, 8, 3, 3, 64]), torch.Size([3, 8, 12]), True)
    """
    check_int("count", count, least=1)
    check_int("length", length, least=2)
    check_real("noise", noise, least=0)
    check_real("hum", hum, least=0)
    images, labels = (x[int(test) :: 2] for x in digits())
    kinds = torch.rand(count, KINDS, generator=generator).argsort(1)[:, :3]
    seen, heard = (_stretch(count, length, generator) for _ in range(2))
    # Three digits on other cells, one of which moves to a free cell at every segment.
    cells = torch.rand(count, GRID * GRID, generator=generator).argsort(1)
    places = []
    for _ in range(length):
        places.append(cells[:, :3].clone())
        mover = torch.randint(3, (count,), generator=generator)
        free = torch.randint(3, GRID * GRID, (count,), generator=generator)
        row = torch.arange(count)
        cells[row, mover], cells[row, free] = cells[row, free], cells[row, mover]
    at = torch.stack(places, 1)
    video = torch.zeros(count, length, GRID * GRID, 64)
    for which in range(3):
        pick = torch.empty(count, length, dtype=torch.long)
        for kind in range(KINDS):
            mine = (labels == kind).nonzero().flatten()
            drawn = mine[torch.randint(len(mine), (count, length), generator=generator)]
            pick = torch.where(kinds[:, which, None] == kind, drawn, pick)
        shown = images[pick].flatten(2) * (seen[..., None] if which == 0 else 1)
        video.scatter_add_(2, at[:, :, which, None, None].expand(-1, -1, 1, 64), shown.unsqueeze(2))
    video += noise * torch.randn(video.shape, generator=generator)
    bands = torch.exp(-0.5 * (torch.arange(BANDS) - 3 * kinds[:, :1] - 1).square())
    audio = heard[..., None] * bands[:, None] + hum * torch.randn(count, length, BANDS, generator=generator)
    target = torch.where(seen & heard, kinds[:, :1], KINDS)
    return Clips(video.reshape(count, length, GRID, GRID, 64), audio, target, seen, heard, at[:, :, 0])
