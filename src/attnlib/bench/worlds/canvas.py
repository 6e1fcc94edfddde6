"""Large pictures with small things: 512 × 512 pixels, shapes of 9 to 14 and digits of 8, as ``bench.data.scenes`` does.

Shrunk to the 64 pixels that a small model reads, a thing has two pixels and cannot be told; in a crop of 64 pixels at
the right place it looks as in a scene. Questions come with options, one of which is right: about one thing
(``"single"``: its colour, its quarter of the picture, the digit, whether it is there) or about two (``"cross"``: how
they lie), as HR-Bench asks.

>>> canvas = make_canvas(0)
>>> canvas.image.shape, len(canvas.things)
(torch.Size([3, 512, 512]), 8)
>>> all(len(set(c.options)) == len(c.options) and 0 <= c.right < len(c.options) for c in choices(canvas))
True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_int
from ..data import scenes
from .numbered import generator

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("presence", "colour", "digit", "quarter", "relation")


@dataclass(frozen=True)
class Placed:
    """A thing, its cell's box and the box of what is drawn, both (left, top, right, bottom) in pixels."""

    name: str
    cell: tuple[int, int, int, int]
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Canvas:
    """A picture (3, side, side) in [0, 1] and the things in it, in reading order; no two have one name."""

    things: tuple[Placed, ...]
    image: Tensor


@dataclass(frozen=True)
class Choice:
    """A question with options: ``task`` is ``"single"`` or ``"cross"``, ``about`` the things it asks for."""

    kind: str
    task: str
    text: str
    options: tuple[str, ...]
    right: int
    about: tuple[Placed, ...] = ()

    @property
    def answer(self) -> str:
        return self.options[self.right]

    def turned(self, by: int) -> Choice:
        """The same with its options moved on by so many places, in a circle."""
        n = len(self.options)
        options = tuple(self.options[(i - by) % n] for i in range(n))
        return Choice(self.kind, self.task, self.text, options, (self.right + by) % n, self.about)


def make_canvas(number: int, part: str = "train", side: int = 512, count: int = 8) -> Canvas:
    """The canvas of a number.

    Args:
        number: of the canvas.
        part: ``"train"``, ``"dev"`` or ``"test"``: other canvases; test has other handwriting.
        side: height and width, a multiple of 64.
        count: things, of which at most one is a digit.

    Raises:
        ValueError: a side that is no multiple of 64, more things than names or cells.
    """
    check_int("side", side, least=scenes.SIDE)
    check_int("count", count, least=1)
    cells = (side // scenes.CELL) ** 2
    if side % scenes.SIDE:
        raise ValueError(f"side must be a multiple of {scenes.SIDE}, got {side}")
    if count > min(len(scenes.SHAPED), cells):
        raise ValueError(f"count must be at most {min(len(scenes.SHAPED), cells)}, got {count}")
    rng = generator("canvas", number, part)
    names = [scenes.SHAPED[i] for i in rng.permutation(len(scenes.SHAPED))[:count]]
    if rng.random() < 0.6:
        names[0] = scenes.NUMBERED[rng.integers(10)]
    image = np.full((3, side, side), scenes.BACKGROUND, dtype=np.float32)
    found = []
    for name, cell in zip(names, sorted(rng.permutation(cells)[:count].tolist()), strict=True):
        top, left = cell // (side // scenes.CELL) * scenes.CELL, cell % (side // scenes.CELL) * scenes.CELL
        shift = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
        thing = scenes.Thing(name, 0, float(rng.uniform(0.7, 1.0)), shift, int(rng.integers(1 << 20)))
        scenes.stamp(image, thing, top, left, part)
        drawn = abs(image[:, top : top + scenes.CELL, left : left + scenes.CELL] - scenes.BACKGROUND).max(0) > 0.02
        y, x = np.nonzero(drawn)
        box = (left + int(x.min()), top + int(y.min()), left + int(x.max()) + 1, top + int(y.max()) + 1)
        found.append(Placed(name, (left, top, left + scenes.CELL, top + scenes.CELL), box))
    grain = rng.standard_normal(image.shape, dtype=np.float32) * scenes.NOISE
    return Canvas(tuple(found), torch.from_numpy(np.clip(image + grain, 0.0, 1.0)))


def _centre(thing: Placed) -> tuple[float, float]:
    return (thing.cell[0] + thing.cell[2]) / 2, (thing.cell[1] + thing.cell[3]) / 2


def choices(canvas: Canvas, kind: str | None = None, absent: str | None = None) -> list[Choice]:
    """Questions that have one answer.

    Args:
        canvas: a canvas.
        kind: one of :data:`KINDS`; all of them by default.
        absent: the thing to ask for that is not there; the first name that is not, by default.

    Returns:
        Choices; ``presence`` once for every thing that is there and once for one that is not.
    """
    if kind is not None:
        check_choice("kind", kind, KINDS)
    side, found = canvas.image.shape[-1], []
    names = [thing.name for thing in canvas.things]
    missing = next(name for name in scenes.NAMES if name not in names) if absent is None else absent
    if missing in names or missing not in scenes.NAMES:
        raise ValueError(f"absent must be a thing that is not there, got {missing!r}")
    shapes = [name.split()[1] for name in names]
    found.append(Choice("presence", "single", f"is there a {missing} ?", ("yes", "no"), 1))
    for thing in canvas.things:
        first, second = thing.name.split()
        found.append(Choice("presence", "single", f"is there a {thing.name} ?", ("yes", "no"), 0, (thing,)))
        if first == "digit":
            options = tuple(map(str, range(10)))
            found.append(Choice("digit", "single", "which digit is there ?", options, int(second), (thing,)))
        elif shapes.count(second) == 1:
            options = tuple(scenes.COLOURS)
            text = f"what colour is the {second} ?"
            found.append(Choice("colour", "single", text, options, options.index(first), (thing,)))
        x, y = _centre(thing)
        quarter = 2 * (y >= side / 2) + (x >= side / 2)
        text = f"in which quarter is the {thing.name} ?"
        found.append(Choice("quarter", "single", text, QUARTERS, int(quarter), (thing,)))
    for a, b in zip(canvas.things, canvas.things[1:], strict=False):
        dx, dy = _centre(b)[0] - _centre(a)[0], _centre(b)[1] - _centre(a)[1]
        if max(abs(dx), abs(dy)) > 2 * min(abs(dx), abs(dy)):  # clearly beside or clearly above
            right = (0 if dx > 0 else 1) if abs(dx) > abs(dy) else (2 if dy > 0 else 3)
            text = f"how does the {a.name} lie to the {b.name} ?"
            found.append(Choice("relation", "cross", text, RELATIONS, right, (a, b)))
    return [choice for choice in found if kind in (None, choice.kind)]
