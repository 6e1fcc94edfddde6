"""Does a bias by boxes help to find things: Plain DETR's cross attention with it and without, at equal steps.

``attnlib bench --suite detection --out benchmarks/results`` measures again what ``detection-cpu.json`` holds and draws
it. Handwritten digits stand in pictures of 48 x 48 pixels, one to three, apart from each other; what is learned is
where they are (one class). Measured is the average precision at an overlap of 0.5 on digits that were not trained on,
at several numbers of steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.detect.boxes import overlaps
from ...models.detect.plain_detr import Detections, PlainDETR
from ..clock import machine
from ..data.worlds import _draws, digit_glyphs
from ..small import Progress, fit, picture, study

SIDE, DIGIT, MOST = 48, 14, 3
NAMES = {"box bias": True, "no bias": False}
BASELINE = "no bias"


def pictures_of_digits(
    count: int, part: str, generator: torch.Generator | None = None
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Pictures (count, 1, 48, 48) and per picture ``boxes`` (K, 4) and ``labels`` (K,), all 0."""
    glyphs, _ = digit_glyphs(part, DIGIT)
    images = torch.zeros(count, SIDE, SIDE)
    targets = []
    for image in images:
        (wanted,) = _draws(1, 1, MOST + 1, generator)
        boxes: list[list[float]] = []
        for _ in range(20):
            if len(boxes) == wanted:
                break
            which = _draws(1, 0, len(glyphs), generator)[0]
            top, left = _draws(2, 0, SIDE - DIGIT + 1, generator)
            if all(abs(top - b[1]) >= DIGIT or abs(left - b[0]) >= DIGIT for b in boxes):
                image[top : top + DIGIT, left : left + DIGIT] = glyphs[which]
                boxes.append([left, top, left + DIGIT, top + DIGIT])
        targets.append({"boxes": torch.tensor(boxes).float(), "labels": torch.zeros(len(boxes), dtype=torch.long)})
    return images[:, None], targets


class Encoder(nn.Module):
    """Three strided convolutions: a map of 8 pixels per token."""

    def __init__(self, dim: int):
        super().__init__()
        self.feature_info = [{"num_chs": dim, "reduction": 8}]
        widths = (1, dim // 4, dim // 2, dim)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        for layer in self.layers:
            x = layer(x).relu()
        return [x]


def average_precision(
    found: Sequence[Detections], targets: Sequence[Mapping[str, Tensor]], overlap: float = 0.5
) -> float:
    """Percent: area under precision by recall of one class, every target being found once at most.

    Args:
        found: of every picture, best first.
        targets: ``boxes`` (n, 4) of every picture, and ``counted`` (n,) boolean where some are neither to be found nor
            wrong when they are.
        overlap: from which on a box has found a target.
    """
    total = 0
    rows: list[tuple[float, bool]] = []
    for one, target in zip(found, targets, strict=True):
        counted = target.get("counted", torch.ones(len(target["boxes"]), dtype=torch.bool))
        total += int(counted.sum())
        free, iou = counted.clone(), overlaps(one.boxes, target["boxes"])[0]
        for score, own in zip(one.scores, iou, strict=True):
            best = own.masked_fill(~free, -1.0)
            hit = bool(best.numel()) and float(best.max()) >= overlap
            if hit:
                free[best.argmax()] = False
            elif bool((own[~counted] >= overlap).any()):
                continue
            rows.append((float(score), hit))
    rows.sort(key=lambda r: -r[0])
    hits = torch.tensor([r[1] for r in rows], dtype=torch.float64).cumsum(0)
    if not total or not len(hits):
        return 0.0
    precision = hits / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)  # at this recall or more
    return 100 * float((best * torch.diff(hits, prepend=hits.new_zeros(1))).sum() / total)


def _loss(model: nn.Module, given: tuple[Tensor, list[dict[str, Tensor]]]) -> Tensor:
    terms: dict[str, Tensor] = model.loss(*given)  # type: ignore[operator]
    return torch.stack(list(terms.values())).sum()


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: tuple[int, ...] = (150, 300, 600),
    batch: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 256,
) -> dict[str, Any]:
    """Train detectors with and without the bias.

    Args:
        progress, keep: as of :func:`attnlib.bench.small.study`.
        pictures: folder for ``detection-cpu.svg``.
        steps: lengths of training, each a run of its own; the last is compared.
        batch, seeds, tested: of training and of the test.

    Returns:
        Plain values, for JSON.
    """
    images, targets = pictures_of_digits(tested, "test", torch.Generator().manual_seed(99))

    def run(name: str, seed: int) -> dict[str, float]:
        out = {}
        for length in steps:
            torch.manual_seed(seed)
            model = PlainDETR(
                Encoder(48), 1, dim=48, num_heads=4, hidden=96, depth=2, queries=8, many=16, repeats=4, box_hidden=32,
                box_bias=NAMES[name],
            )  # fmt: skip
            fit(
                model, lambda g: pictures_of_digits(batch, "train", g),
                _loss, length, lr=2e-3, seed=seed,
            )  # fmt: skip
            model.eval()
            found = [d for part in images.split(64) for d in model.predict(part, top=8)]
            out[f"AP at {length} steps"] = average_precision(found, targets)
        return out

    metric = f"AP at {steps[-1]} steps"
    found = study(list(NAMES), run, metric, BASELINE, seeds, progress, keep, (steps, batch, tested))
    if pictures is not None:
        curves = {
            r["name"]: [(n, r[f"AP at {n} steps"]["mean"], r[f"AP at {n} steps"]["half"]) for n in steps]
            for r in found["rows"]
        }
        picture(
            Path(pictures) / "detection-cpu.svg", curves, "training steps", "average precision at overlap 0.5, %",
            "finding digits, with and without a bias by boxes", dashed=(BASELINE,),
        )  # fmt: skip
    return {
        "what": "boxes of digits, by steps of training",
        "machine": machine(),
        "batch": batch,
        "tested": tested,
        **found,
    }
