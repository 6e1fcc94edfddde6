"""Pictures of a few coloured things on backgrounds, their captions and all of their truth.

Scenes are numbered: number 7 of a part is the same picture on every machine, whatever it is painted beside.

>>> scenes = sample(4, "test")
>>> scenes.count.shape, paint(scenes).images.shape
(torch.Size([4]), torch.Size([4, 3, 64, 64]))
>>> words = {w for prompt in captions(scenes) for w in prompt.text.replace(",", "").split()}
>>> words <= set(WORDS)
True
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, check_int, check_type
from ..data.files import digits

SIDE, SLOTS, WINDOW = 64, 3, 32
PARTS = ("train", "dev", "test")
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.86, 0.12, 0.12), "orange": (0.96, 0.55, 0.08), "yellow": (0.97, 0.90, 0.15), "green": (0.12, 0.66, 0.22),
    "cyan": (0.15, 0.82, 0.86), "blue": (0.13, 0.25, 0.88), "purple": (0.50, 0.14, 0.70), "pink": (0.98, 0.55, 0.78),
}  # fmt: skip
GEOMETRIC = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: What a thing can be: geometric shapes, individuals of one kind (see :func:`subject`), handwritten digits.
SHAPES = (*GEOMETRIC, "creature", *DIGITS)
CREATURE = SHAPES.index("creature")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("paper", "slate", "stripes", "tiles")
#: Backgrounds of plain scenes, see :func:`sample`.
PLAIN = BACKGROUNDS[:2]
#: Individuals: the first 200 are of training, the last 40 are never painted in the part ``"train"``.
SUBJECTS, TRAIN_SUBJECTS = 240, 200
#: Where in the picture: (column, row) with 0 left or top, 1 middle, 2 right or bottom.
PLACES: Mapping[str, tuple[int, int]] = {
    "at the top left": (0, 0), "at the top": (1, 0), "at the top right": (2, 0), "on the left": (0, 1),
    "in the middle": (1, 1), "on the right": (2, 1), "at the bottom left": (0, 2), "at the bottom": (1, 2),
    "at the bottom right": (2, 2),
}  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = ("one", "two", "three")
#: Every word of a caption.
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        itertools.chain(
            ("a", "an", "and", "of", "on", "to", "the", "at", "in"), COLOURS, SHAPES, (s + "s" for s in GEOMETRIC),
            ("crosses", "creatures", "thing", "things"), SIZES, TEXTURES, BACKGROUNDS, NUMBERS,
            ("top", "left", "right", "middle", "bottom", "above", "below"),
        )
    )
)  # fmt: skip

#: Colour and shape that never come together in a training picture of the generators: one colour of every shape.
HELD_OUT = tuple((list(COLOURS)[(3 * i + 1) % 8], shape) for i, shape in enumerate(GEOMETRIC))

_LOW, _HIGH = (6.4, 11.0), (7.8, 13.0)  # radii by size
_LEFT, _RIGHT, _MIDDLE = 23.0, 41.0, (26.0, 38.0)
_TRIES = 32
_RGB = torch.tensor(list(COLOURS.values()))


@dataclass(frozen=True)
class Want:
    """One thing that a prompt asks for; ``None`` where it leaves open."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    texture: str | None = None
    place: str | None = None
    subject: int | None = None


@dataclass(frozen=True)
class Prompt:
    """Words, and what they mean.

    Args:
        text: the words.
        wants: every thing that is to be there, and no other.
        relation: the first thing is so of the second.
        background: its name.
    """

    text: str
    wants: tuple[Want, ...] = ()
    relation: str | None = None
    background: str | None = None


@dataclass
class Scenes:
    """Facts of B scenes, by slot (B, 3); slots beyond ``count`` are empty. Pixels are counted from the top left.

    Args:
        count: things (B,).
        shape, colour, size, texture, subject, glyph: numbers of names; subject -1 where there is none.
        rgb: colours as painted (B, 3, 3).
        radius, x, y, angle: of every thing, pixels and radians.
        depth: distance of every thing, below 1, which is the background's.
        background: (B,) number of its name, ``ground`` (B, 4) its free numbers.
    """

    count: Tensor
    shape: Tensor
    colour: Tensor
    size: Tensor
    texture: Tensor
    subject: Tensor
    glyph: Tensor
    rgb: Tensor
    radius: Tensor
    x: Tensor
    y: Tensor
    angle: Tensor
    depth: Tensor
    background: Tensor
    ground: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: Any) -> Scenes:
        """Some of the scenes: a slice or a tensor of numbers or booleans."""
        return Scenes(**{k: v[rows] for k, v in vars(self).items()})

    def change(self, **given: Tensor) -> Scenes:
        """The same with other facts."""
        return replace(self, **given)

    @property
    def present(self) -> Tensor:
        """(B, 3), whether a slot holds a thing."""
        return torch.arange(SLOTS) < self.count[:, None]


@dataclass
class Painting:
    """Pictures and their truth.

    Args:
        images: (B, 3, 64, 64) in [0, 1].
        masks: (B, 3, 64, 64), the share of each pixel that each thing covers, what lies before it taken off.
        boxes: (B, 3, 4), left, top, right, bottom of the whole thing in pixels; zeros for empty slots.
        depth: (B, 64, 64), 1 for a background that is not tilted.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor
    depth: Tensor

    @property
    def normals(self) -> Tensor:
        """(B, 3, 64, 64) unit normals of the depth, a step of 1/64 in depth as long as a pixel."""
        padded = F.pad(self.depth[:, None] * SIDE, (1, 1, 1, 1), mode="replicate")[:, 0]
        across = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
        down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
        return F.normalize(torch.stack([across, down, torch.ones_like(across)], 1), dim=1)


# --------------------------------------------------------------------------------------------------------------------
# Draws


def _uniform(numbers: np.ndarray, part: str, stream: int, draws: int) -> Tensor:
    """(B, draws) in [0, 1), a function of the scene's number, its part and the stream alone (splitmix64)."""
    with np.errstate(over="ignore"):
        key = numbers.astype(np.uint64)[:, None] * np.uint64(4096) + np.arange(draws, dtype=np.uint64)
        key = key + np.uint64(1 + PARTS.index(part) + 16 * stream) * np.uint64(0x9E3779B97F4A7C15 * 2**20 % 2**64)
        z: Any = key * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / np.float32(2**24))


def _numbers(given: int | Sequence[int] | Tensor | np.ndarray) -> np.ndarray:
    if isinstance(given, int):
        check_int("numbers", given, least=1)
        return np.arange(given)
    return np.asarray(given, dtype=np.int64)


def _pick(u: Tensor, choices: int) -> Tensor:
    return (u * choices).long().clamp(max=choices - 1)


@functools.cache
def _subjects() -> Mapping[str, Tensor]:
    """Looks of every individual: no two share colours, pattern, ears and eyes."""
    looks = [
        (a, b, pattern, ears, eyes)
        for a in range(8) for b in range(7) for pattern in range(4) for ears in range(4) for eyes in range(3)
    ]  # fmt: skip
    order = np.random.default_rng(11).permutation(len(looks))[:SUBJECTS]
    a, b, pattern, ears, eyes = torch.tensor([looks[i] for i in order]).T
    wide = torch.from_numpy(np.random.default_rng(12).uniform(0.7, 1.0, (SUBJECTS, 2))).float()
    return {"body": a, "other": (a + 1 + b) % 8, "pattern": pattern, "ears": ears, "eyes": eyes, "form": wide}


def subject(number: int) -> Mapping[str, Any]:
    """What an individual looks like: colour of its body and of its pattern, pattern, ears, number of eyes.

    >>> sorted(subject(3))
    ['body', 'ears', 'eyes', 'form', 'other', 'pattern']
    """
    check_int("number", number, least=0)
    if number >= SUBJECTS:
        raise ValueError(f"number must be below {SUBJECTS}, got {number}")
    names = list(COLOURS)
    looks: dict[str, Any] = {k: v[number].tolist() for k, v in _subjects().items()}
    return {**looks, "body": names[looks["body"]], "other": names[looks["other"]]}


@functools.cache
def _glyphs(part: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    images, labels = digits().train if part == "train" else digits().test
    return images[..., 0], tuple((labels == d).nonzero()[:, 0] for d in range(10))


def sample(
    numbers: int | Sequence[int] | Tensor | np.ndarray,
    part: str = "train",
    pairings: str | None = None,
    wants: Sequence[Prompt] | None = None,
    geometric: bool = False,
    most: int = SLOTS,
    plain: bool = False,
) -> Scenes:
    """Scenes by number.

    Args:
        numbers: which scenes; an integer for the first so many.
        part: ``"train"``, ``"dev"`` or ``"test"``: other scenes, other handwritten digits; individuals of training in
            the first, held-out ones in the others.
        pairings: ``"never"`` paints no colour and shape of :data:`HELD_OUT` together, ``"any"`` takes no notice; by
            default ``"never"`` in training and ``"any"`` elsewhere.
        wants: per scene a prompt that it is to show; what the prompt leaves open is drawn.
        geometric: no creatures and no digits where nothing is wanted.
        most: things in a scene, at most.
        plain: large geometric things without texture, two at most, on paper or slate where nothing else is wanted:
            what small generators are trained on.
    """
    check_choice("part", part, PARTS)
    geometric, most = geometric or plain, min(most, 2) if plain else most
    pairings = pairings or ("never" if part == "train" else "any")
    check_choice("pairings", pairings, ("never", "any"))
    index = _numbers(numbers)
    b = len(index)
    u = _uniform(index, part, 0, 48)
    count = (1 + (u[:, 0] > 0.3).long() + (u[:, 0] > 0.78).long()).clamp(max=most)
    s = u[:, 1:40].view(b, SLOTS, 13)
    kind, shape = s[..., 0], _pick(s[..., 1], 8)
    if not geometric:
        shape = torch.where(kind > 0.80, torch.full_like(shape, CREATURE), shape)
        shape = torch.where(kind > 0.92, CREATURE + 1 + _pick(s[..., 1], 10), shape)
    colour, texture = _pick(s[..., 2], 8), (s[..., 3] > 0.6).long() + (s[..., 3] > 0.8).long()
    size = _pick(s[..., 4], 2)
    subjects = _pick(s[..., 5], TRAIN_SUBJECTS)
    if part != "train":
        subjects = TRAIN_SUBJECTS + _pick(s[..., 5], SUBJECTS - TRAIN_SUBJECTS)
    # Three large things do not fit; a second and third thing may be like the first, so that there is much to count.
    same = (u[:, 40] < 0.2)[:, None].expand(b, SLOTS)
    shape, colour, texture, size = (torch.where(same, t[:, :1], t) for t in (shape, colour, texture, size))
    size[:, 1:] = torch.where((count == 3)[:, None], 0, size[:, 1:])
    size[:, 0] = torch.where((count == 3) & same[:, 0], 0, size[:, 0])
    background = _pick(u[:, 41], len(PLAIN if plain else BACKGROUNDS))
    if plain:
        size, texture = torch.ones_like(size), torch.zeros_like(texture)
    wanted_texture = torch.zeros(b, SLOTS, dtype=torch.bool)
    if wants is not None:
        if len(wants) != b:
            raise ValueError(f"wants must hold one prompt per scene, {b}, got {len(wants)}")
        names = list(COLOURS)
        for i, prompt in enumerate(wants):
            check_type(f"wants[{i}]", prompt, Prompt, "a Prompt, as write makes one")
            if len(prompt.wants) > SLOTS:
                raise ValueError(f"wants: a scene holds at most {SLOTS} things, got {prompt.text!r}")
            count[i] = len(prompt.wants) or count[i]
            if prompt.background is not None:
                background[i] = BACKGROUNDS.index(prompt.background)
            for j, want in enumerate(prompt.wants):
                if want.colour is not None:
                    colour[i, j] = names.index(want.colour)
                if want.subject is not None:
                    shape[i, j], subjects[i, j] = CREATURE, want.subject
                elif want.shape is not None:
                    shape[i, j] = SHAPES.index(want.shape)
                if want.size is not None:
                    size[i, j] = SIZES.index(want.size)
                if want.texture is not None:
                    texture[i, j], wanted_texture[i, j] = TEXTURES.index(want.texture), True
            if count[i] == 3:
                size[i, [j for j, w in enumerate(prompt.wants) if w.size is None]] = 0
    creature = shape == CREATURE
    if wants is not None:  # an individual of the colour that is asked for, where none is named
        body = _subjects()["body"]
        for i, j in (creature & (body[subjects] != colour)).nonzero().tolist():
            want = wants[i].wants[j] if j < len(wants[i].wants) else Want()
            if want.subject is None and want.colour is not None:
                pool = torch.arange(TRAIN_SUBJECTS) if part == "train" else torch.arange(TRAIN_SUBJECTS, SUBJECTS)
                pool = pool[body[pool] == colour[i, j]]
                subjects[i, j] = pool[_pick(s[i, j, 5], len(pool))]
    colour = torch.where(creature, _subjects()["body"][subjects], colour)
    texture = torch.where(shape >= CREATURE, 0, texture)
    size = torch.where(creature, 1, size)
    if wants is None and not geometric:  # two creatures at most beside each other, as they are large
        third = (count == 3) & (creature.sum(1) > 1)
        count = torch.where(third, 2, count)
    if pairings == "never":
        held = torch.tensor([(3 * i + 1) % 8 for i in range(8)])
        clash = (shape < 8) & (colour == held[shape.clamp(max=7)])
        colour = torch.where(clash, (colour + 1 + _pick(s[..., 6], 7)) % 8, colour)
        if bool((same & clash).any()):
            colour = torch.where(same, colour[:, :1], colour)
    radius = torch.tensor(_LOW)[size] + (torch.tensor(_HIGH) - torch.tensor(_LOW))[size] * s[..., 7]
    x, y = _place(index, part, count, radius, wants)
    glyph, written = torch.zeros_like(shape), shape > CREATURE
    glyph[written] = digit_glyphs(shape[written] - CREATURE - 1, s[..., 8][written], part)
    return Scenes(
        count=count, shape=shape, colour=colour, size=size, texture=texture,
        subject=torch.where(creature, subjects, -1), glyph=glyph,
        rgb=(_RGB[colour] + 0.08 * (s[..., 9:12] - 0.5)).clamp(0, 1), radius=radius, x=x, y=y,
        angle=torch.where(creature, 0.4 * (s[..., 12] - 0.5), 0.0),
        depth=0.35 + 0.15 * torch.arange(SLOTS) + 0.12 * (s[..., 6] - 0.5), background=background,
        ground=u[:, 42:46],
    )  # fmt: skip


def _third(v: Tensor) -> Tensor:
    """0, 1, 2 for the outer thirds and the middle, -1 between."""
    middle = (v > _MIDDLE[0]) & (v < _MIDDLE[1])
    return torch.where(v < _LEFT, 0, torch.where(v > _RIGHT, 2, torch.where(middle, 1, -1)))


def _relation(dx: Tensor, dy: Tensor) -> Tensor:
    """Number of the relation of one thing to another that lies (dx, dy) away from it, -1 where none is clear."""
    wide, tall = (dx.abs() > 1.5 * dy.abs()) & (dx.abs() > 10), (dy.abs() > 1.5 * dx.abs()) & (dy.abs() > 10)
    return torch.where(wide, (dx < 0).long(), torch.where(tall, 2 + (dy < 0).long(), -1))


def _place(
    index: np.ndarray, part: str, count: Tensor, radius: Tensor, wants: Sequence[Prompt] | None
) -> tuple[Tensor, Tensor]:
    """Centres, the first of some candidates whose things lie apart and where the prompts want them."""
    b = len(index)
    u = _uniform(index, part, 1, 2 * SLOTS * _TRIES).view(b, _TRIES, SLOTS, 2)
    r = radius[:, None, :, None] + 1.0
    at = r + u * (SIDE - 2 * r)
    here = torch.arange(SLOTS) < count[:, None]
    gap = torch.full((b, _TRIES), 1e3)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        away = (at[:, :, i] - at[:, :, j]).norm(dim=-1) - 1.15 * (radius[:, i] + radius[:, j])[:, None]
        gap = torch.where((here[:, i] & here[:, j])[:, None], torch.minimum(gap, away), gap)
    score = gap.clamp(max=0.0)
    if wants is not None:
        column, row = _third(at[..., 0]), _third(at[..., 1])
        between = at[:, :, 1] - at[:, :, 0]
        relation = _relation(between[..., 0], between[..., 1])
        for i, prompt in enumerate(wants):
            if prompt.relation is not None:
                score[i] -= 100.0 * (relation[i] != RELATIONS.index(prompt.relation))
            for j, want in enumerate(prompt.wants):
                if want.place is not None:
                    across, down = PLACES[want.place]
                    lies = torch.tensor([12.0, 32.0, 52.0])
                    low, high = radius[i, j] + 1, SIDE - radius[i, j] - 1
                    spread = 6 * (u[i, :, j] - 0.5)
                    at[i, :, j, 0] = (lies[across] + spread[:, 0]).clamp(low, high)
                    at[i, :, j, 1] = (lies[down] + spread[:, 1]).clamp(low, high)
                    del column, row
                    column, row = _third(at[..., 0]), _third(at[..., 1])
    best = score.argmax(1)
    chosen = at[torch.arange(b), best]
    return chosen[..., 0].contiguous(), chosen[..., 1].contiguous()


# --------------------------------------------------------------------------------------------------------------------
# Pictures


def _halves(u: Tensor, v: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Signed distance from the lines of a convex polygon whose corners go clockwise on the screen."""
    out = torch.full_like(u, -1e3)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        dx, dy = x1 - x0, y1 - y0
        out = torch.maximum(out, ((u - x0) * dy - (v - y0) * dx) / (dx * dx + dy * dy) ** 0.5)
    return out


def _distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Signed distance of a geometric shape of radius 1, negative inside."""
    if shape == "circle":
        return torch.hypot(u, v) - 0.95
    if shape == "square":
        return torch.maximum(u.abs(), v.abs()) - 0.82
    if shape == "triangle":
        return _halves(u, v, [(0.0, -0.98), (0.98, 0.78), (-0.98, 0.78)])
    if shape == "star":
        part = torch.pi / 5
        turn = torch.remainder(torch.atan2(u, -v), 2 * part)
        turn = torch.minimum(turn, 2 * part - turn)
        r = torch.hypot(u, v)
        inner = torch.tensor([np.cos(part), np.sin(part)]) * 0.44
        dx, dy = float(inner[0]) - 1.0, float(inner[1])
        return ((r * turn.cos() - 1.0) * -dy + r * turn.sin() * dx) / -((dx * dx + dy * dy) ** 0.5)
    if shape == "ring":
        return (torch.hypot(u, v) - 0.67).abs() - 0.28
    if shape == "cross":
        a, b = u.abs(), v.abs()
        return torch.minimum(torch.maximum(a - 0.95, b - 0.32), torch.maximum(b - 0.95, a - 0.32))
    if shape == "heart":
        lobes = torch.minimum(torch.hypot(u - 0.43, v + 0.34), torch.hypot(u + 0.43, v + 0.34)) - 0.5
        tip = _halves(u, v, [(-0.86, -0.06), (-0.2, -0.4), (0.2, -0.4), (0.86, -0.06), (0, 0.95)])
        return torch.minimum(lobes, tip)
    return torch.maximum(torch.hypot(u, v) - 0.95, 0.72 - torch.hypot(u - 0.5, v + 0.12))


def _creature(number: Tensor, u: Tensor, v: Tensor, rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Signed distance and colours (N, 3, h, w) of individuals."""
    looks = {k: t[number] for k, t in _subjects().items()}
    one = (slice(None), None, None)
    a, b = looks["form"][:, 0][one] * 0.85, looks["form"][:, 1][one] * 0.7
    v = v - 0.2
    body = (torch.hypot(u / a, v / b) - 1) * torch.minimum(a, b)
    left = u.abs()
    ears = looks["ears"][one]
    round_ears = torch.hypot(left - 0.5, v + 0.72) - 0.27
    pointed = _halves(left, v, [(0.55, -1.1), (0.72, -0.3), (0.2, -0.3)])
    horn = torch.maximum(u.abs() - 0.11, (v + 0.75).abs() - 0.4)
    flat = torch.maximum((left - 0.7).abs() - 0.28, (v + 0.2).abs() - 0.12)
    extra = torch.where(ears == 0, round_ears, torch.where(ears == 1, pointed, torch.where(ears == 2, horn, flat)))
    whole = torch.minimum(body, extra)
    pattern = looks["pattern"][one]
    belly, band = torch.hypot(u / 0.5, (v - 0.32) / 0.3) < 1, (v - 0.3).abs() < 0.14
    spots = torch.hypot(torch.remainder(u + 0.25, 0.5) - 0.25, torch.remainder(v, 0.44) - 0.22) < 0.13
    sides = left > 0.42
    marked = torch.where(
        pattern == 0, belly, torch.where(pattern == 1, band, torch.where(pattern == 2, spots & (v > 0), sides))
    )
    marked = (marked & (body < -0.03)) | ((extra < body) & (ears != 3))
    ink = torch.where(marked[:, None], _RGB[looks["other"]][:, :, None, None], rgb[:, :, None, None])
    eyes = looks["eyes"][one]
    at = torch.where(eyes == 0, left + 0 * a, torch.where(eyes == 1, (left - 0.28).abs(), left))
    at = torch.where(eyes == 2, torch.minimum(left, (left - 0.42).abs()), at)
    size = torch.where(eyes == 0, 0.24, torch.where(eyes == 1, 0.19, 0.15))
    far = torch.hypot(at, v + 0.2)
    ink = torch.where((far < size)[:, None], 0.97, ink)
    ink = torch.where((far < size * 0.5)[:, None], 0.05, ink)
    return whole, ink


def digit_glyphs(labels: Tensor, u: Tensor, part: str) -> Tensor:
    """Numbers of handwritten digits of these labels, by draws u in [0, 1)."""
    by_label = _glyphs(part)[1]
    out = [by_label[n][int(d * len(by_label[n]))] for n, d in zip(labels.tolist(), u.tolist(), strict=True)]
    return torch.tensor([int(g) for g in out], dtype=torch.long)


def _sprites(scenes: Scenes, rows: Tensor, slot: Tensor, u: Tensor, v: Tensor, glyphs: Tensor) -> tuple[Tensor, ...]:
    """Alpha, relief (0 to 1) and colours of one thing of each row in its window."""
    shape, radius, rgb = scenes.shape[rows, slot], scenes.radius[rows, slot], scenes.rgb[rows, slot]
    signed = torch.zeros_like(u)
    ink = rgb[:, :, None, None].expand(-1, -1, *u.shape[1:]).clone()
    alpha = torch.zeros_like(u)
    for number in shape.unique().tolist():
        mine = shape == number
        a, b = u[mine], v[mine]
        if number < CREATURE:
            signed[mine] = _distance(SHAPES[number], a, b)
        elif number == CREATURE:
            angle = scenes.angle[rows, slot][mine][:, None, None]
            a, b = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
            signed[mine], ink[mine] = _creature(scenes.subject[rows, slot][mine], a, b, rgb[mine])
    written = shape > CREATURE
    alpha = (0.5 - signed * radius[:, None, None]).clamp(0, 1)
    relief = (-signed / 0.5).clamp(0, 1)
    if bool(written.any()):
        angle = scenes.angle[rows, slot][written][:, None, None]
        a, b = u[written], v[written]
        a, b = a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()
        field = torch.stack([a, b], -1) / 0.95
        drawn = F.grid_sample(
            glyphs[scenes.glyph[rows, slot][written]][:, None], field, mode="bilinear", align_corners=False
        )[:, 0]
        drawn = drawn * ((u[written].abs() < 1) & (v[written].abs() < 1))
        alpha[written] = (1.9 * drawn - 0.35).clamp(0, 1)
        relief[written] = drawn
    relief = relief * (2 - relief)
    texture = scenes.texture[rows, slot]
    px, py = u * radius[:, None, None], v * radius[:, None, None]
    stripes = torch.sigmoid(6 * torch.cos((px + py) * (2 * torch.pi / 6.5)))
    dots = torch.sigmoid(6 * (torch.cos(px * (2 * torch.pi / 5.5)) + torch.cos(py * (2 * torch.pi / 5.5)) - 0.7))
    ink = torch.where((texture == 1)[:, None, None, None], ink * (1 - 0.55 * stripes[:, None]), ink)
    ink = torch.where((texture == 2)[:, None, None, None], ink + (0.96 - ink) * 0.85 * dots[:, None], ink)
    slope = torch.zeros_like(relief)
    slope[:, 1:, 1:] = relief[:, 1:, 1:] - relief[:, :-1, :-1]
    return alpha, relief, (ink * (0.94 + 0.35 * slope[:, None] + 0.06 * relief[:, None])).clamp(0, 1)


def _grounds(background: Tensor, free: Tensor, shift: Tensor | None = None) -> Tensor:
    """(B, 3, 64, 64) backgrounds."""
    b = len(background)
    line = torch.arange(SIDE) + 0.5
    x, y = line[None, None, :].expand(b, SIDE, SIDE), line[None, :, None].expand(b, SIDE, SIDE)
    if shift is not None:
        x, y = x - shift[:, 0, None, None], y - shift[:, 1, None, None]
    f = free[:, :, None, None]
    fall = 0.10 * ((x / SIDE - 0.5) * (2 * f[:, 0] - 1) + (y / SIDE - 0.5) * (2 * f[:, 1] - 1))
    period = 10 + 6 * f[:, 2]
    bands = torch.sigmoid(5 * torch.cos((y + 16 * f[:, 3]) * 2 * torch.pi / period))
    checks = torch.sigmoid(
        8 * torch.cos((x + 16 * f[:, 3]) * 2 * torch.pi / (period + 4)) * torch.cos(y * 2 * torch.pi / (period + 4))
    )
    kind = background[:, None, None]
    light = torch.where(kind == 2, 0.62 + 0.13 * bands, torch.where(kind == 3, 0.50 + 0.14 * checks, 0.33))
    light = torch.where(kind == 0, 0.90, light) + fall
    tint = torch.tensor([[1.0, 0.97, 0.90], [0.94, 1.0, 1.1], [1.0, 1.0, 1.0], [0.95, 1.0, 1.08]])[background]
    return (light[:, None] * tint[:, :, None, None]).clamp(0, 1)


def paint(scenes: Scenes, part: str = "train", shift: Tensor | None = None, slots: Sequence[int] = ()) -> Painting:
    """Pictures of scenes and their truth.

    Args:
        scenes: from :func:`sample`.
        part: whose handwritten digits; as given to :func:`sample`.
        shift: (B, 2) pixels by which patterns of the background are moved.
        slots: these only are painted, all by default.
    """
    check_type("scenes", scenes, Scenes, "scenes of sample")
    check_choice("part", part, PARTS)
    few = 64  # scenes at a time, as many as fit into caches
    parts = [
        _paint(scenes[i : i + few], part, None if shift is None else shift[i : i + few], slots)
        for i in range(0, len(scenes), few)
    ]
    return Painting(*(torch.cat([vars(p)[k] for p in parts]) for k in ("images", "masks", "boxes", "depth")))


def _paint(scenes: Scenes, part: str, shift: Tensor | None, slots: Sequence[int]) -> Painting:
    b, pad = len(scenes), WINDOW // 2
    wide = SIDE + 2 * pad
    # Channels: three of colour, one of depth, one of cover for each slot.
    canvas = torch.zeros(b, wide, wide, 4 + SLOTS)
    inner = canvas[:, pad:-pad, pad:-pad]
    inner[..., :3] = _grounds(scenes.background, scenes.ground, shift).permute(0, 2, 3, 1)
    tilt = 0.04 * (torch.arange(SIDE) / SIDE - 0.5)
    inner[..., 3] = 1 + tilt * (2 * scenes.ground[:, :1, None] - 1)
    flat = canvas.view(-1, 4 + SLOTS)
    boxes = torch.zeros(b, SLOTS, 4)
    glyphs = _glyphs(part)[0]
    line = torch.arange(WINDOW)
    shown = scenes.present.clone()
    if slots:
        shown &= torch.isin(torch.arange(SLOTS), torch.tensor(list(slots)))
    order = scenes.depth.masked_fill(~shown, -1.0).argsort(1, descending=True)  # the farthest first
    for turn in range(SLOTS):
        rows = shown[torch.arange(b), order[:, turn]].nonzero()[:, 0]
        if not len(rows):
            continue
        slot = order[rows, turn]
        cx, cy, r = scenes.x[rows, slot], scenes.y[rows, slot], scenes.radius[rows, slot]
        left, top = cx.floor().long() - WINDOW // 2, cy.floor().long() - WINDOW // 2
        u = ((left[:, None] + line + 0.5 - cx[:, None]) / r[:, None])[:, None, :].expand(-1, WINDOW, -1)
        v = ((top[:, None] + line + 0.5 - cy[:, None]) / r[:, None])[:, :, None].expand(-1, -1, WINDOW)
        alpha, relief, ink = _sprites(scenes, rows, slot, u.contiguous(), v.contiguous(), glyphs)
        ix = (left[:, None] + line + pad).clamp(0, wide - 1)[:, None, :]
        iy = (top[:, None] + line + pad).clamp(0, wide - 1)[:, :, None]
        at = ((rows[:, None, None] * wide + iy) * wide + ix).flatten()
        under = flat[at].view(len(rows), WINDOW, WINDOW, -1)
        over = under * (1 - alpha[..., None])
        over[..., :3] += alpha[..., None] * ink.permute(0, 2, 3, 1)
        near = scenes.depth[rows, slot][:, None, None] - relief * (0.35 * r / SIDE)[:, None, None]
        solid = alpha > 0.5
        over[..., 3] = torch.where(solid, near, under[..., 3])
        over[..., 4:] += alpha[..., None] * F.one_hot(slot, SLOTS)[:, None, None]
        flat[at] = over.flatten(0, 2)
        across, down = solid.any(1), solid.any(2)
        first, last = across.float().argmax(1), WINDOW - across.flip(1).float().argmax(1)
        high, low = down.float().argmax(1), WINDOW - down.flip(1).float().argmax(1)
        boxes[rows, slot] = torch.stack([left + first, top + high, left + last, top + low], 1).float()
    images, depth, masks = inner.permute(0, 3, 1, 2).split([3, 1, SLOTS], 1)
    return Painting(images.contiguous(), masks.contiguous(), boxes.clamp(0, SIDE), depth[:, 0].contiguous())


def portraits(subjects: Sequence[int] | Tensor, numbers: Sequence[int] | None = None, part: str = "test") -> Painting:
    """Individuals alone in pictures, one each, somewhere on some background.

    Args:
        subjects: which, 0 to 239.
        numbers: of the scenes, so that the same individual can be seen again otherwise; 0, 1, ... by default.
        part: of the scenes.
    """
    asked = [Prompt("", (Want(subject=check_int("subjects", int(n), 0, SUBJECTS - 1)),)) for n in subjects]
    if not asked:
        raise ValueError("subjects must hold at least one number")
    chosen = range(len(asked)) if numbers is None else numbers
    return paint(sample(list(chosen), part, wants=asked), part)


def clip(scenes: Scenes, frames: int = 8, part: str = "train", speed: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Things that move evenly over a background that moves evenly.

    Args:
        scenes: of the first frame.
        frames: at least two.
        part: as given to :func:`sample`.
        speed: pixels per frame, at most.

    Returns:
        Images (B, T, 3, 64, 64); flow (B, T - 1, 2, 64, 64), how far right and down what is seen at a pixel has moved
        in the next frame; and (B, T - 1, 64, 64), whether it is still seen there.
    """
    check_int("frames", frames, least=2)
    g = torch.Generator().manual_seed(int(scenes.x.double().sum() * 1000) % 2**31)
    b = len(scenes)
    go = speed * (2 * torch.rand(b, SLOTS, 2, generator=g) - 1)
    pan = 0.5 * speed * (2 * torch.rand(b, 2, generator=g) - 1)
    length = frames - 1
    for axis, start in enumerate((scenes.x, scenes.y)):  # nothing leaves the picture
        room = torch.where(go[..., axis] > 0, SIDE - scenes.radius - start, start - scenes.radius).clamp(min=0)
        go[..., axis] = go[..., axis].clamp(-room / length, room / length)
    shots = [
        paint(scenes.change(x=scenes.x + t * go[..., 0], y=scenes.y + t * go[..., 1]), part, shift=t * pan)
        for t in range(frames)
    ]
    # Whose pixel it is: a thing's number, or the background's.
    owners = [torch.cat([p.masks, 1 - p.masks.sum(1, keepdim=True)], 1).argmax(1) for p in shots]
    moves = torch.cat([go, pan[:, None]], 1)
    flow, seen = [], []
    line = torch.arange(SIDE)
    for now, then in itertools.pairwise(owners):
        step = torch.gather(moves, 1, now.flatten(1)[..., None].expand(-1, -1, 2)).view(b, SIDE, SIDE, 2)
        x, y = (line + step[..., 0]).round().long(), (line[:, None] + step[..., 1]).round().long()
        inside = (x >= 0) & (x < SIDE) & (y >= 0) & (y < SIDE)
        there = then[torch.arange(b)[:, None, None], y.clamp(0, SIDE - 1), x.clamp(0, SIDE - 1)]
        flow.append(step.permute(0, 3, 1, 2))
        seen.append(inside & (there == now))
    return torch.stack([p.images for p in shots], 1), torch.stack(flow, 1), torch.stack(seen, 1)


# --------------------------------------------------------------------------------------------------------------------
# Captions


def phrase(want: Want, article: bool = True) -> str:
    """Words of one thing, its place left out.

    >>> phrase(Want("orange", "star", "small")), phrase(Want("orange", "star"))
    ('a small orange star', 'an orange star')
    """
    words = [w for w in (want.size, want.texture if want.texture != "plain" else None, want.colour) if w]
    words.append(want.shape or "thing")
    if article:
        words.insert(0, "an" if words[0][0] in "aeiou" else "a")
    return " ".join(words)


def _plural(noun: str) -> str:
    return noun + ("es" if noun == "cross" else "s")


def write(
    wants: Sequence[Want], relation: str | None = None, background: str | None = None, counted: bool = False
) -> Prompt:
    """A prompt of things.

    Args:
        wants: one to three.
        relation: of the first to the second of two.
        background: its name, or ``None`` to leave it open.
        counted: equal things as a number of them.

    >>> write([Want("red", "star"), Want("blue", "ring")], "left of", "slate").text
    'a red star left of a blue ring on slate'
    >>> write([Want("red", "cross")] * 2, counted=True).text
    'two red crosses'
    """
    if not 1 <= len(wants) <= SLOTS:
        raise ValueError(f"wants must hold 1 to {SLOTS} things, got {len(wants)}")
    if relation is not None:
        check_choice("relation", relation, RELATIONS)
        if len(wants) != 2:
            raise ValueError(f"relation={relation!r} is of two things, got {len(wants)}")
    for want in wants:
        for what, given, known in (
            ("colour", want.colour, COLOURS), ("shape", want.shape, SHAPES), ("size", want.size, SIZES),
            ("texture", want.texture, TEXTURES), ("place", want.place, PLACES),
        ):  # fmt: skip
            if given is not None:
                check_choice(what, given, tuple(known))
    if background is not None:
        check_choice("background", background, BACKGROUNDS)
    if counted and len(wants) > 1 and len(set(wants)) == 1:
        noun = _plural(wants[0].shape or "thing")
        words = phrase(replace(wants[0], shape="circle"), article=False).removesuffix("circle")
        text = f"{NUMBERS[len(wants) - 1]} {words}{noun}"
    else:
        said = [phrase(w) + (f" {w.place}" if w.place else "") for w in wants]
        if relation is not None:
            text = f"{said[0]} {relation} {said[1]}"
        else:
            text = said[0] if len(said) == 1 else ", ".join(said[:-1]) + f" and {said[-1]}"
    return Prompt(text + (f" on {background}" if background else ""), tuple(wants), relation, background)


def captions(scenes: Scenes, omit: float = 0.0, epoch: int = 0, numbers: Sequence[int] | None = None) -> list[Prompt]:
    """What could be said of scenes.

    Args:
        scenes: from :func:`sample`.
        omit: share of captions that leave out an attribute of a thing, colour or shape.
        epoch: other captions of the same scenes.
        numbers: of the scenes, for other draws than 0, 1, ....
    """
    b = len(scenes)
    index = _numbers(b if numbers is None else numbers)
    if len(index) != b:
        raise ValueError(f"numbers must hold one per scene, {b}, got {len(index)}")
    u = _uniform(index, "train", 2 + epoch, 24).tolist()
    columns, rows = _third(scenes.x).tolist(), _third(scenes.y).tolist()
    lies = {v: k for k, v in PLACES.items()}
    names = list(COLOURS)
    colour, shape, size, texture = (t.tolist() for t in (scenes.colour, scenes.shape, scenes.size, scenes.texture))
    count, background = scenes.count.tolist(), scenes.background.tolist()
    xs, ys = scenes.x, scenes.y
    out = []
    for i in range(b):
        d = u[i]
        n = count[i]
        wants = [
            Want(
                names[colour[i][j]], SHAPES[shape[i][j]],
                SIZES[size[i][j]] if d[j] < 0.5 and shape[i][j] != CREATURE else None,
                TEXTURES[texture[i][j]] if texture[i][j] else None,
            )
            for j in range(n)
        ]  # fmt: skip
        ground = BACKGROUNDS[background[i]] if d[3] < 0.5 else None
        if d[4] < omit:
            j = int(d[5] * n)
            wants[j] = replace(wants[j], colour=None) if d[6] < 0.7 else replace(wants[j], shape=None)
        order = sorted(range(n), key=lambda j: d[7 + j])
        relation = None
        if n == 1:
            place = lies.get((columns[i][0], rows[i][0]))
            if place and d[10] < 0.6:
                wants[0] = replace(wants[0], place=place)
        elif n == 2 and d[10] < 0.5:
            p, q = order
            found = int(_relation(xs[i, q] - xs[i, p], ys[i, q] - ys[i, p]))
            relation = RELATIONS[found] if found >= 0 else None
        if n > 1 and relation is None:
            kinds = {(colour[i][j], shape[i][j], texture[i][j]) for j in range(n)}
            if len(kinds) == 1 and shape[i][0] < CREATURE and d[11] < 0.8:
                first = Want(wants[0].colour, wants[0].shape, None, wants[0].texture)
                out.append(write([first] * n, None, ground, counted=True))
                continue
        out.append(write([wants[j] for j in order], relation, ground))
    return out
