"""What is shown of a box: crops with the way back to the picture, boxes that grow and merge, a marked whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real, check_size, describe
from ..pixels import Box, Picture, check_box, colour, cut, outline, resize, to_picture, to_square

COLOURS = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "green": (0.0, 0.5, 0.0), "yellow": (1.0, 1.0, 0.0)}


@dataclass(frozen=True)
class Crop:
    """Pixels of a box, perhaps at another size, and the way back to the picture.

    Args:
        box: (x1, y1, x2, y2) in the picture.
        image: (h, w, 3).
    """

    box: Box
    image: Picture

    def _scale(self) -> Tensor:
        x1, y1, x2, y2 = self.box
        height, width = self.image.shape[:2]
        return torch.tensor([(x2 - x1) / width, (y2 - y1) / height], dtype=torch.float64)

    def to_picture(self, points: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Points (..., 2) or boxes (..., 4) of the crop, in pixels of the picture, float64."""
        points = _points(points)
        scale, corner = self._scale(), torch.tensor(self.box[:2], dtype=torch.float64)
        return (points.unflatten(-1, (-1, 2)) * scale + corner).flatten(-2)

    def from_picture(self, points: Tensor | Sequence[Sequence[float]]) -> Tensor:
        """Points (..., 2) or boxes (..., 4) of the picture, in pixels of the crop, float64."""
        points = _points(points)
        scale, corner = self._scale(), torch.tensor(self.box[:2], dtype=torch.float64)
        return ((points.unflatten(-1, (-1, 2)) - corner) / scale).flatten(-2)


def _points(points: Tensor | Sequence[Sequence[float]]) -> Tensor:
    found = torch.as_tensor(points, dtype=torch.float64)
    if found.ndim < 1 or found.shape[-1] not in (2, 4):
        raise ValueError(f"points must be (..., 2) points or (..., 4) boxes in pixels, got shape {tuple(found.shape)}")
    return found


def crop(image: object, box: Sequence[int], size: tuple[int, int] | None = None) -> Crop:
    """The crop of a box, resized to ``size`` (H, W) where it is given.

    >>> crop(torch.zeros(8, 8, 3), (2, 2, 6, 6), (8, 8)).to_picture([[4.0, 0.0]]).tolist()
    [[4.0, 2.0]]
    """
    picture = to_picture(image)
    box = check_box("box", box, (picture.shape[0], picture.shape[1]))
    found = cut(picture, box)
    return Crop(box, found if size is None else resize(found, check_size("size", size)))


def grown(box: Box, size: tuple[int, int], least: int, scale: float | None = None) -> Box:
    """A box with its surroundings: at least ``least`` wide and high, times ``scale``, kept in the picture.

    Args:
        box: (x1, y1, x2, y2).
        size: (H, W) of the picture.
        least: smallest side, where the picture is that large.
        scale: how much more is shown; ``None`` for no more.

    The middle stays where the picture allows it; at the right and bottom the box is cut off, as the authors do.

    >>> grown((0, 0, 4, 4), (16, 16), 8)
    (0, 0, 8, 8)
    """
    check_int("least", least, least=1)
    sides = []
    for low, high, end in ((box[0], box[2], size[1]), (box[1], box[3], size[0])):
        length = max(high - low, least)
        if scale is not None:
            length = int(length * check_real("scale", scale, above=0))
        start = max(0, int(low + (high - low) / 2) - length // 2)
        sides.append((start, min(start + length, end)))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def union(boxes: Sequence[Sequence[int]]) -> Box:
    """The smallest box around boxes."""
    if not len(boxes):
        raise ValueError("boxes must hold a box, got none")
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def merged(boxes: Sequence[Box], near: int = 50) -> list[Box]:
    """Boxes that come within ``2 * near`` pixels of each other become one, until none do.

    >>> merged([(0, 0, 10, 10), (20, 0, 30, 10), (500, 0, 510, 10)])
    [(0, 0, 30, 10), (500, 0, 510, 10)]
    """
    check_int("near", near, least=0)
    found, changed = list(boxes), True
    while changed:
        changed, new, used = False, [], set()
        for i, a in enumerate(found):
            if i in used:
                continue
            for j, b in enumerate(found):
                if j in used or i == j:
                    continue
                if all(
                    min(a[k + 2], b[k + 2]) + near > max(a[k], b[k]) - near for k in (0, 1)
                ):  # fmt: skip
                    new.append(union([a, b]))
                    used |= {i, j}
                    changed = True
                    break
            if i not in used:
                new.append(a)
        found = new
    return found


class Views:
    """The pictures that a model is shown for some boxes.

    Args:
        leaf: side of the pictures that the model reads.
        kind: ``"global-local"``: the whole with the boxes marked, and what lies around them at full resolution;
            ``"local"``: only the latter.
        scale: how much more than a box is shown, see :func:`grown`.
        canvas: the whole as a ``"square"`` with borders, or at its ``"own"`` shape, then with ``leaf`` pixels on the
            longer side.
        background: colour of the borders.
        apart: of ``"local"``: two places further apart than this are shown side by side instead of all between them.
        near: places nearer than twice this become one.
    """

    def __init__(
        self,
        leaf: int,
        kind: str = "global-local",
        scale: float | None = 1.2,
        canvas: str = "square",
        background: Sequence[float] = (0.5, 0.5, 0.5),
        apart: int = 1000,
        near: int = 50,
    ):
        check_choice("view", kind, ("global-local", "local"))
        check_choice("canvas", canvas, ("square", "own"))
        self.leaf, self.kind, self.scale, self.canvas = check_int("leaf", leaf, least=2), kind, scale, canvas
        self.background = tuple(background)
        self.apart, self.near = check_int("apart", apart, least=1), check_int("near", near, least=0)

    def small(self, picture: Picture) -> Picture:
        """The whole picture at the size that the model reads."""
        if self.canvas == "square":
            return resize(to_square(picture, self.background)[0], (self.leaf, self.leaf))
        height, width = picture.shape[:2]
        if width > height:
            return resize(picture, (max(int(height * self.leaf / width), 1), self.leaf))
        return resize(picture, (self.leaf, max(int(width * self.leaf / height), 1)))

    def whole(self, picture: Picture, full: bool = True) -> tuple[Picture, ...]:
        """The picture without a mark: as it is (``full``), or small."""
        if self.kind == "global-local":
            return (picture,) if full else (self.small(picture),)
        return (resize(to_square(picture, self.background)[0], (self.leaf, self.leaf)),)

    def __call__(self, picture: Picture, boxes: Sequence[Box], mark: str = "red") -> tuple[Picture, ...]:
        """One picture, or the whole and the zoomed view, for boxes of which none is the whole."""
        if mark not in COLOURS:
            raise ValueError(f"mark must be one of {sorted(COLOURS)}, got {describe(mark)}")
        size = (picture.shape[0], picture.shape[1])
        places = merged([grown(box, size, self.leaf, self.scale) for box in boxes], self.near)
        square, left, top = to_square(picture, self.background)
        places = [(x1 + left, y1 + top, x2 + left, y2 + top) for x1, y1, x2, y2 in places]
        side = square.shape[0]
        if self.kind == "local":
            around = union(places)
            if len(places) == 2 and max(around[2] - around[0], around[3] - around[1]) > self.apart:
                return (self._beside(square, *sorted(places, key=lambda b: b[0])),)
            return (cut(square, around),)
        thickness = side // 120
        shown = []
        for x1, y1, x2, y2 in places:
            around = (
                max(0, x1 - thickness), max(0, y1 - thickness), min(side, x2 + thickness), min(side, y2 + thickness)
            )  # fmt: skip
            square = outline(square, around, COLOURS[mark], thickness)
            shown.append(around)
        view = cut(square, union(shown))
        if self.canvas == "own":
            return self.small(square[top : top + size[0], left : left + size[1]]), view
        return resize(square, (self.leaf, self.leaf)), view

    def _beside(self, square: Picture, first: Box, second: Box) -> Picture:
        """Two places side by side on a plain ground, as much higher or lower as they are, at most ``leaf``."""
        leaf = self.leaf
        ground = np.empty((2 * leaf, 2 * leaf, 3), square.dtype)
        ground[:] = colour(square, self.background)
        shift = (second[3] + second[1]) // 2 - (first[3] + first[1]) // 2
        shift = max(-leaf, min(leaf, shift))
        for place, x, y in ((first, 0, leaf // 2 - shift // 2), (second, leaf, leaf // 2 + shift // 2)):
            part = resize(cut(square, place), (leaf, leaf))
            start, stop = max(y, 0), min(y + leaf, 2 * leaf)
            ground[start:stop, x : x + leaf] = part[start - y : stop - y]
        return ground
