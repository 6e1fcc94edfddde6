"""Heads for dense prediction over one small encoder: varying windows and attention upsampling against the usual ones.

``attnlib bench --suite segmentation --out benchmarks/results`` measures again what ``segmentation-cpu.json`` holds and
draws it. The task is to tell the shapes of generated scenes apart, pixel by pixel, from 3 to 18 pixels large. Two
comparisons at equal width, each against its own baseline, on the same encoder (DATR's, four maps from 1/4 to 1/32),
trained from nothing on the same images:

- heads that put all maps together at once: SegFormer's (bilinear resizing), UPerNet's, VWFormer's;
- decoders that go up level by level: bilinear resizing, attention upsampling (WAU), both with the same convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.backbones.stages import Features
from ...models.dense.datr import datr_encoder
from ...models.dense.heads import SegFormerHead, Segmenter, UPerHead
from ...models.dense.upsample import UpsampleHead
from ...models.dense.vwformer import VWFormerHead
from ..clock import interleave, machine
from ..data.masks import CLASSES, mean_iou, shape_scenes
from ..small import Progress, fit, picture, study, training_step

SIDE, WIDTH, TINT = 64, 32, 0.4
DIMS, HEADS = (16, 24, 32, 48), (1, 1, 2, 3)

Make = Callable[[list[int]], nn.Module]

#: Comparison -> its baseline and its contestants.
CONTESTANTS: dict[str, tuple[str, dict[str, Make]]] = {
    "all maps at once": (
        "UPerNet",
        {
            "UPerNet": lambda dims: UPerHead(dims, WIDTH, len(CLASSES), 0.0, cells=(1, 2)),
            "SegFormer, bilinear": lambda dims: SegFormerHead(dims, WIDTH, len(CLASSES), 0.0),
            # Windows of 2 x 2 tokens of the map at 1/8; contexts of 4 and of 8 tokens a side, the whole map.
            "VWFormer": lambda dims: VWFormerHead(
                dims, WIDTH, len(CLASSES), 0.0, num_heads=4, ratios=(2, 4), num_windows=4, low_dim=12
            ),
        },
    ),
    "level by level": (
        "bilinear",
        {
            "bilinear": lambda dims: UpsampleHead(dims, len(CLASSES), upsample="bilinear"),
            "attention upsampling": lambda dims: UpsampleHead(dims, len(CLASSES), window_size=4, head_dim=8),
        },
    ),
}


def build(make: Make) -> Segmenter:
    """A contestant on the common encoder."""
    encoder = Features(datr_encoder(DIMS, (1, 1, 1, 1), HEADS, kernel_size=3, mlp_ratio=2.0, drop_path_rate=0.0))
    return Segmenter(encoder, make(encoder.feature_info.channels()))


def _loss(model: Any, given: tuple[Tensor, Tensor]) -> Tensor:
    return sum(model.loss(model(given[0]), given[1]).values(), torch.zeros(()))


def costs(makes: dict[str, Make], batch: int = 4, repeats: int = 5) -> dict[str, float]:
    """Seconds of a training step, all in turn."""
    x = shape_scenes(batch, (SIDE, SIDE), tint=TINT, generator=torch.Generator().manual_seed(0))

    times = interleave(
        {name: training_step(build(make), lambda m: _loss(m, x)) for name, make in makes.items()}, repeats
    )
    return {name: t.minimum for name, t in times.items()}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 350,
    batch: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 256,
) -> dict[str, Any]:
    """Train every contestant with every seed.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``segmentation-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.

    Returns:
        Plain values, for JSON.
    """
    images, labels = shape_scenes(tested, (SIDE, SIDE), tint=TINT, generator=torch.Generator().manual_seed(4321))
    result: dict[str, Any] = {
        "what": "mean IoU of heads over one small encoder on generated scenes, trained from nothing",
        "machine": machine(), "steps": steps, "batch": batch, "tested": tested, "side": SIDE, "width": WIDTH,
        "tint": TINT, "one class everywhere": mean_iou(torch.zeros_like(labels), labels), "comparisons": {},
    }  # fmt: skip
    for name, (baseline, makes) in CONTESTANTS.items():

        def run(which: str, seed: int, makes: dict[str, Make] = makes) -> dict[str, float]:
            torch.manual_seed(seed)
            model = build(makes[which])

            def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
                return shape_scenes(batch, (SIDE, SIDE), tint=TINT, generator=generator)

            losses = fit(model, draw, _loss, steps, lr=4e-3, seed=seed)
            model.eval()
            found = torch.cat([model.predict(part) for part in images.split(64)])
            return {
                "iou": mean_iou(found, labels), "last_loss": sum(losses[-20:]) / len(losses[-20:]),
                "head_parameters": sum(p.numel() for p in model.head.parameters()),
            }  # fmt: skip

        found = study(list(makes), run, "iou", baseline, seeds, progress, keep, (name, steps, batch, tested, SIDE))
        result["comparisons"][name] = {**found, "step_seconds": costs(makes)}
    if pictures is not None:
        curves = {
            r["name"]: [(name, r["iou"]["mean"], r["iou"]["half"])]
            for name, found in result["comparisons"].items()
            for r in found["rows"]
        }
        picture(
            Path(pictures) / "segmentation-cpu.svg", curves, "", "mean IoU, %", "heads of equal width over one encoder"
        )
    return result
