"""Things hidden by their texture: a blob filled with the texture of its background, turned.

Inside and outside have the same colours, the same brightness and the same spectrum; only the direction of the texture
tells them apart, the less the smaller the turn. ``turn=0`` hides a thing entirely, but for the cut at its edge when
``cut`` is kept.

>>> hidden = make_hidden(0)
>>> hidden.image.shape, hidden.mask.dtype, 0.03 < float(hidden.mask.float().mean()) < 0.5
(torch.Size([3, 96, 96]), torch.bool, True)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_int, check_real
from .numbered import generator

#: Kinds of texture: how many waves, least and largest waves per picture, and how far their directions spread (radians).
TEXTURES = {"stripes": (3, 10.0, 12.0, 0.06), "weave": (8, 8.0, 13.0, 0.3), "grain": (24, 9.0, 22.0, 0.5)}


@dataclass(frozen=True)
class Hidden:
    """A picture (3, side, side) in [0, 1], the mask (side, side) of what is hidden, and what it is like.

    ``box`` is (left, top, right, bottom) in pixels, ``turn`` in radians.
    """

    image: Tensor
    mask: Tensor
    box: tuple[int, int, int, int]
    texture: str
    turn: float


def _blob(rng: np.random.Generator, side: int) -> np.ndarray:
    """A round thing with a wavy edge."""
    cy, cx = rng.uniform(0.35, 0.65, 2) * side
    radius = rng.uniform(0.16, 0.27) * side
    y, x = np.mgrid[:side, :side] + 0.5
    angle = np.arctan2(y - cy, x - cx)
    edge = np.full_like(angle, radius)
    for waves in (2, 3, 4):
        edge += radius * rng.uniform(0.0, 0.16) * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    found: np.ndarray = np.hypot(y - cy, x - cx) <= edge
    return found


def make_hidden(
    number: int, part: str = "train", side: int = 96, turn: float | None = None, cut: bool = True, noise: float = 0.03
) -> Hidden:
    """The hidden thing of a number.

    Args:
        number: of the picture.
        part: ``"train"``, ``"dev"`` or ``"test"``: other pictures.
        side: height and width.
        turn: by how much the texture inside is turned, radians; by default between 20 and 90 degrees.
        cut: the inside's waves begin elsewhere, so that the edge shows; without, and not turned, nothing is to be seen.
        noise: standard deviation.
    """
    check_int("side", side, least=32)
    check_real("noise", noise, least=0.0)
    rng = generator("camouflage", number, part)
    texture = list(TEXTURES)[rng.integers(len(TEXTURES))]
    waves, low, high, spread = TEXTURES[texture]
    drawn = float(rng.uniform(np.pi / 9, np.pi / 2) * rng.choice([-1, 1]))
    angle = drawn if turn is None else check_real("turn", turn)
    direction = rng.uniform(0, np.pi) + rng.normal(0, spread, waves)
    if texture == "weave":
        direction[::2] += np.pi / 3
    steps = rng.uniform(low, high, waves) / side * 2 * np.pi
    begins, moved = rng.uniform(0, 2 * np.pi, (2, waves))
    y, x = np.mgrid[:side, :side].astype(np.float64)

    def field(turned: float, begin: np.ndarray) -> np.ndarray:
        u, v = np.cos(direction + turned) * steps, np.sin(direction + turned) * steps
        total = np.cos(x[..., None] * u + y[..., None] * v + begin).sum(-1)
        out: np.ndarray = total / (waves / 2) ** 0.5
        return out

    mask = _blob(rng, side)
    inside = field(angle, moved if cut else begins)
    share = 0.5 + 0.5 * np.tanh(np.where(mask, inside, field(0.0, begins)))
    dark, light = rng.uniform(0.1, 0.4, 3), rng.uniform(0.5, 0.9, 3)
    image = dark[:, None, None] + (light - dark)[:, None, None] * share
    image = image + noise * rng.standard_normal(image.shape)
    rows, columns = np.nonzero(mask)
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    return Hidden(
        torch.from_numpy(np.clip(image, 0, 1).astype(np.float32)), torch.from_numpy(mask), box, texture, angle
    )  # fmt: skip
