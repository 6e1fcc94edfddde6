"""In the dark: does an enhancer trained by nothing but a detector's loss help it, against a gamma curve and nothing.

Handwritten digits on crops of photographs, exposed too short: light is scaled down by another factor in every picture,
counted photon by photon, read with noise, and kept as a camera keeps it, in eight bits under its own curve. One small
detector behind FeatEnHancer, behind a fixed gamma curve, behind plain convolutions of the same place, and behind
nothing. Photographs and digits of the test are none of the training's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....models.detect.featenhancer import Enhanced, FeatEnHancer
from ...clock import machine
from ...data.files import photos
from ...data.worlds import digit_glyphs
from ...small import Progress, fit, parameters, picture, sheet, study
from ._detectors import (
    Batch,
    detection_loss,
    detector,
    drawn,
    found_by,
    markdown,
    mean_precision,
    shown,
    true_boxes,
)

QUESTION = "Does FeatEnHancer before a small detector find more in the dark than a gamma curve, or nothing, does?"
NAMES = ("nothing", "gamma curve", "convolutions", "FeatEnHancer")
BASELINE = "gamma curve"
SIDE, DIGIT, MOST = 40, 14, 3
#: Least and largest share of the light, photons that a white pixel of a bright picture counts, noise of reading.
EXPOSURE, PHOTONS, READ = (0.003, 0.05), 1000.0, 0.002
#: A camera's curve, and the fixed one that brightens.
CAMERA, GAMMA = 2.2, 0.45


class Gamma(nn.Module):
    """``x ** GAMMA``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) ** GAMMA


class Convolutions(nn.Module):
    """``x + tanh(...)`` of four 3 x 3 convolutions at full resolution: what an enhancer's place and cost give alone."""

    def __init__(self, dim: int = 16):
        super().__init__()
        widths = (3, dim, dim, dim, 3)
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.layers(x)
        return y


def exposures(count: int, generator: torch.Generator) -> Tensor:
    """(count,) shares of the light, their logarithms evenly spread."""
    low, high = (torch.tensor(e).log() for e in EXPOSURE)
    return (low + (high - low) * torch.rand(count, generator=generator)).exp()


def in_the_dark(light: Tensor, exposure: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures (n, 3, H, W) in [0, 1] as a camera keeps them after too short exposures (n,)."""
    share = exposure[:, None, None, None]
    counted = torch.poisson(light**CAMERA * share * PHOTONS, generator=generator) / PHOTONS
    counted = counted + READ * torch.randn(light.shape, generator=generator)
    return (255 * counted.clamp(0, 1) ** (1 / CAMERA)).round() / 255


@functools.lru_cache(maxsize=4)
def pictures_of(count: int, part: str) -> tuple[Batch, Tensor, Tensor]:
    """Dark pictures with their digits, the same in daylight, and their exposures.

    Args:
        count: pictures.
        part: ``"train"``, ``"dev"`` (of training's photographs and digits, too) or ``"test"``.
    """
    generator = torch.Generator().manual_seed(("train", "dev", "test").index(part))
    held = photos()
    some = [F.interpolate(p.permute(2, 0, 1)[None].float() / 255, scale_factor=0.4, mode="area")[0]
            for p in (held.test if part == "test" else held.train)]  # fmt: skip
    glyphs, _ = digit_glyphs("test" if part == "test" else "train", DIGIT)
    light, targets = torch.zeros(count, 3, SIDE, SIDE), []

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for i, image in enumerate(light):
        photo = some[i % len(some)]
        top, left = draw(0, photo.shape[1] - SIDE + 1), draw(0, photo.shape[2] - SIDE + 1)
        image[:] = photo[:, top : top + SIDE, left : left + SIDE]
        boxes: list[list[float]] = []
        wanted = draw(1, MOST + 1)
        for _ in range(20):
            if len(boxes) == wanted:
                break
            y, x = draw(0, SIDE - DIGIT + 1), draw(0, SIDE - DIGIT + 1)
            if any(abs(y - b[1]) < DIGIT and abs(x - b[0]) < DIGIT for b in boxes):
                continue
            ink, place = glyphs[draw(0, len(glyphs))], image[:, y : y + DIGIT, x : x + DIGIT]
            colour = torch.rand(3, 1, 1, generator=generator) * 0.3 + (0.7 if place.mean() < 0.5 else 0.0)
            place[:] = place * (1 - ink) + colour * ink
            boxes.append([x, y, x + DIGIT, y + DIGIT])
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.zeros(len(boxes), dtype=torch.long)})
    exposure = exposures(count, generator)
    return ((in_the_dark(light, exposure, generator),), targets), light, exposure


def contestant(name: str) -> Enhanced:
    """A detector behind what one of :data:`NAMES` says."""
    before: dict[str, Any] = {
        "nothing": nn.Identity, "gamma curve": Gamma, "convolutions": Convolutions,
        "FeatEnHancer": lambda: FeatEnHancer(dim=8),
    }  # fmt: skip
    return Enhanced(detector(1), before[name]())


def train(name: str, seed: int, steps: int, trained: int) -> Enhanced:
    """A contestant, trained."""
    torch.manual_seed(seed)
    model = contestant(name)
    pool = pictures_of(trained, "train")[0]
    fit(model, lambda g: drawn(pool, 16, g), detection_loss, steps, lr=5e-3, seed=seed)
    return model.eval()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    trained: int = 768,
    tested: int = 256,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
) -> dict[str, Any]:
    """Train the detector behind each.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-dark-cpu.svg``, and ``tasks-dark-cpu.png``, what some of them see.
        steps: of training, 16 pictures each.
        trained, tested: pictures of training and of the test.
        seeds: of weights and batches.

    Returns:
        Plain values, for JSON.
    """
    (images, targets), light, exposure = pictures_of(tested, "test")
    darker = exposure < exposure.median()
    split = {"darker": [i for i in range(tested) if darker[i]], "brighter": [i for i in range(tested) if not darker[i]]}
    models: dict[str, Enhanced] = {}  # of the first seed, for the pictures

    def run(name: str, seed: int) -> dict[str, float]:
        model = train(name, seed, steps, trained)
        if seed == seeds[0]:
            models[name] = model
        found = found_by(model, images)
        out = {"precision": mean_precision(found, targets, 1)}
        out |= {k: mean_precision([found[i] for i in v], [targets[i] for i in v], 1) for k, v in split.items()}
        return out | {"parameters": parameters(model)}

    result: dict[str, Any] = {"question": QUESTION, "machine": machine(), "steps": steps, "trained": trained}
    result |= {"tested": tested, "exposure": list(EXPOSURE), "photons": PHOTONS, "read noise": READ, "gamma": GAMMA}
    key = ("by exposure", steps, trained, tested, EXPOSURE, PHOTONS, READ, GAMMA)
    result |= study(NAMES, run, "precision", BASELINE, seeds, progress, keep, key)
    if pictures is not None:
        curves = {
            row["name"]: [(what, row[key]["mean"], row[key]["half"]) for what, key in (
                ("all", "precision"), ("darker half", "darker"), ("brighter half", "brighter"))]
            for row in result["rows"]
        }  # fmt: skip
        picture(
            Path(pictures) / "tasks-dark-cpu.svg", curves, "", "average precision at overlap 0.5, %",
            "digits in the dark, by what stands before the detector",
        )  # fmt: skip
        for name in (BASELINE, "FeatEnHancer"):
            if name not in models:
                models[name] = train(name, seeds[0], steps, trained)
        _seen(Path(pictures) / "tasks-dark-cpu.png", models, images[0], targets, light)
    return result


def _seen(
    path: Path, models: Mapping[str, Enhanced], images: Tensor, targets: Sequence[Mapping[str, Tensor]], light: Tensor
) -> None:
    """Five pictures: as they come, in daylight, as the gamma curve and the enhancer show them, with what is found."""
    some = list(range(min(5, len(images))))
    rows = {"given": images[some], "truth, in daylight": true_boxes(light[some], [targets[i] for i in some])}
    for name in (BASELINE, "FeatEnHancer"):
        model = models[name]
        found = model.predict(images[some], threshold=0.02, most=12, overlap=0.5)
        with torch.no_grad():
            read = model.enhanced(images[some])
        low, high = read.amin((1, 2, 3), True), read.amax((1, 2, 3), True)
        rows[f"read behind {name}"] = shown((read - low) / (high - low).clamp(min=1e-6), found)
    sheet(path, rows, colours=64)


def table(part: Mapping[str, Any]) -> str:
    """Rows as a table in Markdown."""
    heads = ("before the detector", "precision, %", "against the gamma curve", "darker half", "brighter half",
             "parameters")  # fmt: skip
    return markdown(heads, part, ("precision", "against", "darker", "brighter", "parameters"))


#: Tables of the page: by name, the part of the result, and what writes it.
TABLES = {"dark": ("", table)}

__all__ = ["Convolutions", "Gamma", "contestant", "exposures", "in_the_dark", "measure", "pictures_of", "table"]
