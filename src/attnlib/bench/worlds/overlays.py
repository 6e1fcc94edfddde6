"""Bags under X-rays: everything lets some light through, what lies over something else hides it without covering it.

Light is what is left behind all things, ``exp(-sum of what they absorb)`` for each colour. Things of metal take much of
every colour, those of cloth mostly blue. What is looked for, rings and crosses of metal, lies among bars, plates and
discs of both, and is hidden the more the more of it they lie over.

>>> bag = make_bag(0)
>>> bag.image.shape, bag.boxes.shape[1], len(bag.covered) == len(bag.labels)
(torch.Size([3, 48, 48]), 4, True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int, check_real
from .numbered import generator

#: Kinds of what is looked for, by label.
KINDS = ("ring", "cross")
#: What a thing of full thickness absorbs of red, green and blue.
MATTER = {"metal": (1.2, 0.9, 0.6), "cloth": (0.15, 0.4, 0.9)}


@dataclass(frozen=True)
class Bag:
    """A picture (3, side, side) in [0, 1] and what is looked for in it.

    ``boxes`` (n, 4) are corners in pixels, ``labels`` (n,) numbers of :data:`KINDS`, ``covered`` (n,) the share of each
    thing's pixels that something else lies over.
    """

    image: Tensor
    boxes: Tensor
    labels: Tensor
    covered: Tensor


def _wanted(label: int, x: np.ndarray, y: np.ndarray, radius: float, turn: float) -> np.ndarray:
    """Where a ring or a cross of a radius about the middle is."""
    if label == 0:
        away = np.hypot(x, y)
        ring: np.ndarray = (away <= radius) & (away >= 0.5 * radius)
        return ring
    a, b = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    arms: np.ndarray = (np.minimum(abs(a), abs(b)) <= 0.22 * radius) & (np.maximum(abs(a), abs(b)) <= radius)
    return arms


def _clutter(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where a bar, a plate or a disc is, somewhere."""
    cx, cy, turn = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0, np.pi)
    a = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    b = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    kind = rng.integers(3)
    if kind == 0:
        inside: np.ndarray = (abs(a) <= rng.uniform(0.25, 0.6)) & (abs(b) <= rng.uniform(0.02, 0.05))
    elif kind == 1:
        inside = (abs(a) <= rng.uniform(0.1, 0.25)) & (abs(b) <= rng.uniform(0.1, 0.25))
    else:
        inside = np.hypot(a, b) <= rng.uniform(0.06, 0.2)
    return inside


def make_bag(
    number: int, part: str = "train", side: int = 48, most: int = 2, clutter: int = 8, noise: float = 0.02
) -> Bag:
    """The bag of a number.

    Args:
        number: of the bag.
        part: ``"train"``, ``"dev"`` or ``"test"``: other bags.
        side: height and width.
        most: things that are looked for; there is one at least.
        clutter: other things.
        noise: standard deviation.
    """
    check_int("side", side, least=32)
    check_int("most", most, least=1)
    check_int("clutter", clutter, least=0)
    check_real("noise", noise, least=0.0)
    rng = generator("overlays", number, part)
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    taken: list[tuple[float, float, float]] = []
    boxes, labels, masks = [], [], []
    absorbed = np.zeros((3, side, side))
    for _ in range(int(rng.integers(1, most + 1))):
        for _ in range(20):
            radius = float(np.exp(rng.uniform(np.log(0.08), np.log(0.2))))
            cx, cy = rng.uniform(radius, 1 - radius, 2)
            if all(max(abs(cx - a), abs(cy - b)) > radius + r for a, b, r in taken):
                break
        else:
            continue
        taken.append((cx, cy, radius))
        label = int(rng.integers(2))
        mask = _wanted(label, x - cx, y - cy, radius, rng.uniform(0, np.pi / 2))
        absorbed += rng.uniform(0.3, 0.6) * np.array(MATTER["metal"])[:, None, None] * mask
        down, across = np.nonzero(mask)
        boxes.append([across.min(), down.min(), across.max() + 1, down.max() + 1])
        labels.append(label)
        masks.append(mask)
    over = np.zeros((side, side), dtype=bool)
    for _ in range(clutter):
        mask, matter = _clutter(rng, x, y), list(MATTER)[rng.integers(2)]
        absorbed += rng.uniform(0.3, 1.0) * np.array(MATTER[matter])[:, None, None] * mask
        over |= mask
    image = np.exp(-absorbed) + noise * rng.standard_normal(absorbed.shape)
    return Bag(
        torch.from_numpy(np.clip(image, 0, 1).astype(np.float32)), torch.tensor(boxes).float(), torch.tensor(labels),
        torch.tensor([float(over[m].mean()) for m in masks]),
    )  # fmt: skip


__all__ = ["KINDS", "MATTER", "Bag", "make_bag"]
