"""Pairs of a visible and an infrared picture of one scene, in which a thing shows in either, or in both.

>>> pair = make_pair(0)
>>> pair.visible.shape, pair.infrared.shape, pair.boxes.shape[1], len(pair.seen) == len(pair.labels)
(torch.Size([3, 64, 64]), torch.Size([3, 64, 64]), 4, True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real
from .numbered import generator

#: Where a thing may show.
SEEN = ("both", "visible", "infrared")
#: Kinds of things, by label.
KINDS = ("disc", "square")


@dataclass(frozen=True)
class Pair:
    """Pictures (3, side, side) in [0, 1], pixel on pixel, and what stands in them.

    ``boxes`` (n, 4) are corners in pixels, ``labels`` (n,) numbers of :data:`KINDS`, ``seen`` n words of :data:`SEEN`.
    The infrared picture is grey: its three channels are alike.
    """

    visible: Tensor
    infrared: Tensor
    boxes: Tensor
    labels: Tensor
    seen: tuple[str, ...]


def make_pair(
    number: int, part: str = "train", side: int = 64, most: int = 3, noise: float = 0.05, seen: str | None = None
) -> Pair:
    """The pair of a number: one thing or more, apart from each other.

    Args:
        number: of the pair.
        part: ``"train"``, ``"dev"`` or ``"test"``: other pairs.
        side: height and width.
        most: things in a scene.
        noise: standard deviation.
        seen: where all things show; drawn for each by default.
    """
    check_int("side", side, least=32)
    check_int("most", most, least=1)
    check_real("noise", noise, least=0.0)
    if seen is not None:
        check_choice("seen", seen, SEEN)
    rng = generator("pairs", number, part)
    y, x = (np.mgrid[:side, :side] + 0.5) / side
    ground = 0.1 * np.sin(2 * np.pi * (rng.uniform(0.5, 2) * x + rng.uniform(0.5, 2) * y) + rng.uniform(0, 6.3))
    visible = np.clip(rng.uniform(0.2, 0.5, 3), 0, 1)[:, None, None] + ground
    infrared = rng.uniform(0.2, 0.4) - ground[::-1]
    taken: list[tuple[float, float, float]] = []
    boxes, labels, shown = [], [], []
    for _ in range(int(rng.integers(1, most + 1))):
        for _ in range(20):
            radius = rng.uniform(0.09, 0.16)
            cx, cy = rng.uniform(radius, 1 - radius, 2)
            if all(max(abs(cx - a), abs(cy - b)) > radius + r + 0.03 for a, b, r in taken):
                break
        else:
            continue
        taken.append((cx, cy, radius))
        label, where = int(rng.integers(2)), seen or SEEN[rng.integers(3)]
        away = np.hypot(x - cx, y - cy) if label == 0 else np.maximum(abs(x - cx), abs(y - cy))
        inside = away <= radius
        colour, heat = rng.uniform(0.6, 1.0, 3), rng.uniform(0.7, 1.0)
        if where != "infrared":
            visible = np.where(inside, colour[:, None, None], visible)
        if where != "visible":
            infrared = np.where(inside, heat, infrared)
        boxes.append([(cx - radius) * side, (cy - radius) * side, (cx + radius) * side, (cy + radius) * side])
        labels.append(label)
        shown.append(where)
    pictures = []
    for picture in (visible, np.broadcast_to(infrared, (side, side))):
        picture = picture + noise * rng.standard_normal(picture.shape)
        held = torch.from_numpy(np.clip(picture, 0, 1).astype(np.float32))
        pictures.append(held if held.dim() == 3 else held.expand(3, -1, -1).contiguous())
    return Pair(pictures[0], pictures[1], torch.tensor(boxes), torch.tensor(labels), tuple(shown))


__all__ = ["KINDS", "SEEN", "Pair", "make_pair"]
