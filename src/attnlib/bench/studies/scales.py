"""One frozen tower on several scales of an image (S2), beside one scale.

``attnlib bench --suite scales --out benchmarks/results`` measures again what ``scales-cpu.json`` holds and draws it.
A small vision transformer learns handwritten digits in images of 16 x 16 pixels and is frozen. Then images have 48 x 48
pixels, with one digit that fills them and a small one, which an image shrunk to 16 x 16 no longer shows. Features of
the shrunk image, of four tiles of the image at 32 x 32 and of nine of the image itself (Shi et al., 2024, arXiv
2403.13043) are averaged and put side by side, and a linear map tells either digit. Held against: the tower on the
shrunk image alone, on the nine tiles alone, and on tiles of the shrunk image made large again, which hold nothing new.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models.multiscale import MultiScale
from ...models.pretrain import last_map
from ..clock import machine
from ..data.worlds import digit_glyphs
from ..probing import cached_tokens, linear
from ..small import Progress, accuracy, fit, picture, small_vit, study

OWN, TIMES, PATCH, LARGE, SMALL, NOISE = 16, 3, 4, 42, 12, 0.1
SIDE = OWN * TIMES
ONE, TWO, THREE = "1", "1, 2", "1, 2, 3"
ALONE, ENLARGED = "3 alone", "1, 2, 3, no new detail"
NAMES = ONE, TWO, THREE, ALONE, ENLARGED
#: Scales of images of SIDE pixels.
OF = {ONE: (1 / 3,), TWO: (1 / 3, 2 / 3), THREE: (1 / 3, 2 / 3, 1), ALONE: (1,), ENLARGED: (1, 2, 3)}
SIZES = 10, 13, 16


def known(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits of several sizes in images (count, 1, OWN, OWN), and which they are."""
    images = NOISE * torch.randn(count, OWN, OWN, generator=generator)
    labels = torch.empty(count, dtype=torch.long)
    for i, size in enumerate(torch.randint(len(SIZES), (count,), generator=generator).tolist()):
        side = SIZES[size]
        digits, classes = digit_glyphs("train", side)
        which = int(torch.randint(len(digits), (), generator=generator))
        top, left = torch.randint(OWN - side + 1, (2,), generator=generator).tolist()
        images[i, top : top + side, left : left + side] += digits[which]
        labels[i] = classes[which]
    return images.unsqueeze(1), labels


def pairs(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 1, SIDE, SIDE) of a large digit and a small one inside a tile, and which they are (count, 2)."""
    images = NOISE * torch.randn(count, SIDE, SIDE, generator=generator)
    (large, classes), (small, _) = digit_glyphs(part, LARGE), digit_glyphs(part, SMALL)
    which = torch.randint(len(classes), (count, 2), generator=generator)
    corners = torch.randint(SIDE - LARGE + 1, (count, 2), generator=generator).tolist()
    tiles = torch.randint(TIMES, (count, 2), generator=generator)
    places = (OWN * tiles + torch.randint(OWN - SMALL + 1, (count, 2), generator=generator)).tolist()
    for i, ((a, b), (top, left), (row, column)) in enumerate(zip(which.tolist(), corners, places, strict=True)):
        made = torch.zeros(SIDE, SIDE)
        made[top : top + LARGE, left : left + LARGE] = large[a]
        made[row : row + SMALL, column : column + SMALL] = small[b]
        images[i] += made
    return images.unsqueeze(1), classes[which]


def tower(steps: int, batch: int, seed: int) -> Any:
    """A vision transformer that was trained to tell digits at its own size."""
    model = small_vit(seed, OWN, PATCH, class_token=False, global_pool="avg")
    fit(model, lambda g: known(batch, g), lambda m, x: F.cross_entropy(m(x[0]), x[1]), steps, lr=3e-3, seed=seed)
    return model.eval()


def features(name: str, model: Any, images: Tensor) -> Tensor:
    """(n, C) means of the tokens of a contestant's scales."""
    if name == ENLARGED:
        images = F.interpolate(images, size=(OWN, OWN), mode="bicubic")
    scaled = MultiScale(
        functools.partial(last_map, model), OF[name], layout="channels_last", max_split_size=OWN, multiple=PATCH
    )
    return cached_tokens(scaled, images, batch=100).mean(1)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 400,
    batch: int = 32,
    labelled: int = 1000,
    tested: int = 1000,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, Any]:
    """Train a tower, freeze it, read images at several scales, tell digits by a linear map.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``scales-cpu.svg``.
        steps, batch: of the tower's training.
        labelled: images that linear maps learn from.
        tested: images of the test.
        seeds: of weights and images.

    Returns:
        Plain values, for JSON. ``accuracy`` is the mean of those of the large digit and of the small one.
    """
    test = pairs(tested, "test", torch.Generator().manual_seed(1234))
    held: dict[int, Any] = {}

    def run(name: str, seed: int) -> dict[str, float]:
        if seed not in held:
            held[seed] = tower(steps, batch, seed)
        model = held[seed]
        train = pairs(labelled, "train", torch.Generator().manual_seed(1000 + seed))
        read, asked = features(name, model, train[0]), features(name, model, test[0])
        large, small = (linear((read, train[1][:, i]), (asked, test[1][:, i]), 0.1) for i in range(2))
        return {
            "accuracy": (large + small) / 2, "large": large, "small": small, "channels": read.shape[1],
            "tower": accuracy(model, *known(tested // 2, torch.Generator().manual_seed(4321))),
        }  # fmt: skip

    result: dict[str, Any] = {
        "what": "a frozen tower on several scales of an image", "machine": machine(), "steps": steps, "batch": batch,
        "labelled": labelled, "tested": tested, "chance": 10.0,
        **study(NAMES, run, "accuracy", ONE, seeds, progress, keep, (steps, batch, labelled, tested)),
    }  # fmt: skip
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            f"the {which} digit": [(r["name"], r[which]["mean"], r[which]["half"]) for r in result["rows"]]
            for which in ("large", "small")
        }
        picture(Path(pictures) / "scales-cpu.svg", curves, "", "right, %", "scales that a frozen tower reads")
    return result
