"""Scenes of shapes with a class for every pixel: flat, or as a panorama all around that distorts them.

>>> images, labels = shape_scenes(4, (32, 48), generator=torch.Generator().manual_seed(0))
>>> images.shape, labels.shape, int(labels.max()) < len(CLASSES)
(torch.Size([4, 3, 32, 48]), torch.Size([4, 32, 48]), True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import check_flag, check_int, check_ints, check_real

#: What a pixel can be.
CLASSES = ("nothing", "disc", "ring", "square", "triangle", "cross")

#: The colour that belongs to each.
COLOURS = ((0.5, 0.5, 0.5), (1.0, 0.2, 0.2), (0.2, 0.9, 0.2), (0.2, 0.3, 1.0), (0.9, 0.9, 0.1), (0.8, 0.2, 0.9))


def _inside(kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """(B, H, W): which pixels a shape of class ``kind`` (B, 1, 1) covers, from coordinates in units of its radius."""
    far, most, least = u.square() + v.square(), torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    shapes = (
        torch.zeros_like(far, dtype=torch.bool), far <= 1, (far <= 1) & (far >= 0.36), most <= 0.85,
        (u.abs() <= (v + 1) * 0.55) & (v <= 0.8), (least <= 0.28) & (most <= 1),
    )  # fmt: skip
    return torch.stack(shapes).gather(0, kind.expand_as(far)[None])[0]


def shape_scenes(
    count: int,
    size: Sequence[int] = (64, 64),
    objects: int = 5,
    radius: tuple[float, float] = (3.0, 18.0),
    panorama: bool = False,
    noise: float = 0.1,
    tint: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Coloured shapes of all sizes, turned at random, one over the other.

    Args:
        count: scenes.
        size: height and width in pixels.
        objects: shapes per scene.
        radius: smallest and largest in pixels, spread evenly in their logarithm.
        panorama: an equirectangular picture of all around: rows are latitudes from pole to pole, columns longitudes;
            every shape is flat on the plane that touches the sphere at its middle. At the equator and for small shapes
            this is the flat scene.
        noise: standard deviation of the noise.
        tint: share of a colour that is the class's own; the rest says nothing.
        generator: of what is drawn.

    Returns:
        Images (count, 3, H, W), about 0 to 1, and classes (count, H, W), places in :data:`CLASSES`.
    """
    check_int("count", count, least=1)
    height, width = check_ints("size", tuple(size), least=1)
    check_int("objects", objects, least=0)
    check_flag("panorama", panorama)
    check_real("noise", noise, least=0)
    check_real("tint", tint, least=0, most=1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    rows, columns = torch.arange(height).view(1, -1, 1) + 0.5, torch.arange(width).view(1, 1, -1) + 0.5
    slope = draw(3, 1, 1) - 0.5
    images = 0.25 + 0.5 * draw(3, 1, 1) * 0.5 + slope * (rows / height - 0.5).unsqueeze(1).expand(1, 1, height, width)
    images = images.clone()
    labels = torch.zeros(count, height, width, dtype=torch.long)
    for _ in range(objects):
        kind = torch.randint(1, len(CLASSES), (count, 1, 1), generator=generator)
        low, high = math.log(radius[0]), math.log(radius[1])
        r = torch.exp(low + (high - low) * draw(1, 1))
        top, left = draw(1, 1) * height, draw(1, 1) * width
        angle, colour = draw(1, 1) * 2 * math.pi, draw(3, 1, 1)
        colour = (1 - tint) * colour + tint * torch.tensor(COLOURS)[kind.flatten()].view(count, 3, 1, 1)
        if panorama:
            pixel = math.pi / height
            lat, lat0 = math.pi / 2 - rows * pixel, math.pi / 2 - top * pixel
            gap = (columns - left) * (2 * math.pi / width)
            front = lat0.sin() * lat.sin() + lat0.cos() * lat.cos() * gap.cos()
            safe = front.clamp(min=1e-3)
            x = lat.cos() * gap.sin() / safe / pixel
            y = -(lat0.cos() * lat.sin() - lat0.sin() * lat.cos() * gap.cos()) / safe / pixel
        else:
            x, y = (columns - left).expand(count, height, width), (rows - top).expand(count, height, width)
            front = torch.ones(())
        u = (x * angle.cos() + y * angle.sin()) / r
        v = (-x * angle.sin() + y * angle.cos()) / r
        inside = _inside(kind, u, v) & (front > 1e-3)
        labels = torch.where(inside, kind, labels)
        images = torch.where(inside.unsqueeze(1), colour, images)
    return images + noise * torch.randn(images.shape, generator=generator), labels


def mean_iou(predicted: Tensor, labels: Tensor, classes: int = len(CLASSES)) -> float:
    """Mean intersection over union of the classes that appear, in percent."""
    flat = predicted.flatten() * classes + labels.flatten()
    table = torch.bincount(flat, minlength=classes * classes).view(classes, classes).double()
    both, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return 100 * float((both[union > 0] / union[union > 0]).mean())
