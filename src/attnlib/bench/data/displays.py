"""Displays for visual search: six pairs of tasks in which A among B is harder for people than B among A.

Sizes in degrees, numbers of items and reaction times of people are those that eccNET was compared with
(:mod:`attnlib.models.perception.search`); the drawing is ours, with smooth edges, at any number of pixels per degree.

>>> shown = display("L", 3, deg2px=6, generator=torch.Generator().manual_seed(0))
>>> shown.image.shape, int(shown.goal.sum()), len(shown.items)
(torch.Size([3, 123, 123]), 1681, 9)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_choice, check_int


class Pair(NamedTuple):
    """An experiment.

    Args:
        hard, easy: the tasks, as they are for people.
        items: numbers of items.
        grid: places a side.
        degrees: of the display.
        item: degrees of an item.
        background: grey from 0 to 255.
        dog: differences of Gaussians that the authors sharpen maps with.
    """

    hard: str
    easy: str
    items: tuple[int, ...]
    grid: int
    degrees: float
    item: float
    background: int
    dog: tuple[tuple[int, float], tuple[int, float]]


_FINE, _COARSE = ((3, 1.0), (5, 3.0)), ((5, 3.0), (7, 5.0))
PAIRS: dict[str, Pair] = {
    "curvature": Pair("line", "curve", (8, 16, 32), 6, 11.3, 1.6, 0, _FINE),
    "lighting": Pair("left-right", "top-down", (1, 6, 12), 4, 6.6, 1.04, 27, ((3, 0.0), (5, 1.0))),
    "intersection": Pair("cross", "no cross", (3, 6, 9), 3, 20.5, 5.9, 255, _COARSE),
    "L and T": Pair("L", "T", (3, 6, 9), 3, 20.5, 5.9, 255, _COARSE),
    "orientation, one distractor": Pair("0 among 20", "20 among 0", (1, 4, 8, 12), 4, 11.3, 2.3, 255, _FINE),
    "orientation, many distractors": Pair("20 among many", "0 among many", (1, 4, 8, 12), 4, 11.3, 2.3, 255, _FINE),
}
TASKS = {task: pair for pair in PAIRS.values() for task in (pair.hard, pair.easy)}

_UNIT = 200 / 9.5
#: Milliseconds that people took, by task and number of items, read from the figures of the original studies.
HUMAN_MS: dict[str, tuple[float, ...]] = {
    "line": (565, 640, 750),
    "curve": (510, 516.4, 529.2),
    "left-right": (488, 600 + 2.8 * 200 / 7.5, 600 + 5.8 * 200 / 7.5),
    "top-down": (400 + 200 / 7.5, 400 + 1.2 * 200 / 7.5, 400 + 2.7 * 200 / 7.5),
    "cross": tuple(541 + 96 * n for n in (3, 6, 9)),
    "no cross": tuple(510 + 45 * n for n in (3, 6, 9)),
    "L": tuple(474 + 33 * n for n in (3, 6, 9)),
    "T": tuple(499 + 14 * n for n in (3, 6, 9)),
    "0 among 20": tuple(400 + k * _UNIT for k in (1.5, 7, 7.25, 7.5)),
    "20 among 0": tuple(400 + k * _UNIT for k in (0.7, 1.8, 1.95, 2.1)),
    "20 among many": (400 + 6 * _UNIT, 800 + 1.5 * _UNIT, 1000 + 4 * _UNIT, 1200 + 6 * _UNIT),
    "0 among many": (400 + 1.5 * _UNIT, 400 + 8 * _UNIT, 600 + 1.6 * _UNIT, 600 + 5.1 * _UNIT),
}


class Shown(NamedTuple):
    """A display: image (3, H, W) from 0 to 255, the target's picture (3, h, w), its place (H, W) and all (K, H, W)."""

    image: Tensor
    target: Tensor
    goal: Tensor
    items: Tensor


#: How much ink lies at a point, from distances outside of shapes in degrees.
Shape = Callable[[Tensor, Tensor], Tensor]


def _bar(long: float, wide: float, angle: float = 0.0, y: float = 0.0, x: float = 0.0) -> Shape:
    """A bar of which the long side is turned by ``angle`` degrees from the vertical."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))

    def far(v: Tensor, u: Tensor) -> Tensor:
        v, u = v - y, u - x
        return torch.maximum((c * v - s * u).abs() - long / 2, (s * v + c * u).abs() - wide / 2)

    return far


def _arc(radius: float, wide: float, spread: float, angle: float) -> Shape:
    """An arc of ``spread`` radians around the middle of the item."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    centre = radius * (1 + math.cos(spread / 2)) / 2

    def far(v: Tensor, u: Tensor) -> Tensor:
        v, u = c * v - s * u + centre, s * v + c * u
        along = (torch.atan2(u, v).abs() - spread / 2) * radius
        return torch.maximum((torch.hypot(v, u) - radius).abs() - wide / 2, along)

    return far


def _all(*shapes: Shape) -> Shape:
    return lambda v, u: torch.stack([shape(v, u) for shape in shapes]).amin(0)


def _four(shape: Shape) -> list[Shape]:
    """As it is, upside down, transposed, and that mirrored."""
    return [shape, lambda v, u: shape(-v, u), lambda v, u: shape(u, v), lambda v, u: shape(-u, v)]


_W = 0.55
_STROKES: dict[str, list[Shape]] = {
    "cross": _four(_all(_bar(5.5, _W), _bar(5.5, _W, 90, y=3.5 * _W - 2.75))),
    "no cross": _four(
        _all(_bar(5.5, _W), _bar(2.75, _W, 90, 3.5 * _W - 2.75, -1.375), _bar(2.75, _W, 90, 6.5 * _W - 2.75, 1.375))
    ),
    "L": _four(_all(_bar(5.5, _W, x=_W / 2 - 2.75), _bar(5.5, _W, 90, y=2.75 - _W / 2))),
    "T": _four(_all(_bar(5.5, _W), _bar(5.5, _W, 90, y=_W / 2 - 2.75))),
    "curve": [_arc(1.0, 1 / 6, 1.3, a) for a in (-45, -90, -135, 180)],
    "line": [_bar(1.2, 1 / 6 + 1 / 30, a) for a in (45, 0, -45, 90)],
}
_ANGLES = {"0": [0.0], "20": [-20.0], "many": [-80.0, -60.0, -40.0, 20.0, 40.0, 60.0, 80.0]}


def _drawn(shape: Shape, size: int, deg2px: float, ink: float, paper: float) -> Tensor:
    at = (torch.arange(size) - (size - 1) / 2) / deg2px
    far = shape(at[:, None].expand(size, size), at.expand(size, size))
    return paper + (ink - paper) * (0.5 - far * deg2px).clamp(0, 1)


def _shaded(size: int, deg2px: float, across: bool) -> Tensor:
    """A disc that is bright above (or on the left), in fifteen steps."""
    at = (torch.arange(size) - (size - 1) / 2) / deg2px
    step = 17.0 * (torch.arange(size).flip(0) * 15 // size + 1)
    inside = (0.5 - (torch.hypot(at[:, None], at) - 0.52) * deg2px).clamp(0, 1)
    disc = 27 + (step[:, None] - 27) * inside
    return disc.T if across else disc


def _kinds(task: str, deg2px: float) -> tuple[list[Tensor], list[Tensor]]:
    """Pictures of targets and of distractors."""
    pair = TASKS[task]
    size = int(pair.item * deg2px)
    if task in ("left-right", "top-down"):
        disc = _shaded(size, deg2px, task == "left-right")
        return [disc], [disc.flip(1 if task == "left-right" else 0)]
    ink = 255.0 if pair.background == 0 else 0.0
    if " among " in task:
        target, others = task.split(" among ")
        angles = _ANGLES[others] if others != "many" else [*_ANGLES["many"], *_ANGLES["20" if target == "0" else "0"]]
        shapes = [[_bar(2.0, 0.3, a) for a in found] for found in (_ANGLES[target], angles)]
    else:
        shapes = [_STROKES[task], _STROKES[pair.easy if task == pair.hard else pair.hard]]
    targets, distractors = ([_drawn(s, size, deg2px, ink, pair.background) for s in found] for found in shapes)
    return targets, distractors


def display(task: str, count: int, deg2px: float = 30, generator: torch.Generator | None = None) -> Shown:
    """A random display of a task.

    Args:
        task: of :data:`TASKS`, named by its target.
        count: items, the target among them.
        deg2px: pixels of a degree; the authors' is 30.
        generator: of places and kinds.

    Raises:
        ValueError: an unknown task, or more items than places.
    """
    check_choice("task", task, TASKS)
    pair = TASKS[task]
    check_int("count", count, least=1, most=pair.grid**2)
    targets, distractors = _kinds(task, deg2px)
    cell, size = int(pair.degrees / pair.grid * deg2px), int(pair.item * deg2px)
    side = cell * pair.grid
    image = torch.full((side, side), float(pair.background))
    items = torch.zeros(pair.grid**2, side, side, dtype=torch.bool)
    for i in range(len(items)):
        top, left = i // pair.grid * cell, i % pair.grid * cell
        items[i, top : top + cell, left : left + cell] = True

    def draw(n: int) -> int:
        return int(torch.randint(max(n, 1), (), generator=generator))

    places = torch.randperm(len(items), generator=generator)[:count].tolist()
    hidden = draw(count)
    order: list[int] = []
    while len(order) < count:  # every kind once before any comes again
        order += torch.randperm(len(distractors), generator=generator).tolist()
    target, goal = targets[0], items[places[hidden]]
    for i, place in enumerate(places):
        top, left = (n * cell + draw(cell - size) for n in divmod(place, pair.grid))
        what = distractors[order[i]]
        if i == hidden:
            target = what = targets[draw(len(targets))]
        image[top : top + size, left : left + size] = what
    return Shown(image.expand(3, -1, -1).clone(), target.expand(3, -1, -1).clone(), goal, items)
