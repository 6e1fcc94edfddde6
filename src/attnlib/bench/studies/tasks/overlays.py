"""Hidden items: does SDANet's neck, in which every level reads all, find more of what lies under other things.

Rings and crosses among transparent bars, plates and discs (:mod:`attnlib.bench.worlds.overlays`). One small detector
with a plain feature pyramid, with a further convolution on each level, of more parameters than the neck has, and with
the selective neck. An item is hidden where other things lie over half of it or more.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....models.detect.pan import conv
from ....models.detect.sdanet import SelectiveNeck
from ...clock import machine
from ...small import Progress, fit, parameters, picture, sheet, study
from ...worlds.overlays import KINDS, make_bag
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

QUESTION = "Does a selective neck find items that lie under others better than a plain pyramid of the same width?"
NAMES = ("pyramid", "pyramid and convolutions", "selective neck")
BASELINE = "pyramid"
SIDE, CLUTTER = 48, 8
#: Channels at the strides 2, 4, 8 and 16.
DIMS = (8, 16, 16, 16)
#: Share of an item that others lie over from which on it is hidden.
HIDDEN = 0.5


class Convolutions(nn.Module):
    """A 3 x 3 convolution with a shortcut on every level: what more parameters do that read no other level."""

    def __init__(self, dim: int, levels: int):
        super().__init__()
        self.layers = nn.ModuleList(conv(dim, dim, 3) for _ in range(levels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The levels, each by itself."""
        return [x + layer(x) for x, layer in zip(maps, self.layers, strict=True)]


@functools.lru_cache(maxsize=4)
def bags(count: int, part: str) -> Batch:
    """Bags, and their boxes with ``hidden`` (n,) and ``open`` (n,), which is which."""
    made = [make_bag(i, part, SIDE, clutter=CLUTTER) for i in range(count)]
    targets = [
        {"boxes": b.boxes, "labels": b.labels, "hidden": b.covered >= HIDDEN, "open": b.covered < HIDDEN} for b in made
    ]
    return (torch.stack([b.image for b in made]),), targets


def contestant(name: str) -> Any:
    """A detector with one of :data:`NAMES` as its neck."""
    levels = len(DIMS) - 1
    more: nn.Module | None = None
    if name == "selective neck":
        more = SelectiveNeck(DIMS[1], levels, hidden=DIMS[1])
    elif name == "pyramid and convolutions":
        more = Convolutions(DIMS[1], levels)
    return detector(len(KINDS), 3, DIMS, more)


def train(name: str, seed: int, steps: int, trained: int) -> Any:
    """A contestant, trained."""
    torch.manual_seed(seed)
    model = contestant(name)
    pool = bags(trained, "train")
    fit(model, lambda g: drawn(pool, 16, g), detection_loss, steps, lr=5e-3, seed=seed)
    return model.eval()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 160,
    trained: int = 512,
    tested: int = 192,
    seeds: Sequence[int] = (1, 2, 3),
) -> dict[str, Any]:
    """Train the detector with each neck.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-overlays-cpu.svg``, and ``tasks-overlays-cpu.png``, what some of them find.
        steps: of training, 16 bags each.
        trained, tested: bags of training and of the test.
        seeds: of weights and batches.

    Returns:
        Plain values, for JSON.
    """
    images, targets = bags(tested, "test")
    models: dict[str, Any] = {}  # of the first seed, for the pictures

    def run(name: str, seed: int) -> dict[str, float]:
        model = train(name, seed, steps, trained)
        if seed == seeds[0]:
            models[name] = model
        found = found_by(model, images)
        out = {k: mean_precision(found, targets, len(KINDS), k) for k in ("hidden", "open")}
        return {**out, "all": mean_precision(found, targets, len(KINDS)), "parameters": parameters(model)}

    result: dict[str, Any] = {"question": QUESTION, "machine": machine(), "steps": steps, "trained": trained}
    result |= {"tested": tested, "clutter": CLUTTER, "hidden from": HIDDEN}
    result["hidden items"] = int(sum(t["hidden"].sum() for t in targets))
    result["items"] = sum(len(t["labels"]) for t in targets)
    key = (steps, trained, tested, CLUTTER, DIMS, HIDDEN)
    result |= study(NAMES, run, "hidden", BASELINE, seeds, progress, keep, key)
    if pictures is not None:
        curves = {
            row["name"]: [(what, row[what]["mean"], row[what]["half"]) for what in ("hidden", "open", "all")]
            for row in result["rows"]
        }
        picture(
            Path(pictures) / "tasks-overlays-cpu.svg", curves, "", "average precision at overlap 0.5, %",
            "items under transparent things",
        )  # fmt: skip
        for name in (BASELINE, "selective neck"):
            if name not in models:
                models[name] = train(name, seeds[0], steps, trained)
        _seen(Path(pictures) / "tasks-overlays-cpu.png", models, images[0], targets)
    return result


def _seen(path: Path, models: Mapping[str, Any], images: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> None:
    """The first five bags in which something is hidden, with what is in them, and what two detectors find."""
    some = [i for i, t in enumerate(targets) if bool(t["hidden"].any())][:5] or [0]
    rows = {"given": images[some], "truth": true_boxes(images[some], [targets[i] for i in some])}
    for name in (BASELINE, "selective neck"):
        found = models[name].predict(images[some], threshold=0.02, most=12, overlap=0.5)
        rows[name] = shown(images[some], found)
    sheet(path, rows, colours=64)


def table(part: Mapping[str, Any]) -> str:
    """Rows as a table in Markdown."""
    heads = ("neck", "hidden items, %", "against the plain pyramid", "open ones, %", "all, %", "parameters")
    return markdown(heads, part, ("hidden", "against", "open", "all", "parameters"))


#: Tables of the page: by name, the part of the result, and what writes it.
TABLES = {"overlays": ("", table)}

__all__ = ["Convolutions", "bags", "contestant", "measure", "table"]
