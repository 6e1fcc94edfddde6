"""What a teacher of colour pictures is worth for segmenting pictures of low contrast: maps, features, or no teacher.

``attnlib bench --suite contrast --out benchmarks/results`` measures again what ``contrast-cpu.json`` holds and draws
it. A vision transformer learns to tell shapes apart in coloured scenes: the teacher. A narrower one, from nothing, is
taught by it on pictures without labels, half of them in colour, half grey and faint (half of the contrast, in
noise): its features, its last layer's attention maps, or those of its hybrid layer (UNIP), which has the information
nearest to a target. Then every student learns the grey task from the same few labelled pictures: what is nothing, what
belongs to a solid shape, to a ring, to a cross.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert import FeatureLoss, MapLoss, distill
from ...convert.distill import DistillationLoss
from ...look import hybrid_layer, information_by_layer
from ...models.build import create_model
from ...nn.layers import resize_map
from ..clock import machine
from ..data.masks import mean_iou, shape_scenes
from ..small import Progress, fit, picture, started_small, study

SIDE, PATCH = 32, 4
WIDTHS, DEPTHS, HEADS = {"teacher": 64, "student": 32}, {"teacher": 4, "student": 3}, 4
#: Contrast and noise of a faint picture, as shares of a coloured one's range.
FAINT, NOISE = 0.5, 0.02
#: Pixels from the middle of a shape, and the share of its colour that is its class's own.
RADIUS, TINT = (7.0, 13.0), 0.2
#: Of information, that of the hybrid layer.
TARGET = 0.09
#: Of a scene's classes: nothing; solid: disc, square, triangle; ring; cross.
KINDS, GROUPS = 4, torch.tensor([0, 1, 2, 1, 1, 3])

BASELINE = "no teacher"
NAMES = (BASELINE, "no teacher, as many steps", "features", "maps of the last layer", "maps of the hybrid layer")


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Coloured scenes about zero (B, 3, H, W), and classes (B, H, W)."""
    images, labels = shape_scenes(count, (SIDE, SIDE), 2, RADIUS, noise=0.05, tint=TINT, generator=generator)
    return (images - 0.5) / 0.25, GROUPS[labels]


def faint(images: Tensor, generator: torch.Generator) -> Tensor:
    """The same grey, with little contrast, in noise, stretched to the range of others."""
    grey = images.mean(1, keepdim=True) * FAINT
    grey = grey + NOISE / 0.25 * torch.randn(grey.shape, generator=generator)
    return (grey / grey.std((1, 2, 3), keepdim=True)).expand(-1, 3, -1, -1)


class Segmenter(nn.Module):
    """A vision transformer with a linear map of its final tokens, brought to the pixels."""

    def __init__(self, which: str, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.body = started_small(
            create_model(
                "vit_tiny_patch16_224", patch_size=PATCH, embed_dim=WIDTHS[which], depth=DEPTHS[which],
                num_heads=HEADS, num_classes=0, img_size=SIDE, class_token=False, global_pool="avg", fc_norm=False,
            ),
            seed,
        )  # fmt: skip
        self.head = nn.Linear(WIDTHS[which], KINDS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H, W, classes)."""
        body: Any = self.body
        (last,) = body.forward_intermediates(x, [-1], norm=True, intermediates_only=True)
        return resize_map(self.head(last.permute(0, 2, 3, 1)), x.shape[2:])


def _loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = given
    return F.cross_entropy(model(x).flatten(0, 2), labels.flatten())


@torch.no_grad()
def score(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Mean intersection over union, in percent."""
    found = torch.cat([model.eval()(part).argmax(-1) for part in x.split(100)])
    return mean_iou(found, labels, KINDS)


def _mixed(count: int, generator: torch.Generator) -> Tensor:
    """Pictures without labels: half in colour, half faint."""
    images, _ = scenes(count, generator)
    return torch.cat([images[: count // 2], faint(images[count // 2 :], generator)])


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    teacher_steps: int = 400,
    taught_steps: int = 250,
    steps: int = 300,
    batch: int = 24,
    labelled: int = 200,
    tested: int = 400,
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, Any]:
    """Train a teacher per seed, teach every student, and let it learn the faint task.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``contrast-cpu.svg``.
        teacher_steps, taught_steps, steps, batch: of the teacher, of teaching, and of the faint task.
        labelled, tested: faint pictures with labels, and those of the test.
        seeds: of everything.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {
        "what": "segmentation of low contrast after a teacher of colour", "machine": machine(),
        "teacher_steps": teacher_steps, "taught_steps": taught_steps, "steps": steps, "batch": batch,
        "labelled": labelled, "tested": tested,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1234)
    images, labels = scenes(tested, generator)
    test, coloured = (faint(images, generator), labels), (images, labels)
    # A model that says "nothing" everywhere.
    result["chance"] = mean_iou(torch.zeros_like(labels), labels, KINDS)

    @functools.cache
    def teacher(seed: int) -> tuple[Segmenter, dict[int | str, float]]:
        model = Segmenter("teacher", seed)
        fit(model, lambda g: scenes(batch, g), _loss, teacher_steps, lr=2e-3, seed=seed)
        model.eval()
        return model, information_by_layer(model.body, images[:100].split(50))

    def lesson(name: str, information: dict[int | str, float]) -> DistillationLoss | None:
        if name == "features":
            return FeatureLoss((WIDTHS["student"], WIDTHS["teacher"]))
        if name == "maps of the last layer":
            return MapLoss()
        if name == "maps of the hybrid layer":
            return MapLoss(teacher=int(hybrid_layer(information, TARGET)))
        return None

    def run(name: str, seed: int) -> dict[str, float]:
        own, information = teacher(seed)
        model = Segmenter("student", seed)
        loss = lesson(name, information)
        found = {"teacher, colour": score(own, *coloured)}
        if loss is not None:
            torch.manual_seed(seed)
            taught = distill(model.body, own.body, loss)
            losses = fit(
                taught, lambda g: _mixed(batch, g), lambda m, x: m(x)["total"], taught_steps, lr=2e-3, seed=seed
            )
            found |= {"taught from": losses[0], "taught to": sum(losses[-20:]) / len(losses[-20:])}
        drawn = torch.Generator().manual_seed(seed)
        few, truth = scenes(labelled, drawn)
        few = faint(few, drawn)

        def draw(g: torch.Generator) -> tuple[Tensor, Tensor]:
            at = torch.randint(labelled, (batch,), generator=g)
            return few[at], truth[at]

        count = steps + taught_steps if name == NAMES[1] else steps
        losses = fit(model, draw, _loss, count, lr=3e-3, seed=seed)
        assert all(map(math.isfinite, losses))
        layer = hybrid_layer(information, TARGET)
        return {
            "IoU": score(model, *test),
            **found,
            "hybrid layer": float(layer),
            "its information": information[layer],
        }

    key = (teacher_steps, taught_steps, steps, batch, labelled, tested)
    result |= study(list(NAMES), run, "IoU", BASELINE, seeds, progress, keep, key)
    if pictures is not None:
        points = [(row["name"], row["IoU"]["mean"], row["IoU"]["half"]) for row in result["rows"]]
        picture(
            Path(pictures) / "contrast-cpu.svg", {"": points}, "", "mean IoU, %",
            "pictures of low contrast, segmented after a teacher of colour",
        )  # fmt: skip
    return result
