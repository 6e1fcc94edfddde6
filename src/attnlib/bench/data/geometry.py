"""Planar problems whose answers are sequences of input points: convex hulls, Delaunay triangulations, shortest tours.

SciPy gives hulls and triangulations, exact dynamic programming (Held and Karp) the tours. Answers are index tensors,
-1 after the end, in the order that pointer networks learn (Vinyals et al., 2015, arXiv 1506.03134, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...types import check_choice, check_rank
from .files import require

#: Longest tours solved exactly: time and memory double with every city.
MAX_CITIES = 14
#: Memory that tables of partial tours may take.
TABLE_BYTES = 1 << 27


class Problems(NamedTuple):
    """Points (B, N, 2) in the unit square and their answers (B, L), -1 after the end (at least one, except tours)."""

    points: Tensor
    answers: Tensor


def _pad(rows: list[list[int]], width: int | None = None) -> Tensor:
    longest = max((len(r) for r in rows), default=0) + 1
    width = longest if width is None else max(width, longest)
    return torch.tensor([r + [-1] * (width - len(r)) for r in rows], dtype=torch.long)


def _points(count: int, n: int, fewest: int, generator: torch.Generator | None, ordered: bool) -> Tensor:
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if n < fewest:
        raise ValueError(f"n={n} points are too few; at least {fewest} are needed")
    points = torch.rand(count, n, 2, generator=generator)
    if ordered:
        points = points.gather(1, points[..., :1].argsort(1).expand(-1, -1, 2))
    return points


def hull_of(points: Tensor) -> list[int]:
    """Indices of the convex hull of ``points`` (N, 2), counter-clockwise, the lowest index first. Needs SciPy.

    >>> hull_of(torch.tensor([[0.5, 0.5], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    [1, 2, 3, 4]
    """
    ring = require("scipy.spatial").ConvexHull(points.double().numpy()).vertices.tolist()  # counter-clockwise in 2-D
    first = ring.index(min(ring))
    return ring[first:] + ring[:first]


def triangles_of(points: Tensor) -> list[tuple[int, ...]]:
    """Triangles of the Delaunay triangulation of ``points`` (N, 2): sorted indices, by coordinates of the incentre.

    >>> triangles_of(torch.tensor([[0.0, 0.0], [1.0, 0.1], [1.1, 1.0], [0.1, 0.9]]))
    [(0, 1, 3), (1, 2, 3)]
    """
    xy = points.double().numpy()
    found = np.sort(require("scipy.spatial").Delaunay(xy).simplices, 1)
    corners = xy[found]  # (T, 3, 2)
    opposite = np.linalg.norm(corners[:, [1, 2, 0]] - corners[:, [2, 0, 1]], axis=-1)
    incentre = (opposite[..., None] * corners).sum(1) / opposite.sum(1, keepdims=True)
    order = np.lexsort((incentre[:, 1], incentre[:, 0]))
    return [tuple(int(i) for i in found[t]) for t in order]


def shortest_tours(points: Tensor) -> tuple[Tensor, Tensor]:
    """Exact shortest tours by dynamic programming over sets of cities (Held and Karp, 1962), a batch at once.

    Args:
        points: (B, N, 2) with ``N`` up to :data:`MAX_CITIES`.

    Returns:
        (B, N) tours that start at point 0 and go round counter-clockwise (positive enclosed area), and (B,) lengths.

    Raises:
        ValueError: too many cities.

    >>> shortest_tours(torch.tensor([[[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]]))
    (tensor([[0, 2, 1, 3]]), tensor([4.]))
    """
    check_rank("points", points, 3, "(B, N, 2)")
    batch, n = points.shape[:2]
    if not 1 <= n <= MAX_CITIES:
        raise ValueError(f"points has {n} cities; exact tours are possible for 1 to {MAX_CITIES}")
    most = max(1, TABLE_BYTES // ((9 * n) << n))
    if batch > most:
        parts = [shortest_tours(part) for part in points.split(most)]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    xy = points.double().numpy()
    far = np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1)
    if n <= 3:
        tours = np.tile(np.arange(n), (batch, 1))
    else:
        m = n - 1  # city 0 is the start; the others are bits 0 .. m-1
        between = far[:, 1:, 1:]
        cost = np.full((batch, 1 << m, m), np.inf)  # shortest path from 0 through the set that ends in the last city
        came = np.zeros((batch, 1 << m, m), dtype=np.int8)
        for j in range(m):
            cost[:, 1 << j, j] = far[:, 0, j + 1]
        for cities in range(1, 1 << m):
            if cities & (cities - 1) == 0:
                continue
            for j in range(m):
                if cities >> j & 1:
                    paths = cost[:, cities ^ (1 << j)] + between[:, :, j]
                    came[:, cities, j] = best = paths.argmin(1)
                    cost[:, cities, j] = paths[np.arange(batch), best]
        rows = np.arange(batch)
        left = np.full(batch, (1 << m) - 1)
        last = (cost[:, -1] + far[:, 1:, 0]).argmin(1)
        back = []
        for _ in range(m):
            back.append(last + 1)
            left, last = left ^ (1 << last), came[rows, left, last].astype(np.int64)
        tours = np.stack([np.zeros(batch, dtype=np.int64), *back[::-1]], 1)
    found = torch.from_numpy(tours.astype(np.int64))
    clockwise = polygon_area(points, found) < 0
    turned = torch.cat([found[:, :1], found[:, 1:].flip(1)], 1)
    found = torch.where(clockwise[:, None], turned, found)
    return found, tour_length(points, found)


def convex_hulls(count: int, n: int, generator: torch.Generator | None = None, ordered: bool = False) -> Problems:
    """Convex hulls of ``n`` uniform points."""
    points = _points(count, n, 3, generator, ordered)
    return Problems(points, _pad([hull_of(p) for p in points]))


def triangulations(count: int, n: int, generator: torch.Generator | None = None, ordered: bool = False) -> Problems:
    """Delaunay triangulations of ``n`` uniform points, three indices per triangle."""
    points = _points(count, n, 3, generator, ordered)
    return Problems(points, _pad([[i for t in triangles_of(p) for i in t] for p in points]))


def tours(count: int, n: int, generator: torch.Generator | None = None, ordered: bool = False) -> Problems:
    """Shortest tours through ``n`` uniform points; answers have no end mark, for all have ``n`` cities."""
    points = _points(count, n, 2, generator, ordered)
    return Problems(points, shortest_tours(points)[0])


#: Makers of problems by name.
TASKS: dict[str, Callable[..., Problems]] = {"hull": convex_hulls, "delaunay": triangulations, "tsp": tours}


def problems(task: str, count: int, n: int, seed: int = 0, ordered: bool = False) -> Problems:
    """``count`` problems of one task with ``n`` points each.

    The paper's points come in random order. ``ordered`` ones come from left to right, which says nothing that the
    points do not say, and is learnt much faster.

    >>> problems("tsp", 3, 5).answers.shape
    torch.Size([3, 5])
    """
    check_choice("task", task, TASKS)
    return TASKS[task](count, n, torch.Generator().manual_seed(seed), ordered)


# --------------------------------------------------------------------------------------------------------------------
# Measures


def _at(points: Tensor, answers: Tensor) -> Tensor:
    return points.gather(1, answers.clamp(min=0).unsqueeze(-1).expand(-1, -1, 2))


def polygon_area(points: Tensor, answers: Tensor) -> Tensor:
    """(B,) signed areas of the polygons ``answers`` (B, L), -1 after the end; positive when counter-clockwise."""
    corners, real = _at(points, answers), answers >= 0
    corners = torch.where(real.unsqueeze(-1), corners, corners[:, :1])  # back at the first corner: no area
    x, y = corners.unbind(-1)
    return 0.5 * (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1)


def tour_length(points: Tensor, answers: Tensor) -> Tensor:
    """(B,) lengths of the closed tours ``answers`` (B, L), -1 after the end."""
    corners, real = _at(points, answers), answers >= 0
    corners = torch.where(real.unsqueeze(-1), corners, corners[:, :1])
    return (corners - corners.roll(-1, 1)).norm(dim=-1).sum(1)


def same_ring(a: list[int], b: list[int]) -> bool:
    """Whether two rings are the same up to where they start.

    >>> same_ring([1, 4, 2], [2, 1, 4]), same_ring([1, 2, 4], [2, 1, 4])
    (True, False)
    """
    if len(a) != len(b) or set(a) != set(b):
        return False
    if not a:
        return True
    at = b.index(a[0])
    return a == b[at:] + b[:at]


def _cross(o: Tensor, a: Tensor, b: Tensor) -> float:
    return float((a[0] - o[0]) * (b[1] - o[1]) - (a[1] - o[1]) * (b[0] - o[0]))


def is_simple(corners: Tensor) -> bool:
    """Whether a polygon (L, 2) has three corners or more and no two edges that cross.

    >>> square = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    >>> is_simple(square), is_simple(square[[0, 2, 1, 3]])
    (True, False)
    """
    n = len(corners)
    if n < 3 or len({tuple(c) for c in corners.tolist()}) < n:
        return False
    for i in range(n):
        a, b = corners[i], corners[(i + 1) % n]
        for j in range(i + 2, n - (i == 0)):
            c, d = corners[j], corners[(j + 1) % n]
            if _cross(a, b, c) * _cross(a, b, d) < 0 and _cross(c, d, a) * _cross(c, d, b) < 0:
                return False
    return True


def _until_end(row: Tensor) -> list[int]:
    found = row.tolist()
    return found[: found.index(-1)] if -1 in found else found


def score(task: str, given: Problems, found: Tensor) -> dict[str, float]:
    """The paper's measures, averaged over problems.

    Args:
        task: ``"hull"``: ``accuracy`` (the same ring), ``area`` (of simple polygons, over the true area) and
            ``failed`` (fraction that are no simple polygons; the paper reports FAIL above 1 %). ``"delaunay"``:
            ``accuracy`` (the same set of triangles) and ``coverage`` (true triangles found). ``"tsp"``: ``length``,
            ``optimal`` (both mean lengths), ``ratio`` of the two and ``accuracy`` (as short as the shortest).
        given: problems with true answers.
        found: (B, L') answers to judge.
    """
    check_choice("task", task, TASKS)
    points, answers = given
    if task == "tsp":
        if found.shape != answers.shape or not bool((found.sort(1).values == torch.arange(answers.shape[1])).all()):
            raise ValueError("found holds something that is no tour: every city must stand in it once")
        length, optimal = tour_length(points, found), tour_length(points, answers)
        return {
            "length": float(length.mean()),
            "optimal": float(optimal.mean()),
            "ratio": float(length.mean() / optimal.mean()),
            "accuracy": float((length <= optimal * (1 + 1e-5)).float().mean()),
        }
    pairs = [(_until_end(a), _until_end(b)) for a, b in zip(found, answers, strict=True)]
    if task == "hull":
        simple = torch.tensor([is_simple(p[a]) for p, (a, _) in zip(points, pairs, strict=True)])
        covered = polygon_area(points, found).abs() / polygon_area(points, answers)
        return {
            "accuracy": sum(same_ring(a, b) for a, b in pairs) / len(pairs),
            "area": float(covered[simple].mean()) if bool(simple.any()) else 0.0,
            "failed": 1.0 - float(simple.float().mean()),
        }
    right, coverage = 0, 0.0
    for a, b in pairs:
        mine = {tuple(sorted(a[i : i + 3])) for i in range(0, len(a) - 2, 3)}
        true = {tuple(b[i : i + 3]) for i in range(0, len(b), 3)}
        right += mine == true
        coverage += len(mine & true) / len(true)
    return {"accuracy": right / len(pairs), "coverage": coverage / len(pairs)}


def nearest_neighbour_tours(points: Tensor) -> Tensor:
    """(B, N) tours that always go to the nearest city left: what a learned tour should beat."""
    batch, n = points.shape[:2]
    far = torch.cdist(points, points)
    rows, now = torch.arange(batch), torch.zeros(batch, dtype=torch.long)
    left = torch.ones(batch, n, dtype=torch.bool)
    out = [now]
    for _ in range(n - 1):
        left = left.scatter(1, now[:, None], False)
        now = far[rows, now].masked_fill(~left, float("inf")).argmin(1)
        out.append(now)
    return torch.stack(out, 1)
