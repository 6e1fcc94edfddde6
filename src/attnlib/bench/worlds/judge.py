"""Who says what is in a picture: a small detector trained on painted scenes, never on generated ones.

It finds things with their boxes, and of every thing its shape, colour, size, texture, and, of a creature, a vector that
tells individuals apart. What is not clearly one of the known shapes is "nothing recognisable".

>>> from attnlib.bench.worlds.painter import Want, write
>>> found = [Found((2, 2, 20, 20), "star", "red", "large", "plain", 0.9, torch.zeros(64))]
>>> compare(found, write([Want("red", "star")])).right, compare(found, write([Want("blue", "star")])).right
(True, False)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_type
from ...models.protocol import answering
from ..small import interval
from ..stats import mean_interval
from . import painter
from .models import weights
from .painter import COLOURS, CREATURE, PLACES, SHAPES, SIDE, SIZES, SLOTS, TEXTURES, Prompt, Scenes, Want

NOTHING = "nothing recognisable"
STRIDE, EMBEDDING = 4, 64
GRID = SIDE // STRIDE
_HEADS = {
    "heat": 1, "box": 4, "shape": len(SHAPES) + 1, "colour": len(COLOURS), "size": len(SIZES),
    "texture": len(TEXTURES), "subject": EMBEDDING,
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One thing in a picture.

    Args:
        box: left, top, right, bottom in pixels.
        shape: of :data:`attnlib.bench.worlds.painter.SHAPES`, or :data:`NOTHING`.
        colour, size, texture: their names.
        score: how sure the detector is that a thing is there.
        embedding: unit vector of an individual, of use where the shape is a creature.
    """

    box: tuple[float, float, float, float]
    shape: str
    colour: str
    size: str
    texture: str
    score: float
    embedding: Tensor

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def recognisable(self) -> bool:
        return self.shape != NOTHING


@dataclass(frozen=True)
class Verdict:
    """What of a prompt is in a picture.

    Args:
        right: all of it: exactly the things that were asked for, as they were asked for and where.
        bound: every thing that was asked for is there with its own shape, colour, size and texture.
        present: every shape that was asked for is there, as often as it was.
        counted: there are exactly as many things as were asked for.
        placed: places and the relation hold, of things that are bound.
        recognisable: nothing is unrecognisable, and there is something.
        things: share of the things asked for that are there, bound.
    """

    right: bool
    bound: bool
    present: bool
    counted: bool
    placed: bool
    recognisable: bool
    things: float


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_one, self.norm_two = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm_two(self.two(F.relu(self.norm_one(self.one(x))))))


class Judge(nn.Module):
    """The detector: a convolutional network of stride four with heads at every cell.

    Args:
        width: channels at stride four; half of them at stride two.
        depth: residual blocks at stride four.
    """

    def __init__(self, width: int = 80, depth: int = 4) -> None:
        super().__init__()
        check_int("width", width, least=2)
        check_int("depth", depth, least=0)
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 5, stride=2, padding=2, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU(),
            _Block(width // 2),
            nn.Conv2d(width // 2, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.heads = nn.Conv2d(width, sum(_HEADS.values()), 1)
        self.individuals = nn.Parameter(torch.randn(painter.TRAIN_SUBJECTS, EMBEDDING))
        with torch.no_grad():
            self.heads.bias[0] = -4.0  # type: ignore[index]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, 64, 64) in [0, 1] to raw heads (B, channels, 16, 16)."""
        if images.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"images must be (B, 3, {SIDE}, {SIDE}), got {tuple(images.shape)}; use look for others")
        out = self.heads(self.blocks(self.stem(images.to(self.heads.weight.dtype) * 2 - 1)))
        return dict(zip(_HEADS, out.split(list(_HEADS.values()), 1), strict=True))

    @answering
    def look(self, images: Tensor, threshold: float = 0.4, limit: int = 24) -> list[list[Found]]:
        """Things in pictures, the surest first.

        Args:
            images: (B, 3, h, w) in [0, 1]. A side may be any multiple of four from 64 on: things have the size that
                they have in pictures of 64 pixels.
            threshold: how sure it must be that a thing is there.
            limit: things per picture.

        Raises:
            ValueError: other shapes, or numbers outside [0, 1] by more than a rounding.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < SIDE or images.shape[2] % 4:
            raise ValueError(
                f"images must be (B, 3, h, w), h and w multiples of 4 from {SIDE}, got {tuple(images.shape)}"
            )
        if images.numel() and not (float(images.min()) > -0.01 and float(images.max()) < 1.01):
            low, high = float(images.min()), float(images.max())
            raise ValueError(f"images must lie in [0, 1], got {low:.3g} to {high:.3g}")
        out = []
        for part in images.split(64):
            raw = self.heads(self.blocks(self.stem(part.to(self.heads.weight.dtype) * 2 - 1)))
            heads = dict(zip(_HEADS, raw.split(list(_HEADS.values()), 1), strict=True))
            heat = heads["heat"].sigmoid()[:, 0]
            peaks = (heat == F.max_pool2d(heat[:, None], 3, 1, 1)[:, 0]) & (heat > threshold)
            for i in range(len(part)):
                out.append(self._read(heads, heat[i], peaks[i], i, limit))
        return out

    def _read(self, heads: dict[str, Tensor], heat: Tensor, peaks: Tensor, i: int, limit: int) -> list[Found]:
        ys, xs = peaks.nonzero(as_tuple=True)
        order = heat[ys, xs].argsort(descending=True)
        kept: list[Found] = []
        for y, x in zip(ys[order].tolist(), xs[order].tolist(), strict=True):
            # Cells beside the middle learnt the same: what all of them say is surer.
            rows = torch.tensor([y + dy for dy in (0, 0, 0, 1, -1)]).clamp(0, heat.shape[0] - 1)
            columns = torch.tensor([x + dx for dx in (0, 1, -1, 0, 0)]).clamp(0, heat.shape[1] - 1)
            cells = {k: v[i][:, rows, columns] for k, v in heads.items()}
            at = {k: v.mean(-1) for k, v in cells.items()}
            middle = torch.stack([columns, rows]) * STRIDE + STRIDE / 2
            sides = cells["box"].clamp(max=3).exp() * 8
            corners = torch.cat([middle - sides[:2], middle + sides[2:]]).mean(-1).tolist()
            low_x, low_y, high_x, high_y = (float(round(c)) for c in corners)  # boxes are of whole pixels
            near = (low_x, low_y, high_x, high_y)
            if any(float(box_iou(torch.tensor(near), torch.tensor(k.box))) > 0.5 for k in kept):
                continue
            kept.append(
                Found(
                    near, [*SHAPES, NOTHING][int(at["shape"].argmax())], list(COLOURS)[int(at["colour"].argmax())],
                    SIZES[int(at["size"].argmax())], TEXTURES[int(at["texture"].argmax())], float(heat[y, x]),
                    F.normalize(at["subject"], dim=0),
                )
            )  # fmt: skip
            if len(kept) == limit:
                break
        return kept

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Verdict]:
        """Whether pictures show what prompts ask for."""
        if len(images) != len(prompts):
            raise ValueError(f"prompts must hold one per picture, {len(images)}, got {len(prompts)}")
        return [compare(f, p) for f, p in zip(self.look(images), prompts, strict=True)]

    @torch.no_grad()
    def embeddings(self, images: Tensor) -> Tensor:
        """(B, 64) unit vectors of the surest creature of every picture; zeros where there is none."""
        out = torch.zeros(len(images), EMBEDDING)
        for i, found in enumerate(self.look(images)):
            creatures = [f for f in found if f.shape == "creature"]
            if creatures:
                out[i] = creatures[0].embedding
        return out


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4), one by one."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    area = (a[..., 2:] - a[..., :2]).clamp(min=0).prod(-1) + (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    return both / (area - both).clamp(min=1e-6)


def _fits(found: Found, want: Want) -> bool:
    if not found.recognisable or (want.colour is not None and found.colour != want.colour):
        return False
    if want.shape is not None and found.shape != want.shape:
        return False
    if want.size is not None and found.size != want.size:
        return False
    return want.texture is None or found.texture == want.texture


def _lies(found: Found, place: str, slack: float = 2.0) -> bool:
    for at, third in zip(found.centre, PLACES[place], strict=True):
        low, high = ((0.0, 23.0), (26.0, 38.0), (41.0, 64.0))[third]
        if not low - slack <= at <= high + slack:
            return False
    return True


def holds(first: Found, second: Found, relation: str) -> bool:
    """Whether a thing is left of, right of, above or below another: the way between them is mostly so."""
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    along = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation]
    return along > 4 and along >= max(abs(dx), abs(dy)) - 2


def compare(found: Sequence[Found], prompt: Prompt) -> Verdict:
    """Hold what was found against a prompt."""
    check_type("prompt", prompt, Prompt, "a Prompt, as attnlib.bench.worlds.painter.write makes one")
    wants = prompt.wants
    most, placed = 0, False
    fitting = [[k for k, f in enumerate(found) if _fits(f, w)] for w in wants]
    for choice in itertools.product(*([*own, None] for own in fitting)):
        taken = [k for k in choice if k is not None]
        if len(set(taken)) < len(taken):
            continue
        matched = [None if k is None else found[k] for k in choice]
        number = sum(m is not None for m in matched)
        if number < most:
            continue
        lies = number == len(wants) and all(
            w.place is None or (m is not None and _lies(m, w.place)) for m, w in zip(matched, wants, strict=True)
        )
        if lies and prompt.relation is not None and matched[0] is not None and matched[1] is not None:
            lies = holds(matched[0], matched[1], prompt.relation)
        placed = lies if number > most else placed or lies
        most = number
    bound = most == len(wants)
    shapes = [f.shape for f in found]
    asked = [w.shape for w in wants if w.shape is not None]
    present = all(shapes.count(s) >= asked.count(s) for s in asked) and sum(f.recognisable for f in found) >= len(wants)
    counted = len(found) == len(wants)
    recognisable = bool(found) and all(f.recognisable for f in found)
    return Verdict(
        bound and counted and placed, bound, present, counted, placed, recognisable, most / max(1, len(wants))
    )


def load(folder: str | Path | None = None) -> Judge:
    """The trained judge.

    Args:
        folder: of trained parts, as :func:`attnlib.bench.worlds.models.weights` finds it.

    Raises:
        FileNotFoundError: it is not there.
    """
    from safetensors.torch import load_file

    place = weights(folder) / "judge" / "model.safetensors"
    if not place.exists():
        raise FileNotFoundError(f"{place} is missing: make it with examples/diffusion/judge.py")
    held = load_file(str(place))
    depth = len({k.split(".")[1] for k in held if k.startswith("blocks.")})
    judge = Judge(held["heads.weight"].shape[1], depth)
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in held.items()})
    return judge.eval()


# --------------------------------------------------------------------------------------------------------------------
# Training


def _field(b: int, cells: int, reach: float, g: torch.Generator, mode: str) -> Tensor:
    """(B, 64, 64, 2) places to look at, moved at random by so many pixels, one move per cell."""
    move = reach * (2 * torch.rand(b, 2, cells, cells, generator=g) - 1) * 2 / SIDE
    more: dict[str, Any] = {} if mode == "nearest" else {"align_corners": False}
    move = F.interpolate(move, size=(SIDE, SIDE), mode=mode, **more).permute(0, 2, 3, 1)
    line = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + move


def spoil(scenes: Scenes, done: painter.Painting, slot: Tensor, part: str, g: torch.Generator) -> Tensor:
    """Pictures in which one thing of every scene is no longer recognisable: blurred, torn, mixed with others, halved.

    Args:
        scenes, done: what was painted.
        slot: (B,) which thing.
        part: whose digits.
        g: of the kind of damage.
    """
    b = len(scenes)
    images, rows = done.images, torch.arange(b)
    blurred = images
    for _ in range(2):
        blurred = F.avg_pool2d(blurred, 7, 1, 3, count_include_pad=False)
    torn = F.grid_sample(images, _field(b, 16, 10.0, g, "nearest"), align_corners=False, padding_mode="reflection")
    bent = F.grid_sample(images, _field(b, 13, 11.0, g, "bilinear"), align_corners=False, padding_mode="reflection")
    shape, colour = scenes.shape.clone(), scenes.colour.clone()
    shape[rows, slot] = (shape[rows, slot] + 1 + torch.randint(0, 7, (b,), generator=g)) % 8
    colour[rows, slot] = (colour[rows, slot] + 1 + torch.randint(0, 7, (b,), generator=g)) % 8
    rgb = torch.tensor(list(COLOURS.values()))[colour]
    other = painter.paint(scenes.change(shape=shape, colour=colour, rgb=rgb), part).images
    mixed = torch.lerp(images, other, 0.5)
    empty = painter.paint(scenes.change(count=torch.zeros_like(scenes.count)), part).images
    turn = 2 * torch.pi * torch.rand(b, generator=g)
    line = torch.arange(SIDE) + 0.5
    x, y = line - scenes.x[rows, slot, None], line - scenes.y[rows, slot, None]
    side = x[:, None, :] * turn.cos()[:, None, None] + y[:, :, None] * turn.sin()[:, None, None]
    halved = torch.where((side > 0)[:, None], empty, images)
    kind = torch.randint(0, 5, (b,), generator=g)
    all_kinds = torch.stack([blurred, torn, bent, mixed, halved])
    spoilt = all_kinds[kind, rows]
    reach = scenes.radius[rows, slot, None] + 1.5
    near = ((x.abs() < reach)[:, None, :] & (y.abs() < reach)[:, :, None])[:, None]
    return torch.where(near, spoilt, images)


def batch(numbers: Tensor, g: torch.Generator, part: str = "train") -> tuple[Tensor, Scenes, Tensor, Tensor]:
    """Pictures to learn from: images, scenes, boxes and which things (B, 3) are spoilt."""
    scenes = painter.sample(numbers, part, pairings="any")
    b = len(scenes)
    # Digits are hardest to read: more of them than elsewhere, and turned a little.
    more = (torch.rand(b, SLOTS, generator=g) < 0.25) & (scenes.shape < CREATURE)
    label, which = torch.randint(0, 10, (b, SLOTS), generator=g), torch.rand(b, SLOTS, generator=g)
    shape, glyph = scenes.shape.clone(), scenes.glyph.clone()
    shape[more] = CREATURE + 1 + label[more]
    glyph[more] = painter.digit_glyphs(label[more], which[more], part)
    written = shape > CREATURE
    angle = torch.where(written, 0.5 * (torch.rand(b, SLOTS, generator=g) - 0.5), scenes.angle)
    texture = torch.where(written, 0, scenes.texture)
    scenes = scenes.change(shape=shape, glyph=glyph, angle=angle, texture=texture)
    done = painter.paint(scenes, part)
    spoilt = torch.zeros(b, SLOTS, dtype=torch.bool)
    chosen = (torch.rand(b, generator=g) < 0.3).nonzero()[:, 0]
    images = done.images
    if len(chosen):
        slot = (torch.rand(len(chosen), generator=g) * scenes.count[chosen]).long()
        some = painter.Painting(*(v[chosen] for v in vars(done).values()))
        images = images.clone()
        images[chosen] = spoil(scenes[chosen], some, slot, part, g)
        spoilt[chosen, slot] = True
    light = 1 + 0.16 * (torch.rand(b, 1, 1, 1, generator=g) - 0.5)
    tint = 0.05 * (torch.rand(b, 3, 1, 1, generator=g) - 0.5)
    soft = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    images = torch.lerp(images, soft, 0.9 * torch.rand(b, 1, 1, 1, generator=g) ** 2)
    rough = 0.05 * torch.rand(b, 1, 1, 1, generator=g) ** 2
    images = images * light + tint + rough * torch.randn(images.shape, generator=g)
    return images.clamp(0, 1), scenes, done.boxes, spoilt


def loss(judge: Judge, given: tuple[Tensor, Scenes, Tensor, Tensor]) -> Tensor:
    """What the judge is trained on: where things are, their boxes, and what they are."""
    images, scenes, boxes, spoilt = given
    out = judge(images)
    here = scenes.present
    line = (torch.arange(GRID) + 0.5) * STRIDE
    cx, cy = (boxes[..., 0] + boxes[..., 2]) / 2, (boxes[..., 1] + boxes[..., 3]) / 2
    gx, gy = (cx / STRIDE).long().clamp(0, GRID - 1), (cy / STRIDE).long().clamp(0, GRID - 1)
    cells = torch.arange(GRID)
    far = (cells - gx[..., None]).square()[:, :, None, :] + (cells - gy[..., None]).square()[:, :, :, None]
    bump = torch.where(here[..., None, None], torch.exp(-far / 1.2), 0.0).amax(1)
    heat = out["heat"][:, 0]
    p = heat.sigmoid()
    peak = bump > 0.999
    at_peak = -((1 - p).square() * F.logsigmoid(heat))[peak].sum()
    beside = -((1 - bump).pow(4) * p.square() * F.logsigmoid(-heat))[~peak].sum()
    total = (at_peak + beside) / here.sum()
    # Attributes are read at the middle and learnt there and beside it.
    row, slot = here.nonzero(as_tuple=True)
    move = torch.tensor([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)])
    xs = (gx[row, slot, None] + move[:, 0]).clamp(0, GRID - 1).flatten()
    ys = (gy[row, slot, None] + move[:, 1]).clamp(0, GRID - 1).flatten()
    row, slot = row.repeat_interleave(len(move)), slot.repeat_interleave(len(move))
    at = {k: v[row, :, ys, xs] for k, v in out.items()}
    sides = at["box"].clamp(max=3).exp() * 8
    middle = torch.stack([line[xs], line[ys]], -1)
    guess = torch.cat([middle - sides[:, :2], middle + sides[:, 2:]], -1)
    true = boxes[row, slot]
    whole = ~spoilt[row, slot]
    total = total + 4 * (1 - box_iou(guess, true)).mean() + 0.1 * (guess - true).abs().mean()
    shape = torch.where(whole, scenes.shape[row, slot], len(SHAPES))
    total = total + F.cross_entropy(at["shape"], shape) + F.cross_entropy(at["colour"], scenes.colour[row, slot])
    total = total + 0.5 * F.cross_entropy(at["size"], scenes.size[row, slot])
    textured = whole & (shape < CREATURE)
    total = total + F.cross_entropy(at["texture"][textured], scenes.texture[row, slot][textured])
    known = whole & (shape == CREATURE)
    if bool(known.any()):
        who = scenes.subject[row, slot][known]
        alike = F.normalize(at["subject"][known], dim=-1) @ F.normalize(judge.individuals, dim=-1).T
        alike = alike - 0.2 * F.one_hot(who, len(judge.individuals))
        total = total + 0.5 * F.cross_entropy(16 * alike, who)
    return total


# --------------------------------------------------------------------------------------------------------------------
# Who judges the judge


def _without(scenes: Scenes, part: str) -> tuple[Tensor, list[Prompt]]:
    """The last thing is not painted."""
    return painter.paint(scenes.change(count=scenes.count - 1), part).images, said(scenes)


def said(scenes: Scenes) -> list[Prompt]:
    """Prompts that say all of every scene but places."""
    names = list(COLOURS)
    return [
        painter.write(
            [
                Want(
                    names[int(scenes.colour[i, j])], SHAPES[int(scenes.shape[i, j])], SIZES[int(scenes.size[i, j])],
                    TEXTURES[int(scenes.texture[i, j])] if scenes.shape[i, j] < CREATURE else None,
                )
                for j in range(int(scenes.count[i]))
            ]
        )
        for i in range(len(scenes))
    ]  # fmt: skip


def _swapped(scenes: Scenes, part: str) -> tuple[Tensor, list[Prompt]]:
    colour, rgb = scenes.colour.clone(), scenes.rgb.clone()
    colour[:, :2], rgb[:, :2] = colour[:, [1, 0]], rgb[:, [1, 0]]
    return painter.paint(scenes.change(colour=colour, rgb=rgb), part).images, said(scenes)


def _doubled(scenes: Scenes, part: str) -> tuple[Tensor, list[Prompt]]:
    """Two of three things are alike, one of which nobody asked for."""
    twin = {}
    for name in ("shape", "colour", "texture", "subject", "glyph", "rgb", "size"):
        value = getattr(scenes, name).clone()
        value[:, 2] = value[:, 1]
        twin[name] = value
    few = [painter.write(p.wants[:2]) for p in said(scenes.change(**twin))]
    return painter.paint(scenes.change(**twin), part).images, few


def _smeared(scenes: Scenes, part: str) -> tuple[Tensor, list[Prompt]]:
    """The first thing is drawn out along a line, as no training picture is."""
    done = painter.paint(scenes, part)
    images = done.images
    kernel = torch.eye(13)[None, None].expand(3, 1, -1, -1) / 13
    smeared = F.conv2d(F.pad(images, (6,) * 4, mode="replicate"), kernel, groups=3)
    line = torch.arange(SIDE) + 0.5
    reach = scenes.radius[:, :1] + 3
    near = ((line - scenes.x[:, :1]).abs() < reach)[:, None, :] & ((line - scenes.y[:, :1]).abs() < reach)[:, :, None]
    return torch.where(near[:, None], smeared, images), said(scenes)


def _enough(want: Callable[[Scenes], Tensor], count: int, part: str) -> Scenes:
    scenes = painter.sample(torch.arange(50_000, 50_000 + 12 * count), part)
    rows = want(scenes).nonzero()[:, 0][:count]
    return scenes[rows]


def examine(judge: Judge, count: int = 1000, part: str = "test") -> dict[str, Any]:
    """Measure a judge on painted scenes whose truth is known.

    Args:
        judge: trained.
        count: scenes for each measurement.
        part: of scenes; settings were chosen on ``"dev"``.

    Returns:
        By name ``{"mean", "half", "n"}``, shares with 95 % intervals: ``colour``, ``shape`` (and of it ``geometric``,
        ``creatures``, ``digits``), ``size``, ``texture`` and
        ``box_iou`` of things, those that were not found being wrong, ``found``, ``count`` exact, ``right`` prompts on
        true pictures, ``subjects`` top-1 among the forty held-out individuals, and noticed failures: ``swapped``,
        ``missing``, ``doubled``, ``smeared``.
    """
    scenes = painter.sample(count, part)
    done = painter.paint(scenes, part)
    found = judge.look(done.images)
    seen: dict[str, list[float]] = {k: [] for k in ("colour", "shape", "size", "texture", "box_iou", "found", "count")}
    names = list(COLOURS)
    kinds: tuple[str, ...] = ("geometric", "creatures", "digits")
    seen |= {k: [] for k in kinds}
    for i, here in enumerate(found):
        n = int(scenes.count[i])
        seen["count"].append(float(len(here) == n))
        boxes = torch.tensor([f.box for f in here]).view(-1, 4)
        for j in range(n):
            overlap = box_iou(boxes, done.boxes[i, j]) if len(here) else torch.zeros(1)
            best = int(overlap.argmax())
            known = bool(overlap[best] > 0.5)  # what is not found counts as wrong in everything
            seen["found"].append(float(known))
            seen["box_iou"].append(float(overlap[best]))
            facts = {
                "colour": names[int(scenes.colour[i, j])], "shape": SHAPES[int(scenes.shape[i, j])],
                "size": SIZES[int(scenes.size[i, j])],
            }  # fmt: skip
            if scenes.shape[i, j] < CREATURE:
                facts["texture"] = TEXTURES[int(scenes.texture[i, j])]
            for name, fact in facts.items():
                seen[name].append(float(known and getattr(here[best], name) == fact))
            kind = kinds[(int(scenes.shape[i, j]) >= CREATURE) + (int(scenes.shape[i, j]) > CREATURE)]
            seen[kind].append(seen["shape"][-1])
    seen["right"] = [float(compare(f, p).right) for f, p in zip(found, said(scenes), strict=True)]
    held = range(painter.TRAIN_SUBJECTS, painter.SUBJECTS)
    gallery = judge.embeddings(painter.portraits(held, range(len(held)), part).images)
    asked = [n for n in held for _ in range(max(1, count // len(held)))]
    numbers = range(1000, 1000 + len(asked))
    queries = judge.embeddings(painter.portraits(asked, numbers, part).images)
    guesses = (queries @ gallery.T).argmax(-1) + painter.TRAIN_SUBJECTS
    seen["subjects"] = (guesses == torch.tensor(asked)).float().tolist()

    def distinct(s: Scenes) -> Tensor:
        return (s.count >= 2) & (s.colour[:, 0] != s.colour[:, 1]) & (s.shape[:, :2] < CREATURE).all(1)

    failures: dict[str, tuple[Callable[[Scenes], Tensor], Callable[..., tuple[Tensor, list[Prompt]]]]] = {
        "swapped": (distinct, _swapped), "missing": (lambda s: s.count >= 2, _without),
        "doubled": (lambda s: (s.count == 3) & (s.shape[:, 1] < CREATURE) & (s.size[:, 1] == 0), _doubled),
        "smeared": (lambda s: s.count >= 1, _smeared),
    }  # fmt: skip
    for name, (want, make) in failures.items():
        some = _enough(want, max(1, count // 2), part)
        images, prompts = make(some, part)
        seen[name] = [float(not v.right) for v in judge.judge(images, prompts)]
    return {k: interval(mean_interval(v)) for k, v in seen.items() if v}


#: What :func:`examine` must find, at least.
BARS = {
    "colour": 0.99, "shape": 0.99, "box_iou": 0.9, "count": 0.98, "subjects": 0.97, "swapped": 0.95, "missing": 0.95,
    "doubled": 0.95, "smeared": 0.95,
}  # fmt: skip
