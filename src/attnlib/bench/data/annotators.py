"""Songs whose mood sounds, and annotators with gains of their own, a quarter of them below zero."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_int, check_real

#: Rows and bands of a frame of sound, width of the vector of a song.
MEL, WIDTH = (9, 12), 16


class Ratings(NamedTuple):
    """Songs and what was said of them.

    Args:
        mel: (B, S, 9, 12). song: (B, 16), which says nothing here.
        values: (B, S, 2) arousal and valence.
        annotator: (B,) who gave them.
    """

    mel: Tensor
    song: Tensor
    values: Tensor
    annotator: Tensor


def ratings(
    people: int,
    generator: torch.Generator,
    songs: int = 3,
    length: int = 12,
    noise: float = 0.5,
    gains: tuple[float, float] = (-0.5, 1.5),
) -> Ratings:
    """So many annotators with so many songs each.

    Arousal sounds in the lower bands, valence in the upper ones, both as waves. What an annotator says is either times
    a gain of the annotator plus an offset of the annotator within 0.3.

    Args:
        people: annotators.
        generator: of everything.
        songs: of each.
        length: frames.
        noise: standard deviation in all bands.
        gains: least and most.

    >>> made = ratings(3, torch.Generator().manual_seed(0))
    >>> made.mel.shape, made.annotator.tolist()
    (torch.Size([9, 12, 9, 12]), [0, 0, 0, 1, 1, 1, 2, 2, 2])
    """
    for name, number in (("people", people), ("songs", songs), ("length", length)):
        check_int(name, number, least=1)
    check_real("noise", noise, least=0)
    low, high = (check_real("gains", g) for g in gains)
    count = people * songs
    who = torch.arange(people).repeat_interleave(songs)
    phase, rate = (torch.rand(count, 2, 1, generator=generator) for _ in range(2))
    mood = torch.sin(6.3 * phase + (0.4 + 0.8 * rate) * torch.arange(length)).mT
    mel = noise * torch.randn(count, length, *MEL, generator=generator)
    half = MEL[1] // 2
    mel[..., :half] += mood[..., :1, None]
    mel[..., half:] += mood[..., 1:, None]
    gain = low + (high - low) * torch.rand(people, 1, 2, generator=generator)
    offset = 0.6 * torch.rand(people, 1, 2, generator=generator) - 0.3
    return Ratings(mel, torch.zeros(count, WIDTH), gain[who] * mood + offset[who], who)
