"""A second encoder that knows junctions: what its maps add beside a model's own tokens, and what their gates do.

``attnlib bench --suite multimodal-models-geometry --out benchmarks/results`` writes
``multimodal-models-geometry-cpu.json`` and its picture. Line drawings (:mod:`attnlib.bench.worlds.geometry`) are seen
at a third of their size by a small tower; a pyramid of convolutions was trained on junctions and boundaries at full
size, as SVE-Math's is on primitives, and is frozen. A reader behind the projector counts T junctions, crossings and
figures. Its tokens are the tower's alone, the tower's and the pyramid's side by side without a router, or routed
(:mod:`attnlib.models.multimodal.sve_math`) with gates behind or before the norm. In a second world one
level of the pyramid is noise in half the pictures, so that a gate per picture has something to close.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....models.multimodal.sve_math import FeatureRouter, RoutedProjector
from ....nn.layers import resize_map
from ...clock import machine
from ...small import Progress, fit, parameters, picture, study, told
from ...worlds.geometry import JUNCTIONS, make_drawing

QUESTION = "Do maps of an encoder that knows junctions help to count them, and does it matter where their gates stand?"

SIDE, TOKENS, DIM, LEVEL, LEVELS, WIDE = 96, 8, 32, 24, 3, 48
#: What is counted, and the largest number told apart.
COUNTED = {"T junctions": 2, "crossings": 5, "figures": 3}
#: The level that is noise in half the pictures, where one is.
BROKEN = 1
WAYS = ("side by side", "router, gate behind the norm", "router, gate before the norm")
WORLDS = ("whole", "noisy")
CONTESTANTS = ("own tower", *(f"{way}, {world}" for world in WORLDS for way in WAYS))


class Drawings(NamedTuple):
    """Pictures (B, 3, 96, 96), what the pyramid learns (B, 4, 24, 24), and counts (B, 3)."""

    images: Tensor
    marks: Tensor
    counts: Tensor


@functools.lru_cache(maxsize=4)
def drawings(first: int, count: int, part: str) -> Drawings:
    """Some drawings."""
    images, marks, counts = [], [], []
    for i in range(count):
        drawn = make_drawing(first + i, part, SIDE)
        at = torch.stack([*(drawn.heat(kind, 1.5) for kind in JUNCTIONS), drawn.boundary.float()])
        kinds = [j.kind for j in drawn.junctions]
        found = (kinds.count("T"), kinds.count("X"), len(drawn.polygons))
        images.append(drawn.image)
        marks.append(F.max_pool2d(at, SIDE // 24))
        counts.append([min(n, most) for n, most in zip(found, COUNTED.values(), strict=True)])
    return Drawings(torch.stack(images), torch.stack(marks), torch.tensor(counts))


class Pyramid(nn.Module):
    """(B, 3, 96, 96) -> maps of strides 4, 8 and 16, (B, h, w, 24) each, and a head of marks on the finest."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 16, 24, 32, 32)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 1, 1), nn.ReLU())
            for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.side = nn.ModuleList(nn.Conv2d(c, LEVEL, 1) for c in sizes[2:])
        self.smooth = nn.ModuleList(nn.Conv2d(LEVEL, LEVEL, 3, 1, 1) for _ in range(LEVELS))
        self.head = nn.Conv2d(LEVEL, len(JUNCTIONS) + 1, 1)
        self.register_buffer("mean", torch.zeros(LEVELS, LEVEL))
        self.register_buffer("std", torch.ones(LEVELS, LEVEL))

    def levels(self, images: Tensor) -> list[Tensor]:
        """The maps, finest first."""
        held, x = [], images
        for block in self.down:
            x = block(x)
            held.append(x)
        out: list[Tensor] = []
        for i in reversed(range(LEVELS)):
            y = self.side[i](held[i + 1])
            out.insert(0, y if not out else y + F.interpolate(out[0], y.shape[-2:], mode="nearest"))
        return [smooth(y).permute(0, 2, 3, 1) for smooth, y in zip(self.smooth, out, strict=True)]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 4, 24, 24) logits of marks."""
        return self.head(self.levels(images)[0].permute(0, 3, 1, 2))


class _SideBySide(nn.Module):
    """Tokens and levels, in the places of the tokens, through one projector."""

    def __init__(self) -> None:
        super().__init__()
        wide = DIM + LEVELS * LEVEL
        self.project = nn.Sequential(nn.Linear(wide, 2 * WIDE), nn.GELU(), nn.Linear(2 * WIDE, WIDE))

    def forward(self, x: Tensor, levels: Sequence[Tensor]) -> Tensor:
        fine = [resize_map(level, (TOKENS, TOKENS), "nearest").flatten(1, 2) for level in levels]
        return self.project(torch.cat([x, *fine], -1))


class Reader(nn.Module):
    """Counts, by a tower of 8 x 8 tokens, a projector and a block in which one query per question reads."""

    def __init__(self, way: str):
        super().__init__()
        self.tower = nn.Sequential(
            nn.AvgPool2d(3), nn.Conv2d(3, DIM, 3, 2, 1), nn.ReLU(), nn.Conv2d(DIM, DIM, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(DIM, DIM, 1),
        )  # fmt: skip
        self.places = nn.Parameter(0.2 * torch.randn(1, TOKENS**2, DIM))
        options: dict[str, Any] = dict(dim=DIM, level_dim=LEVEL, levels=LEVELS)
        self.plain = nn.Sequential(nn.Linear(DIM, WIDE), nn.GELU(), nn.Linear(WIDE, WIDE)) if way == WAYLESS else None
        if way == "side by side":
            self.projector: Any = _SideBySide()
        elif way != WAYLESS:
            self.projector = RoutedProjector(FeatureRouter(**options, gate=_gate(way)), WIDE)
        self.asked = nn.Parameter(0.2 * torch.randn(1, len(COUNTED), WIDE))
        layer = nn.TransformerEncoderLayer(WIDE, 4, 2 * WIDE, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.heads = nn.ModuleList(nn.Linear(WIDE, most + 1) for most in COUNTED.values())

    def forward(self, images: Tensor, levels: Sequence[Tensor]) -> list[Tensor]:
        """Logits (B, most + 1) of every count."""
        x = self.tower(images).flatten(2).transpose(1, 2) + self.places
        x = self.plain(x) if self.plain is not None else self.projector(x, levels)
        y = self.blocks(torch.cat([self.asked.expand(len(x), -1, -1), x], 1))
        return [head(y[:, i]) for i, head in enumerate(self.heads)]

    def gates(self, images: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """(B, levels) of a routed reader."""
        x = self.tower(images).flatten(2).transpose(1, 2) + self.places
        return self.projector.router(x, levels).gates


WAYLESS = "own tower"


def _gate(way: str) -> str:
    return "before" if "before" in way else "after"


@functools.lru_cache(maxsize=1)
@torch.enable_grad()
def pyramid(count: int, steps: int) -> Pyramid:
    """The pyramid, trained on junctions and boundaries; frozen."""
    torch.manual_seed(0)
    model, data = Pyramid(), drawings(0, count, "train")
    weight = torch.tensor([8.0, 8.0, 8.0, 1.0]).view(1, -1, 1, 1)  # junctions are rare

    def batch(g: torch.Generator) -> Drawings:
        at = torch.randint(len(data.images), (32,), generator=g)
        return Drawings(*(t[at] for t in data))

    fit(
        model, batch, lambda m, b: F.binary_cross_entropy_with_logits(m(b.images), b.marks, pos_weight=weight), steps,
        3e-3,
    )  # fmt: skip
    model.eval().requires_grad_(False)
    for i, level in enumerate(model.levels(data.images[:200])):
        model.mean[i], model.std[i] = level.mean((0, 1, 2)), level.std((0, 1, 2))
    return model


class Seen(NamedTuple):
    """Pictures, levels of the pyramid, which pictures have a noisy one, and counts."""

    images: Tensor
    levels: list[Tensor]
    noisy: Tensor
    counts: Tensor

    def at(self, rows: Tensor) -> Seen:
        """Some of them."""
        return Seen(self.images[rows], [level[rows] for level in self.levels], self.noisy[rows], self.counts[rows])


@functools.lru_cache(maxsize=4)
@torch.no_grad()
def seen(first: int, part: str, count: int, world: str, pool: int, steps: int) -> Seen:
    """What readers get: features are computed once."""
    model, data = pyramid(pool, steps), drawings(first, count, part)
    parts = [model.levels(chunk) for chunk in data.images.split(100)]
    levels = [torch.cat(level) for level in zip(*parts, strict=True)]
    levels = [(level - m) / s for level, m, s in zip(levels, model.mean, model.std, strict=True)]
    g = torch.Generator().manual_seed(first + (part == "train"))
    noisy = torch.zeros(count, dtype=torch.bool)
    if world == "noisy":
        noisy = torch.rand(count, generator=g) < 0.5
        noise = 1.0 + 2.0 * torch.randn(levels[BROKEN].shape, generator=g)
        levels[BROKEN] = torch.where(noisy.view(-1, 1, 1, 1), noise, levels[BROKEN])
    return Seen(data.images, levels, noisy, data.counts)


def measured(
    name: str, seed: int, part: str = "test", tests: int = 300, count: int = 1500, steps: int = 150,
    pyramid_steps: int = 120,
) -> dict[str, float]:  # fmt: skip
    """Shares of right counts on other drawings, and what the gates are."""
    way, _, world = name.rpartition(", ") if name != WAYLESS else (name, "", "whole")
    data = seen(0, "train", count, world, count, pyramid_steps)
    torch.manual_seed(seed + 1)
    model = Reader(way)

    def batch(g: torch.Generator) -> Seen:
        return data.at(torch.randint(count, (32,), generator=g))

    def loss(m: nn.Module, b: Seen) -> Tensor:
        said = m(b.images, b.levels)
        return torch.stack([F.cross_entropy(s, b.counts[:, i]) for i, s in enumerate(said)]).mean()

    fit(model, batch, loss, steps, 2e-3, seed)
    model.eval()
    asked = seen(seed * 100_000, part, tests, world, count, pyramid_steps)
    with torch.no_grad():
        said = torch.stack([s.argmax(-1) for s in model(asked.images, asked.levels)], 1)
        right = 100 * (said == asked.counts).float()
        out = {"right": float(right.mean()), **{n: float(right[:, i].mean()) for i, n in enumerate(COUNTED)}}
        usual = torch.stack([asked.counts[:, i].bincount().max() for i in range(len(COUNTED))])
        out["always the commonest"] = 100 * float(usual.float().mean()) / tests
        out["parameters"] = float(parameters(model))
        if way.startswith("router"):
            gates = model.gates(asked.images, asked.levels)
            for i in range(LEVELS):
                out[f"gate {i}"] = float(gates[:, i].mean())
            if world == "noisy":
                out["gate of noise"] = float(gates[asked.noisy, BROKEN].mean())
                out["gate of the same level without"] = float(gates[~asked.noisy, BROKEN].mean())
    return out


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of a page."""
    lines = [
        f"| tokens, pyramid | right % | against the side by side one | {' | '.join(COUNTED)} | gates by level |",
        "|---" * (4 + len(COUNTED)) + "|",
    ]
    for row in rows:
        gates = ", ".join(f"{row[f'gate {i}']['mean']:.2f}" for i in range(LEVELS)) if "gate 0" in row else ""
        if "gate of noise" in row:
            gates += f" (noise {row['gate of noise']['mean']:.2f}, else "
            gates += f"{row['gate of the same level without']['mean']:.2f})"
        against = told(row, "against") if row.get("against") else ""
        cells = [told(row, "right"), against, *(told(row, n) for n in COUNTED), gates]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    part: str = "test",
    tests: int = 300,
    count: int = 1500,
    steps: int = 150,
    pyramid_steps: int = 120,
) -> dict[str, Any]:
    """Every contestant on the same drawings.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``multimodal-models-geometry-cpu.svg``.
        seeds: of readers and of the drawings that are asked about; the pyramid and what is learnt from are one.
        part: of the drawings that are asked about.
        tests: drawings to ask about.
        count, steps, pyramid_steps: drawings to learn from, updates of readers and of the pyramid.

    Returns:
        Plain values, for JSON: rows with intervals over seeds; in each world differences paired with the tokens and
        levels side by side.
    """
    given: dict[str, Any] = dict(part=part, tests=tests, count=count, steps=steps, pyramid_steps=pyramid_steps)
    result: dict[str, Any] = {"question": QUESTION, **given}
    for world in WORLDS:
        names = [WAYLESS] * (world == "whole") + [f"{way}, {world}" for way in WAYS]
        result[world] = study(
            names, lambda name, seed: measured(name, seed, **given), "right", f"{WAYS[0]}, {world}", seeds, progress,
            keep, key=["geometry", given],
        )  # fmt: skip
    if pictures is not None:
        curves = {
            world: [(_short(r["name"]), r["right"]["mean"], r["right"]["half"]) for r in result[world]["rows"]]
            for world in WORLDS
        }
        picture(
            Path(pictures) / "multimodal-models-geometry-cpu.svg", curves, "", "counts that are right, %",
            "Counting junctions with a second encoder",
        )  # fmt: skip
    return {**result, "machine": machine()}


def _short(name: str) -> str:
    return name if name == WAYLESS else name.rpartition(", ")[0].removeprefix("router, ")
