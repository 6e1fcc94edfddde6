"""Paths of gaze over objects: what people did, and how alike two paths are."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_axes, check_float, check_int, check_real, describe


def path_of(path: Tensor | Sequence[int], name: str = "path") -> list[int]:
    """A path as plain numbers; those behind the first below zero are padding."""
    if not isinstance(path, (Tensor, Sequence)):
        raise TypeError(f"{name} must hold whole numbers, one a fixation, got {describe(path)}")
    numbers = path.tolist() if isinstance(path, Tensor) else list(path)
    if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise TypeError(f"{name} must hold whole numbers, one a fixation, got {describe(path)}")
    end = next((i for i, n in enumerate(numbers) if n < 0), len(numbers))
    if any(n >= 0 for n in numbers[end:]):
        raise ValueError(f"{name} goes on behind its end, which a number below zero marks: {numbers}")
    return numbers[:end]


class Behaviour(NamedTuple):
    """Of one path: ``search + refixation + revisit == length``.

    Args:
        found: whether it ends on the object that was sought.
        length: fixations.
        search: first of a visit to an object that is new.
        refixation: on the object that was fixated just before.
        revisit: first of a visit to an object that was left before.
    """

    found: int
    length: int
    search: int
    refixation: int
    revisit: int


def behaviour(path: Tensor | Sequence[int], sought: int) -> Behaviour:
    """What a path does.

    >>> behaviour([3, 3, 5, 3, 7], sought=7)
    Behaviour(found=1, length=5, search=3, refixation=1, revisit=1)
    """
    numbers, seen = path_of(path), set()
    search = again = stay = 0
    for thing, visit in groupby(numbers):
        stay += len(list(visit)) - 1
        again, search = again + (thing in seen), search + (thing not in seen)
        seen.add(thing)
    found = int(bool(numbers) and numbers[-1] == check_int("sought", sought))
    return Behaviour(found, len(numbers), search, stay, again)


def behaviour_rates(paths: Iterable[Tensor | Sequence[int]], sought: Iterable[int]) -> Tensor:
    """(5,) means over paths: found, length, and the shares of search, refixations and revisits in a path.

    Raises:
        ValueError: no path, one without a fixation, or not as many objects sought as paths.
    """
    rows: list[list[float]] = []
    paths, sought = list(paths), list(sought)
    if len(paths) != len(sought):
        raise ValueError(f"sought must be one object for each of {len(paths)} paths, got {len(sought)}")
    for path, thing in zip(paths, sought, strict=True):
        b = behaviour(path, int(thing))
        if not b.length:
            raise ValueError(f"paths must hold a fixation each, but number {len(rows)} has none")
        rows.append([b.found, b.length, *(part / b.length for part in b[2:])])
    if not rows:
        raise ValueError("paths must hold at least one path, got none")
    return torch.tensor(rows, dtype=torch.float64).mean(0)


def behaviour_gap(model: Tensor, people: Tensor) -> float:
    """Mean of ``|model - people| / people`` over the rates of :func:`behaviour_rates` that people show.

    >>> behaviour_gap(torch.tensor([0.5, 6, 0.8, 0.1, 0.1]), torch.tensor([1.0, 6, 0.8, 0.1, 0.1]))
    0.1
    """
    for name, rates in (("model", model), ("people", people)):
        check_float(name, rates)
        check_axes(name, rates, rates=5)
        if not bool((rates.isfinite() & (rates >= 0)).all()):
            raise ValueError(f"{name} must hold finite rates of 0 or more, got {rates.tolist()}")
    model, people = model.double(), people.double()
    shown = people > 0
    if not bool(shown.any()):
        raise ValueError("people must show something: all rates are 0")
    return float(((model - people).abs()[shown] / people[shown]).mean())


def sequence_score(one: Tensor | Sequence[int], other: Tensor | Sequence[int], gap: float = 0.0) -> float:
    """Needleman and Wunsch's score over the length of the longer path: 1 for every match, ``gap`` for what is left out.

    >>> sequence_score([1, 2, 3], [1, 3])
    0.6666666666666666
    """
    a, b = path_of(one, "one"), path_of(other, "other")
    if not a and not b:
        raise ValueError("one and other are both empty: there is nothing to compare")
    check_real("gap", gap)
    before = [gap * j for j in range(len(b) + 1)]
    for i, x in enumerate(a, 1):
        row = [gap * i]
        for j, y in enumerate(b, 1):
            row.append(max(before[j - 1] + (x == y), before[j] + gap, row[j - 1] + gap))
        before = row
    return before[-1] / max(len(a), len(b))


def edit_distance(one: Tensor | Sequence[int], other: Tensor | Sequence[int]) -> int:
    """Fixations to insert, leave out or replace until the paths agree (the string edit distance, SED).

    >>> edit_distance([1, 2, 3], [1, 3])
    1
    """
    a, b = path_of(one, "one"), path_of(other, "other")
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j - 1] + (x != y), before[j] + 1, row[j - 1] + 1))
        before = row
    return before[-1]


class MultiMatch(NamedTuple):
    """How alike two paths are, 1 for the same: in shape, direction, length of saccades, and where they begin."""

    vector: float
    direction: float
    length: float
    position: float


def multimatch(one: Tensor, other: Tensor, size: Sequence[float]) -> MultiMatch:
    """MultiMatch without durations and without simplifying (Jarodzka et al., 2010; Dewhurst et al., 2012).

    Saccades of both paths are brought together by the cheapest way through the table of their differences, one step
    along one of the paths or both at a time; of ways that cost the same, the one Dijkstra's algorithm finds first.

    Args:
        one, other: (N, 2) x and y of fixations, three at least.
        size: width and height of what is looked at, in the same units.

    Raises:
        ValueError: fewer than three fixations, no size.

    >>> path = torch.tensor([[0.0, 0.0], [2.0, 1.0], [2.0, 3.0]])
    >>> multimatch(path, path, (4, 4))
    MultiMatch(vector=1.0, direction=1.0, length=1.0, position=1.0)
    """
    if not isinstance(size, Sequence) or len(size) != 2 or not all(s > 0 for s in size):
        raise ValueError(f"size must be a width and a height above 0, got {describe(size)}")
    for name, path in (("one", one), ("other", other)):
        check_axes(name, path, N=None, xy=2)
        if not bool(path.isfinite().all()):
            raise ValueError(f"{name} must hold finite places, got {path.tolist()}")
        if len(path) < 3:
            raise ValueError(f"{name} has {len(path)} fixations; MultiMatch compares paths of three at least")
    a, b = one.double().cpu(), other.double().cpu()
    steps = [p[1:] - p[:-1] for p in (a, b)]
    apart = torch.cdist(steps[0], steps[1], compute_mode="donot_use_mm_for_euclid_dist")
    rows, cols = _cheapest(apart.tolist())
    angles = [torch.atan2(s[:, 1], s[:, 0]) for s in steps]
    turn = (angles[0][rows] - angles[1][cols]).abs()
    turn = torch.minimum(turn, 2 * math.pi - turn)
    lengths = [s.norm(dim=1) for s in steps]
    diagonal = math.hypot(*size)
    differences = (
        (apart[rows, cols], 2 * diagonal),
        (turn, math.pi),
        ((lengths[0][rows] - lengths[1][cols]).abs(), diagonal),
        ((a[rows] - b[cols]).norm(dim=1), diagonal),
    )
    return MultiMatch(*(1 - float(d.quantile(0.5)) / most for d, most in differences))


def _cheapest(cost: list[list[float]]) -> tuple[list[int], list[int]]:
    """From the first cell of a table to the last, right, down or both: the cells entered cost least in sum."""
    height, width = len(cost), len(cost[0])
    best, came, done = {(0, 0): 0.0}, {}, set()
    queue = [(0.0, (0, 0))]
    while queue:
        so_far, cell = heapq.heappop(queue)
        if cell in done:
            continue
        done.add(cell)
        i, j = cell
        for x, y in ((i, j + 1), (i + 1, j), (i + 1, j + 1)):
            if x < height and y < width and so_far + cost[x][y] < best.get((x, y), math.inf):
                best[x, y], came[x, y] = so_far + cost[x][y], cell
                heapq.heappush(queue, (best[x, y], (x, y)))
    way = [(height - 1, width - 1)]
    while way[-1] != (0, 0):
        way.append(came[way[-1]])
    return [i for i, _ in reversed(way)], [j for _, j in reversed(way)]
