"""How many clicks it takes: InterFormer on generated scenes, with and without the image, with all clicks and with one.

``attnlib bench --suite clicks --out benchmarks/results`` measures again what ``clicks-cpu.json`` holds and draws it.
In scenes of 64 x 64 pixels coloured discs, rectangles and triangles lie over each other, under noise; one of them, as
far as it is seen, is wanted. The encoder of a small InterFormer first learns to tell the colours of the picture (as the
authors' was pretrained, by masks), then all of it learns from simulated users, and it is tested with others that click
at the deepest error. It is held against the same model without the image, whose maps are zeros so that clicks and
earlier predictions are all it has, and against itself when it is told of the first click alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.dense.clicks import interact, number_of_clicks
from ...models.dense.interformer import Encoded, InterFormer
from ..clock import machine
from ..small import Progress, fit, picture, study

SIDE, RADIUS, MOST = 64, 3, 10
THRESHOLDS = (0.7, 0.8, 0.85)
FULL, BLIND, FIRST = "InterFormer", "without the image", "first click only"


class Blind(InterFormer):
    """The same model, whose maps of the image are zeros."""

    def encode(self, images: Tensor) -> Encoded:
        held = super().encode(images)
        return Encoded(tuple(0 * m for m in held.maps), held.size)


def build(name: str) -> InterFormer:
    """A contestant, as small as it goes."""
    cls = Blind if name == BLIND else InterFormer
    return cls(
        embed_dim=96, depth=2, num_heads=4, mlp_ratio=2.0, dims=(16, 24, 32, 48), imsa_heads=(1, 2, 2, 4),
        imsa_depths=(2, 2, 2, 1), refine_from=(2, 2, 2, 1), imsa_mlp_ratio=(4, 4, 2, 2),
        pool_ratios=((2, 4, 8), (1, 2, 4), (1, 2), (1,)), width=24, img_size=SIDE, drop_path_rate=0.0, drop_rate=0.0,
        auxiliary=False,
    )  # fmt: skip


class Learner(nn.Module):
    """A model beside a linear map from its finest map of the image to colours, which both learn."""

    def __init__(self, model: InterFormer):
        super().__init__()
        self.model, self.read = model, nn.Linear(model.imsa.dims[0], 3)

    def _colours(self, held: Encoded, images: Tensor) -> Tensor:
        true = F.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return (self.read(held.maps[0]) - true).square().mean()

    def colours(self, images: Tensor) -> Tensor:
        """Mean squared error of the colours alone."""
        return self._colours(self.model.encode(images), images)

    def forward(self, given: dict[str, Any]) -> Tensor:
        """The loss behind simulated clicks, and that of the colours."""
        images, target, model = given["images"], given["target"], self.model
        label = model.clicked_labels(images, target, given["generator"], 5, radius=RADIUS)
        held = model.encode(images)
        focal = model.loss(model.decode(held, label), target)["focal"]
        return focal + self._colours(held, images)


def scenes(count: int, generator: torch.Generator, things: int = 3, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Pictures and the thing in each that is wanted.

    Args:
        count: pictures.
        generator: of what is drawn.
        things: in each, the later over the earlier.
        side: pixels per side.

    Returns:
        (count, 3, side, side) around 0, and (count, side, side) whole numbers, 1 where the wanted thing is seen: at
        least 60 pixels of it.
    """
    rows = torch.arange(side)[:, None].float()
    columns = torch.arange(side).float()
    pictures: list[Tensor] = []
    targets: list[Tensor] = []
    while len(pictures) < count:
        picture, owner = torch.rand(3, 1, 1, generator=generator).expand(3, side, side).clone(), torch.zeros(side, side)
        for number in range(1, things + 1):
            kind, y, x, a, b, *colour = torch.rand(8, generator=generator).tolist()
            y, x, a, b = side * (0.15 + 0.7 * y), side * (0.15 + 0.7 * x), side * (0.1 + 0.15 * a), 0.7 + 0.6 * b
            dy, dx = (rows - y) / (a * b), (columns - x) / (a / b)
            if kind < 1 / 3:
                inside = dy**2 + dx**2 <= 1
            elif kind < 2 / 3:
                inside = (dy.abs() <= 0.85) & (dx.abs() <= 0.85)
            else:
                inside = (dy <= 0.8) & (dy >= 2 * dx.abs() - 1)
            picture[:, inside] = torch.tensor(colour[:3])[:, None]
            owner[inside] = number
        wanted = int(torch.randint(1, things + 1, (1,), generator=generator))
        target = (owner == wanted).long()
        if int(target.sum()) < 60:
            continue
        pictures.append(picture + 0.05 * torch.randn(3, side, side, generator=generator))
        targets.append(target)
    return torch.stack(pictures) - 0.5, torch.stack(targets)


@torch.no_grad()
def tested(model: InterFormer, images: Tensor, targets: Tensor, first_only: bool = False) -> list[list[float]]:
    """Overlaps behind every click, per picture.

    Args:
        model: trained.
        images, targets: as of :func:`scenes`.
        first_only: the model is told of the first click, and of nothing that follows.
    """
    model.eval()
    out = []
    for image, target in zip(images, targets, strict=True):
        session = model.session(image)
        told: list[Tensor] = []

        def predict(label: Tensor, session: Any = session, told: list[Tensor] = told) -> Tensor:
            told.append(label)
            return session.answer(told[0] if first_only else label)

        out.append(interact(predict, target, MOST, RADIUS).overlaps)
    return out


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 500,
    batch: int = 8,
    seeds: tuple[int, ...] = (0, 1, 2),
    count: int = 60,
) -> dict[str, Any]:
    """Train both models with every seed and count clicks.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``clicks-cpu.svg``.
        steps, batch, seeds: of training.
        count: pictures of the test, the same for all.

    Returns:
        Plain values, for JSON: per contestant NoC at every threshold (``MOST`` clicks where it is not reached) and the
        mean overlap behind every click; ``against`` is the gap from InterFormer in NoC at 0.8.
    """
    images, targets = scenes(count, torch.Generator().manual_seed(999))
    trained: dict[tuple[bool, int], InterFormer] = {}

    def model_of(name: str, seed: int) -> InterFormer:
        which = (name == BLIND, seed)
        if which not in trained:
            torch.manual_seed(seed)
            model = build(name)

            learner = Learner(model)

            def draw(generator: torch.Generator) -> dict[str, Any]:
                drawn = scenes(batch, generator)
                return {"images": drawn[0], "target": drawn[1], "generator": generator}

            fit(
                learner, draw, lambda _, given: learner.colours(given["images"]), max(1, steps // 3), lr=2e-3, seed=seed
            )
            fit(learner, draw, lambda m, given: m(given), steps, lr=2e-3, seed=seed + 100)
            trained[which] = model
        return trained[which]

    def run(name: str, seed: int) -> dict[str, float]:
        overlaps = tested(model_of(name, seed), images, targets, name == FIRST)
        noc = {
            f"noc_{round(100 * t)}": sum(number_of_clicks(o, t) for o in overlaps) / count for t in THRESHOLDS
        }  # fmt: skip
        return noc | {f"overlap_{i + 1}": 100 * sum(o[i] for o in overlaps) / count for i in range(MOST)}

    found = study((FULL, BLIND, FIRST), run, "noc_80", FULL, seeds, progress, keep, (steps, batch, count))
    if pictures is not None:
        curves = {
            row["name"]: [(i, row[f"overlap_{i}"]["mean"], row[f"overlap_{i}"]["half"]) for i in range(1, MOST + 1)]
            for row in found["rows"]
        }
        picture(
            Path(pictures) / "clicks-cpu.svg", curves, "clicks", "mean intersection over union, %",
            "a simulated user on generated scenes", dashed=(BLIND, FIRST),
        )  # fmt: skip
    return {
        "what": "clicks until a thing in a generated scene is found", "machine": machine(), "steps": steps,
        "batch": batch, "pictures": count, "most_clicks": MOST, **found,
    }  # fmt: skip
