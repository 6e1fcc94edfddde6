"""Short clips in which something happens at a moment that is known: a thing blinks, jumps or turns pale.

>>> clip = make_clip(0)
>>> clip.frames.shape, 0 <= clip.moments[0].start < clip.moments[0].end <= 24
(torch.Size([24, 3, 32, 32]), True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int, check_real
from .numbered import generator
from .painter import COLOURS

EVENTS = ("blinks", "jumps", "pales")
SIDE = 32


@dataclass(frozen=True)
class Moment:
    """What happens: a thing's colour, the event, and its frames ``start`` to ``end``, the last not among them."""

    colour: str
    event: str
    start: int
    end: int

    @property
    def text(self) -> str:
        return f"the {self.colour} square {self.event}"


@dataclass(frozen=True)
class Clip:
    """Frames (T, 3, 32, 32) in [0, 1], what happens in them, and the box (things, T, 4) of every thing, in order."""

    frames: Tensor
    moments: tuple[Moment, ...]
    colours: tuple[str, ...]
    boxes: Tensor


def make_clip(number: int, part: str = "train", length: int = 24, noise: float = 0.03) -> Clip:
    """The clip of a number: two or three squares that drift, each in its own strip; one or two of them do something.

    Args:
        number: of the clip.
        part: ``"train"``, ``"dev"`` or ``"test"``: other clips.
        length: frames.
        noise: standard deviation.
    """
    check_int("length", length, least=12)
    check_real("noise", noise, least=0.0)
    rng = generator("clips", number, part)
    count = int(rng.integers(2, 4))
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:count]]
    frames = np.full((length, 3, SIDE, SIDE), rng.uniform(0.05, 0.3), dtype=np.float32)
    acting = rng.permutation(count)[: rng.integers(1, 3)].tolist()
    moments, boxes = [], np.zeros((count, length, 4), dtype=np.int64)
    strip = SIDE // count
    for i, colour in enumerate(colours):
        size = int(rng.integers(5, 8))
        begin, speed = rng.uniform(0, SIDE - size), rng.choice([-1, 1]) * rng.uniform(0.15, 0.5)
        event, start, end = None, 0, 0
        if i in acting:
            event, spell = EVENTS[rng.integers(len(EVENTS))], int(rng.integers(4, length // 2))
            start = int(rng.integers(0, length - spell + 1))
            end = start + spell
            moments.append(Moment(colour, event, start, end))
        for t in range(length):
            span = SIDE - size
            left = round(abs((begin + speed * t + span) % (2 * span) - span))  # back and forth
            top, strength = i * strip + (strip - size) // 2, 1.0
            if event is not None and start <= t < end:
                if event == "blinks":
                    strength = float((t - start) % 2)
                elif event == "pales":
                    strength = 0.35
                else:
                    top += -1 if (t - start) % 2 == 0 else 1
            square = frames[t, :, top : top + size, left : left + size]
            square += strength * (np.asarray(COLOURS[colour], dtype=np.float32)[:, None, None] - square)
            boxes[i, t] = left, top, left + size, top + size
    grain = noise * rng.standard_normal(frames.shape, dtype=np.float32)
    moments.sort(key=lambda m: (m.start, m.end))
    return Clip(
        torch.from_numpy(np.clip(frames + grain, 0, 1)), tuple(moments), tuple(colours), torch.from_numpy(boxes)
    )
