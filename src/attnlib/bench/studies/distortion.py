"""Adaptation to the distortion of panoramas: what class-wise feature aggregation adds to pseudo-labels.

``attnlib bench --suite distortion --out benchmarks/results`` measures again what ``distortion-cpu.json`` holds and
draws it. Flat generated scenes have labels; equirectangular panoramas of such scenes have none, but for the test. A
small DATR (its encoder with a neighborhood of 5 x 5 in the last stage, SegFormer's head) is trained on the flat scenes;
then everyone goes on from there for as many steps: on the flat scenes alone, with the panoramas under the labels that
the model itself is sure of (pseudo-labels), or with the loss between class centres beside them
(:func:`attnlib.models.dense.datr.class_centre_loss`), ours and as the authors' code computes it. What training on
labelled panoramas reaches stands beside them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.backbones.stages import Features
from ...models.dense.datr import class_centre_loss, datr_encoder
from ...models.dense.heads import SegFormerHead, Segmenter, resized_logits
from ..clock import machine
from ..data.masks import CLASSES, mean_iou, shape_scenes
from ..small import Progress, fit, picture, study

SIZE, WIDTH, RADIUS, TINT = (32, 64), 32, (3.0, 9.0), 0.5
DIMS, HEADS = (16, 24, 32, 48), (1, 1, 2, 3)
BASELINE = "source only"

#: Contestant -> what it trains on beside the source: the labels of panoramas, and how centres are compared.
CONTESTANTS: dict[str, tuple[str | None, str | None]] = {
    BASELINE: (None, None),
    "pseudo-labels": ("own", None),
    "and class centres": ("own", "ours"),
    "and class centres, authors'": ("own", "authors"),
    "labelled panoramas": ("true", None),
}


def build() -> Segmenter:
    """The small DATR."""
    encoder = Features(datr_encoder(DIMS, (1, 1, 1, 1), HEADS, (4, 2, 1), 5, 2.0, drop_path_rate=0.0))
    return Segmenter(encoder, SegFormerHead(encoder.feature_info.channels(), WIDTH, len(CLASSES), 0.0))


def draw(count: int, panorama: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scenes as both domains have them."""
    return shape_scenes(count, SIZE, 4, RADIUS, panorama, 0.1, TINT, generator)


@torch.no_grad()
def sure_labels(model: Segmenter, images: Tensor, least: float) -> Tensor:
    """What a model predicts where its probability is at least ``least``, ``ignore_index`` elsewhere."""
    sure, labels = model(images).softmax(1).max(1)
    return labels.masked_fill(sure < least, model.ignore_index)


def _on_labels(model: Any, given: tuple[Tensor, Tensor]) -> Tensor:
    return model.loss(model(given[0]), given[1])["cross_entropy"]


def adapt(
    model: Segmenter, kind: tuple[str | None, str | None], steps: int, batch: int, seed: int, least: float, lr: float
) -> list[float]:
    """Train on, as a contestant does; ``model`` is changed in place."""
    labelled_by, centres = kind
    teacher: Any = copy.deepcopy(model).eval()
    held: dict[str, Any] = {"memory": None, "step": 0}

    def data(generator: torch.Generator) -> Any:
        source, target = draw(batch, False, generator), draw(batch, True, generator)
        return source, (target[0], target[1] if labelled_by == "true" else sure_labels(teacher, target[0], least))

    def loss(m: Any, given: Any) -> Tensor:
        (x, y), (z, w) = given
        if labelled_by is None:
            return _on_labels(m, (x, y))
        maps = m.encoder(torch.cat([x, z]))
        logits = resized_logits(m.head(maps), SIZE)
        value = m.loss(logits[:batch], y)["cross_entropy"] + m.loss(logits[batch:], w)["cross_entropy"]
        if centres is not None:
            epoch = 1 + held["step"] * 8 // steps
            found = class_centre_loss(
                maps[-1][:batch], maps[-1][batch:], y, w, epoch, len(CLASSES), held["memory"],
                "authors" if centres == "authors" else None,
            )  # fmt: skip
            held["memory"], held["step"] = (found.source, found.target), held["step"] + 1
            value = value + found.loss
        return value

    return fit(model, data, loss, steps, lr=lr, seed=seed + 100)


@torch.no_grad()
def score(model: Segmenter, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Mean IoU in percent: of all rows, and of the quarter of rows at either pole."""
    model.eval()
    found = torch.cat([model.predict(part) for part in images.split(64)])
    quarter = SIZE[0] // 4
    poles = torch.cat([torch.arange(quarter), torch.arange(SIZE[0] - quarter, SIZE[0])])
    return {"iou": mean_iou(found, labels), "iou_poles": mean_iou(found[:, poles], labels[:, poles])}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 400,
    more: int = 200,
    batch: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2, 3),
    tested: int = 256,
    least: float = 0.8,
) -> dict[str, Any]:
    """Train on flat scenes, then adapt as every contestant does, with every seed.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``distortion-cpu.svg``.
        steps: on flat scenes.
        more: of adaptation.
        batch, seeds, tested: of training and of the test.
        least: probability from which a pseudo-label counts.

    Returns:
        Plain values, for JSON.
    """
    test = draw(tested, True, torch.Generator().manual_seed(4321))
    flat = draw(tested, False, torch.Generator().manual_seed(4322))
    warm: dict[int, dict[str, Tensor]] = {}

    def start(seed: int) -> Segmenter:
        torch.manual_seed(seed)
        model = build()
        if seed not in warm:
            fit(model, lambda g: draw(batch, False, g), _on_labels, steps, lr=4e-3, seed=seed)
            warm[seed] = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(warm[seed])
        return model

    def run(name: str, seed: int) -> dict[str, float]:
        model = start(seed)
        before = score(model, *test)["iou"]
        losses = adapt(model, CONTESTANTS[name], more, batch, seed, least, 1e-3)
        return {
            **score(model, *test), "iou_flat": score(model, *flat)["iou"], "iou_before": before,
            "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        }  # fmt: skip

    found = study(
        list(CONTESTANTS), run, "iou", BASELINE, seeds, progress, keep, (steps, more, batch, tested, least, SIZE)
    )
    result: dict[str, Any] = {
        "what": "mean IoU on panoramas after training on flat scenes and adaptation", "machine": machine(),
        "steps": steps, "more": more, "batch": batch, "tested": tested, "least": least, "size": list(SIZE),
        "tint": TINT, "one class everywhere": mean_iou(torch.zeros_like(test[1]), test[1]), **found,
    }  # fmt: skip
    by = {s: {r["name"]: r["iou"] for r in found["runs"] if r["seed"] == s} for s in seeds}
    gaps = [by[s]["and class centres"] - by[s]["pseudo-labels"] for s in seeds]
    result["class centres against pseudo-labels alone"] = gaps
    if pictures is not None:
        curves = {
            label: [(r["name"], r[key]["mean"], r[key]["half"]) for r in found["rows"]]
            for label, key in (("all rows", "iou"), ("rows at the poles", "iou_poles"))
        }
        picture(Path(pictures) / "distortion-cpu.svg", curves, "", "mean IoU on panoramas, %", "adapting to panoramas")
    return result
