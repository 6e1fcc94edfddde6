"""Line drawings whose junctions and boundaries are known: triangles and quadrangles that cross, and lines that end on
their sides.

A junction is where lines meet: ``"L"`` a corner of two, ``"T"`` a line that ends on another, ``"X"`` two that cross.

>>> drawing = make_drawing(0)
>>> drawing.image.shape, {j.kind for j in drawing.junctions} <= set(JUNCTIONS)
(torch.Size([3, 96, 96]), True)
>>> int(drawing.image[0, drawing.boundary].lt(0.6).sum()) == int(drawing.boundary.sum())
True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int, check_real
from .numbered import generator

JUNCTIONS = ("L", "T", "X")
SHAPES = ("triangle", "quadrangle")
_THICK, _APART = 1.0, 5.0


@dataclass(frozen=True)
class Junction:
    """Where lines meet: pixels from the top left, and how they do."""

    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Polygon:
    """A closed figure: its name and its corners (n, 2), (x, y) in pixels, in turn."""

    name: str
    corners: tuple[tuple[float, float], ...]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom."""
        xs, ys = zip(*self.corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class Drawing:
    """A picture (3, side, side) in [0, 1], dark lines on light ground, and all that is in it.

    ``lines`` are (x0, y0, x1, y1), sides of figures first; ``boundary`` (side, side) is true within half a line's
    thickness of a line.
    """

    image: Tensor
    polygons: tuple[Polygon, ...]
    lines: tuple[tuple[float, float, float, float], ...]
    junctions: tuple[Junction, ...]
    boundary: Tensor

    def heat(self, kind: str, sigma: float = 1.5) -> Tensor:
        """(side, side) in [0, 1], highest at the junctions of a kind."""
        check_real("sigma", sigma, above=0.0)
        if kind not in JUNCTIONS:
            raise ValueError(f"kind must be one of {', '.join(JUNCTIONS)}, got {kind!r}")
        side = self.boundary.shape[0]
        y, x = torch.meshgrid(torch.arange(side) + 0.5, torch.arange(side) + 0.5, indexing="ij")
        out = torch.zeros(side, side)
        for j in self.junctions:
            if j.kind == kind:
                out = torch.maximum(out, torch.exp(-((x - j.x) ** 2 + (y - j.y) ** 2) / (2 * sigma**2)))
        return out


def _meet(a: np.ndarray, b: np.ndarray) -> tuple[float, float] | None:
    """How far along each of two lines (4,) they cross, as shares; none where they do not."""
    d, e, f = a[2:] - a[:2], b[2:] - b[:2], b[:2] - a[:2]
    cross = d[0] * e[1] - d[1] * e[0]
    if abs(cross) < 1e-9:
        return None
    t, s = (f[0] * e[1] - f[1] * e[0]) / cross, (f[0] * d[1] - f[1] * d[0]) / cross
    return (float(t), float(s)) if 0 <= t <= 1 and 0 <= s <= 1 else None


def _figure(rng: np.random.Generator, side: int) -> Polygon:
    corners = int(rng.integers(3, 5))
    radius = rng.uniform(0.15, 0.28) * side
    centre = rng.uniform(radius + 3, side - radius - 3, 2)
    angles = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.22, 0.22, corners)) / corners + rng.uniform(0, 2 * np.pi)
    points = centre + radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    return Polygon(SHAPES[corners - 3], tuple((float(x), float(y)) for x, y in points))


def _sides(polygon: Polygon) -> list[np.ndarray]:
    ends = [*polygon.corners[1:], polygon.corners[0]]
    return [np.array([*a, *b]) for a, b in zip(polygon.corners, ends, strict=True)]


def _junctions(polygons: list[Polygon], sides: list[np.ndarray], tails: list[np.ndarray]) -> list[Junction]:
    found = [Junction(x, y, "L") for polygon in polygons for x, y in polygon.corners]
    lines = [*sides, *tails]
    owner = [i for i, polygon in enumerate(polygons) for _ in polygon.corners] + [-1 - i for i in range(len(tails))]
    found += [Junction(float(tail[0]), float(tail[1]), "T") for tail in tails]
    for i in range(len(lines)):
        for j in range(i):
            met = _meet(lines[j], lines[i]) if owner[i] != owner[j] else None
            if met is not None and (i < len(sides) or met[1] > 1e-6):  # not where a tail begins
                at = lines[j][:2] + met[0] * (lines[j][2:] - lines[j][:2])
                found.append(Junction(float(at[0]), float(at[1]), "X"))
    return found


def make_drawing(number: int, part: str = "train", side: int = 96, noise: float = 0.04) -> Drawing:
    """The drawing of a number: one to three figures and up to two lines that end on a side.

    Args:
        number: of the drawing.
        part: ``"train"``, ``"dev"`` or ``"test"``: other drawings.
        side: height and width.
        noise: standard deviation.

    Junctions lie some pixels apart; there are L in every drawing, T and X in most.
    """
    check_int("side", side, least=64)
    check_real("noise", noise, least=0.0)
    rng = generator("geometry", number, part)
    figures, ends = int(rng.integers(1, 4)), int(rng.integers(0, 3))
    while True:
        polygons = [_figure(rng, side) for _ in range(figures)]
        sides = [line for polygon in polygons for line in _sides(polygon)]
        tails = []
        for _ in range(ends):
            on = sides[rng.integers(len(sides))]
            begin = on[:2] + rng.uniform(0.25, 0.75) * (on[2:] - on[:2])
            across = np.array([on[3] - on[1], on[0] - on[2]]) * rng.choice([-1, 1])
            end = begin + across / np.hypot(*across) * rng.uniform(0.12, 0.25) * side
            tails.append(np.array([*begin, *end]))
        junctions = _junctions(polygons, sides, tails)
        free = np.array([tail[2:] for tail in tails]).reshape(-1, 2)
        points = np.concatenate([np.array([[j.x, j.y] for j in junctions]), free])
        gaps = np.hypot(*(points[:, None] - points[None]).transpose(2, 0, 1)) + 1e3 * np.eye(len(points))
        if gaps.min() > _APART and points.min() > 2 and points.max() < side - 2 and _clear_of(junctions, sides, tails):
            break
    y, x = np.mgrid[:side, :side] + 0.5
    away = np.full((side, side), 1e3)
    for line in (*sides, *tails):
        d = line[2:] - line[:2]
        t = np.clip(((x - line[0]) * d[0] + (y - line[1]) * d[1]) / (d @ d), 0, 1)
        away = np.minimum(away, np.hypot(x - line[0] - t * d[0], y - line[1] - t * d[1]))
    ink = np.clip(_THICK + 0.5 - away, 0, 1)
    light, dark = rng.uniform(0.8, 0.95, 3), rng.uniform(0.05, 0.3, 3)
    image = light[:, None, None] + (dark - light)[:, None, None] * ink
    image = np.clip(image + noise * rng.standard_normal(image.shape), 0, 1)
    lines = [(float(a), float(b), float(c), float(d)) for a, b, c, d in (*sides, *tails)]
    return Drawing(
        torch.from_numpy(image.astype(np.float32)), tuple(polygons), tuple(lines), tuple(junctions),
        torch.from_numpy(away <= _THICK / 2),
    )  # fmt: skip


def _clear_of(junctions: list[Junction], sides: list[np.ndarray], tails: list[np.ndarray]) -> bool:
    """No corner or free end lies on another line by chance, where it could not be told what it is."""
    ends = [np.array([j.x, j.y]) for j in junctions if j.kind == "L"] + [tail[2:] for tail in tails]
    for end in ends:
        for line in (*sides, *tails):
            d = line[2:] - line[:2]
            t = float(np.clip((end - line[:2]) @ d / (d @ d), 0, 1))
            gap = float(np.hypot(*(end - line[:2] - t * d)))
            own = min(np.hypot(*(end - line[:2])), np.hypot(*(end - line[2:]))) < 1e-6
            if not own and gap < _APART / 2:
                return False
    return True
