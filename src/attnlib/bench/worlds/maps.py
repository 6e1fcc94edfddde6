"""Drawn maps with a few kinds of symbols: contour lines, a road, a river and words, and where each symbol is.

>>> drawn = make_map(0)
>>> drawn.image.shape, drawn.masks.shape, {s.kind for s in drawn.symbols} <= set(KINDS)
(torch.Size([3, 128, 128]), torch.Size([4, 128, 128]), True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int
from .numbered import generator, put

#: ``mine``: crossed hammers, drawn as a cross; ``church``: a disc under a cross; ``vineyard``: a block of dots;
#: ``quarry``: a ring of short strokes.
KINDS = ("mine", "church", "vineyard", "quarry")
_RADIUS = {"mine": 5, "church": 6, "vineyard": 9, "quarry": 7}
_NAMES = ("ost", "berg", "au", "moor", "see", "feld", "horn", "wald")


@dataclass(frozen=True)
class Symbol:
    """One symbol: its kind, centre (x, y) and box (left, top, right, bottom) in pixels."""

    kind: str
    centre: tuple[int, int]
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Map:
    """A picture (3, side, side) in [0, 1], its symbols, and per kind the mask (4, side, side) of their ground."""

    symbols: tuple[Symbol, ...]
    image: Tensor
    masks: Tensor


def _ink(kind: str, dy: np.ndarray, dx: np.ndarray) -> np.ndarray:
    r = _RADIUS[kind]
    near = np.maximum(abs(dy), abs(dx)) <= r
    if kind == "mine":
        ink = near & (abs(abs(dy) - abs(dx)) <= 1)
    elif kind == "church":
        ink = (np.hypot(dy - 2, dx) <= 3) | ((dx == 0) & (dy >= -r) & (dy <= 0)) | ((dy == -4) & (abs(dx) <= 2))
    elif kind == "vineyard":
        ink = near & (dy % 3 == 0) & (dx % 3 == 0)
    else:
        away = np.hypot(dy, dx)
        ink = (away <= r) & (away >= r - 3) & (np.round(np.arctan2(dy, dx) * 8 / np.pi).astype(int) % 2 == 0)
    return ink


def make_map(number: int, part: str = "train", side: int = 128) -> Map:
    """The map of a number: three to seven symbols that do not touch.

    Args:
        number: of the map.
        part: ``"train"``, ``"dev"`` or ``"test"``: other maps.
        side: height and width.
    """
    check_int("side", side, least=64)
    rng = generator("maps", number, part)
    y, x = np.mgrid[:side, :side]
    height = np.zeros((side, side))
    for _ in range(6):
        a, b = rng.uniform(-3, 3, 2) * 2 * np.pi / side
        height += rng.uniform(0.3, 1.0) * np.cos(a * y + b * x + rng.uniform(0, 2 * np.pi))
    image = np.empty((3, side, side), dtype=np.float32)
    image[:] = np.array([0.93, 0.89, 0.78])[:, None, None] * rng.uniform(0.92, 1.04, (3, 1, 1))
    image -= 0.03 * height[None].astype(np.float32)
    level = np.floor(height * 4)
    edge = np.zeros((side, side), dtype=bool)
    edge[:-1] |= level[:-1] != level[1:]
    edge[:, :-1] |= level[:, :-1] != level[:, 1:]
    image[:, edge] = np.array([0.75, 0.6, 0.45], dtype=np.float32)[:, None]
    along = np.linspace(0, 1, side)
    for colour, wide in (((0.35, 0.55, 0.8), 2.0), ((0.45, 0.4, 0.38), 1.0)):  # a river and a road
        line = side * (rng.uniform(0.2, 0.8) + rng.uniform(-0.3, 0.3) * along + 0.08 * np.sin(7 * along + rng.random()))
        there = abs(y - line[None]) <= wide if rng.random() < 0.5 else abs(x - line[:, None]) <= wide
        image[:, there] = np.asarray(colour, dtype=np.float32)[:, None]
    masks = np.zeros((len(KINDS), side, side), dtype=bool)
    found: list[Symbol] = []
    ink = (0.15, 0.13, 0.12)
    for kind in rng.choice(KINDS, rng.integers(3, 8)).tolist():
        r = _RADIUS[kind]
        cx, cy = (int(v) for v in rng.integers(r + 1, side - r - 1, 2))
        box = (cx - r, cy - r, cx + r + 1, cy + r + 1)
        if all(box[0] > s.box[2] or box[2] < s.box[0] or box[1] > s.box[3] or box[3] < s.box[1] for s in found):
            image[:, _ink(kind, y - cy, x - cx)] = np.asarray(ink, dtype=np.float32)[:, None]
            masks[KINDS.index(kind), box[1] : box[3], box[0] : box[2]] = True
            found.append(Symbol(kind, (cx, cy), box))
    for _ in range(2):
        text = _NAMES[rng.integers(len(_NAMES))]
        top, left = int(rng.integers(0, side - 5)), int(rng.integers(0, side - 4 * len(text)))
        if not masks[:, top : top + 5, left : left + 4 * len(text)].any():
            put(image, text, top, left, ink)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * 0.03
    return Map(tuple(found), torch.from_numpy(np.clip(image + noise, 0, 1)), torch.from_numpy(masks))
