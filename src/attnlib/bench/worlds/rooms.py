"""Rooms with coloured boxes on the floor, seen by a camera: pictures, depth, masks, and clouds of coloured points.

The camera stands at the origin and looks along z; x goes right, y down, lengths are metres. Rays are cast, so depth,
normals and masks are exact. A room may be larger in all but the tiles of its floor, which alone tell how large it is.

>>> room = make_room(0)
>>> room.image.shape, room.depth.shape, float(room.depth.min()) > 0
(torch.Size([3, 64, 64]), torch.Size([64, 64]), True)
>>> cloud(room, 100).shape
torch.Size([100, 6])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...checks import check_choice, check_int, check_real
from .numbered import generator
from .painter import COLOURS

#: Half the width of the room, height of the camera above the floor and of the ceiling above the camera.
HALF, FLOOR, CEILING = 2.0, 1.2, 1.3
_FACES = {"x": 0.75, "y": 1.0, "z": 0.88}  # how light a face is that looks along an axis


@dataclass(frozen=True)
class Box:
    """A box on the floor: its colour's name, lowest and highest corner (x, y, z)."""

    colour: str
    low: tuple[float, float, float]
    high: tuple[float, float, float]

    @property
    def centre(self) -> tuple[float, float, float]:
        x, y, z = ((a + b) / 2 for a, b in zip(self.low, self.high, strict=True))
        return x, y, z


@dataclass(frozen=True)
class Room:
    """What is seen of a room.

    Args:
        boxes: no two of one colour.
        image: (3, side, side) in [0, 1].
        depth: (side, side), along z, of what is seen.
        owner: (side, side), number of the box that is seen, -1 for walls, floor and ceiling.
        focal: focal length in pixels; the optical axis goes through the middle.
        back: z of the far wall.
        normals: (3, side, side) unit vectors off what is seen, towards the camera's side.
    """

    boxes: tuple[Box, ...]
    image: Tensor
    depth: Tensor
    owner: Tensor
    focal: float
    back: float
    normals: Tensor

    def points(self) -> Tensor:
        """(side, side, 3), where every pixel is."""
        side = self.depth.shape[-1]
        at = (torch.arange(side) + 0.5 - side / 2) / self.focal
        y, x = torch.meshgrid(at, at, indexing="ij")
        return torch.stack([x * self.depth, y * self.depth, self.depth], -1)


def make_room(number: int, part: str = "train", side: int = 64, noise: float = 0.02, scale: float = 1.0) -> Room:
    """The room of a number: two to five boxes.

    Args:
        number: of the room.
        part: ``"train"``, ``"dev"`` or ``"test"``: other rooms.
        side: height and width of the picture.
        noise: standard deviation, of the picture alone.
        scale: of all lengths but the side of the floor's tiles, half a metre; at 1 the far wall is 5 to 8 m away.
    """
    check_int("side", side, least=16)
    check_real("noise", noise, least=0.0)
    check_real("scale", scale, above=0.0)
    rng = generator("rooms", number, part)
    back = float(rng.uniform(5.0, 8.0))
    names = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[: rng.integers(2, 6)]]
    boxes: list[Box] = []
    while len(boxes) < len(names):
        wide, tall, deep = rng.uniform(0.4, 1.0), rng.uniform(0.4, 1.4), rng.uniform(0.4, 1.0)
        x, z = rng.uniform(-HALF + wide / 2, HALF - wide / 2), rng.uniform(2.2, back - deep)
        low = (float(x - wide / 2), float(FLOOR - tall), float(z))
        high = (float(x + wide / 2), FLOOR, float(z + deep))
        if all(any(low[k] > b.high[k] or high[k] < b.low[k] for k in (0, 2)) for b in boxes):
            boxes.append(Box(names[len(boxes)], low, high))
    focal = 0.8 * side
    at = (np.arange(side) + 0.5 - side / 2) / focal
    ray = np.stack([*np.meshgrid(at, at)[:2], np.ones((side, side))], -1)
    with np.errstate(divide="ignore"):
        inverse = 1.0 / ray
    # From inside the room, the nearest of the far planes is the wall that is seen.
    shell = np.where(ray > 0, np.array([HALF, FLOOR, back]), np.array([-HALF, -CEILING, back])) * inverse
    face, depth = shell.argmin(-1), shell.min(-1)
    tint = rng.uniform(0.55, 0.85, (3, 3))
    image = tint[face] * np.array(list(_FACES.values()))[face][..., None]
    ground = (face == 1) & (ray[..., 1] > 0)
    tiles = (np.floor(ray[..., 0] * depth * 2 * scale) + np.floor(depth * 2 * scale)) % 2
    image = np.where(ground[..., None], image * (0.8 + 0.2 * tiles[..., None]), image)
    owner = np.full((side, side), -1)
    for i, box in enumerate(boxes):
        planes = np.stack([np.array(box.low) * inverse, np.array(box.high) * inverse])
        near, far = planes.min(0), planes.max(0)
        enter, side_seen = near.max(-1), near.argmax(-1)
        hit = (enter < far.min(-1)) & (enter > 0) & (enter < depth)
        depth, owner, face = np.where(hit, enter, depth), np.where(hit, i, owner), np.where(hit, side_seen, face)
        shade = np.array(list(_FACES.values()))[side_seen][..., None]
        image = np.where(hit[..., None], np.array(COLOURS[box.colour]) * shade, image)
    image = np.clip(image + noise * rng.standard_normal(image.shape), 0, 1).astype(np.float32)
    normals = -np.sign(np.take_along_axis(ray, face[..., None], -1)) * np.eye(3)[face]
    larger = [Box(b.colour, *(tuple(scale * v for v in end) for end in (b.low, b.high))) for b in boxes]  # type: ignore[arg-type]
    return Room(
        tuple(larger), torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        torch.from_numpy((scale * depth).astype(np.float32)), torch.from_numpy(owner), focal, scale * back,
        torch.from_numpy(normals.astype(np.float32)).permute(2, 0, 1).contiguous(),
    )  # fmt: skip


def cloud(room: Room, count: int = 2048, of: str = "seen", seed: int = 0) -> Tensor:
    """Points of a room.

    Args:
        room: a room.
        count: points.
        of: ``"seen"`` from the camera, or ``"boxes"``: the boxes' whole surface, as from a scan.
        seed: which points.

    Returns:
        (count, 6): x, y, z in metres, red, green, blue.
    """
    check_int("count", count, least=1)
    check_choice("of", of, ("seen", "boxes"))
    rng = np.random.default_rng(seed)
    if of == "seen":
        flat = torch.cat([room.points(), room.image.permute(1, 2, 0)], -1).flatten(0, 1)
        return flat[torch.from_numpy(rng.choice(len(flat), count, replace=count > len(flat)))]
    low, high = (np.array([getattr(box, end) for box in room.boxes]) for end in ("low", "high"))
    size = high - low
    area = np.stack([size[:, 1] * size[:, 2], size[:, 0] * size[:, 2], size[:, 0] * size[:, 1]], -1).repeat(2, -1)
    chosen = rng.choice(area.size, count, p=(area / area.sum()).ravel())
    box, face = chosen // 6, chosen % 6
    share = rng.random((count, 3))
    share[np.arange(count), face // 2] = face % 2
    colours = np.array([COLOURS[b.colour] for b in room.boxes])[box]
    return torch.from_numpy(np.concatenate([low[box] + share * size[box], colours], -1).astype(np.float32))
