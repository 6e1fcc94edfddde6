"""Two resolutions side by side against dilation: DDRNet and residual networks that keep an eighth, of equal size.

``attnlib bench --suite ddrnet --out benchmarks/results`` measures again what ``ddrnet-cpu.json`` holds and draws it.
The task is to tell the shapes of generated scenes apart, pixel by pixel. Both baselines are what segmentation usually
does with a classifier's backbone: strides of the last two stages become dilations of 2 and 4, so that the map stays at
an eighth; one reads it through a 3 x 3 convolution, the other through pooled context as well (PSPNet). Widths are such
that all have as many parameters. Training is from nothing; latency is that of one image, norms folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import deploy
from ...models.backbones.convs import Relu, ResidualBlock
from ...models.backbones.resnet import resnet
from ...models.backbones.stages import FeatureInfo, Features
from ...models.dense.ddrnet import ddrnet_segmenter
from ...models.dense.heads import PooledContext, Segmenter, start_convs
from ...nn.layers import ConvNorm
from ..clock import interleave, machine, peak_bytes, ratio
from ..data.masks import CLASSES, mean_iou, shape_scenes
from ..small import Progress, fit, picture, study

SIDE, RADIUS, TINT = 96, (4.0, 24.0), 0.4
OURS, AUXILIARY = "DDRNet", "DDRNet, auxiliary classifier in training"
BASELINE, CONTEXT = "dilated residual network", "dilated residual network, pooled context"


def dilated(encoder: Features, dilations: dict[int, int]) -> Features:
    """The same encoder of basic residual blocks, strides of some stages turned into dilations.

    Args:
        encoder: changed in place.
        dilations: by stage; its first convolution keeps what the stage before has, as usual.
    """
    before = 1
    stages: Any = encoder.model.stages
    for number, stage in enumerate(stages):
        for block in stage.blocks:
            if number not in dilations or not isinstance(block, ResidualBlock):
                continue
            block.stride = 1
            if block.shortcut is not None:
                block.shortcut.conv.conv.stride = (1, 1)
            for layer in (block.conv1, block.conv3):
                conv = layer.conv
                conv.stride, conv.dilation, conv.padding = (1, 1), (before,) * 2, (before,) * 2
                before = dilations[number]
    return encoder


class ContextHead(nn.Module):
    """The last map through a 3 x 3 convolution, or through pooled context (which ends in one), to classes.

    Args:
        dim: channels of the map.
        width: in between.
        context: whether with pooled context.
    """

    def __init__(self, dim: int, width: int, context: bool):
        super().__init__()
        self.num_classes = len(CLASSES)
        first = PooledContext(dim, width, (1, 2, 3, 6), activation=Relu)
        self.first = first if context else ConvNorm(dim, width, 3, activation=Relu)
        self.classifier = nn.Linear(width, self.num_classes)

    def forward(self, maps: Sequence[Tensor], valid: Sequence[Tensor | None] | None = None) -> Tensor:
        """[(B, C, H, W)] -> logits (B, classes, H, W)."""
        return self.classifier(self.first(maps[-1].movedim(1, -1))).movedim(-1, 1)


def _dilated(context: bool, dim: int, width: int) -> Segmenter:
    model = resnet(
        (dim, 2 * dim, 4 * dim, 8 * dim), (2, 2, 2, 2), basic=True, stem="tiered", stem_dim=16, num_classes=0,
        img_size=SIDE,
    )  # fmt: skip
    last = len(model.feature_info) - 1
    encoder = dilated(Features(model, [last]), {2: 2, 3: 4})
    encoder.feature_info = FeatureInfo([{**encoder.feature_info[0], "reduction": 8}])
    head = ContextHead(8 * dim, width, context)
    start_convs(head)
    return Segmenter(encoder, head)


def _ours(auxiliary: bool = False) -> Segmenter:
    return ddrnet_segmenter(8, branch_dim=32, head_dim=32, auxiliary=auxiliary, num_classes=len(CLASSES), img_size=SIDE)


#: Contestant -> what makes it.
CONTESTANTS: dict[str, Callable[[], Segmenter]] = {
    BASELINE: partial(_dilated, False, 11, 36),
    CONTEXT: partial(_dilated, True, 10, 36),
    OURS: _ours,
    AUXILIARY: partial(_ours, True),
}


def parameters(model: nn.Module) -> int:
    """How many numbers are learned, but for those of the auxiliary classifier, which only training has."""
    return sum(p.numel() for name, p in model.named_parameters() if ".auxiliary." not in name)


def scenes(count: int, generator: torch.Generator, side: int = SIDE) -> tuple[Tensor, Tensor]:
    """Shapes of 8 to 48 pixels, their colours hardly telling what they are."""
    return shape_scenes(count, (side, side), radius=RADIUS, tint=TINT, generator=generator)


def _loss(model: Any, given: tuple[Tensor, Tensor]) -> Tensor:
    return sum(model.loss(model(given[0]), given[1]).values(), torch.zeros(()))


def latency(side: int = 512, repeats: int = 7) -> dict[str, Any]:
    """Processor seconds and most bytes at once of one image, norms folded, all contestants in turn."""
    x = torch.randn(1, 3, side, side)

    def call(model: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            model(x)

        return run

    runs = {name: call(deploy(make().eval())) for name, make in CONTESTANTS.items() if name != AUXILIARY}
    times = interleave(runs, repeats, "cpu")
    return {
        "side": side,
        "rows": [
            {
                "name": name, "seconds": times[name].median, "megabytes": peak_bytes(run) / 1e6,
                "times as long as DDRNet": ratio(times[name], times[OURS])["ratio"],
            }
            for name, run in runs.items()
        ],
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    batch: int = 12,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 256,
    latency_side: int = 512,
    repeats: int = 7,
) -> dict[str, Any]:
    """Train every contestant with every seed, and time it.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``ddrnet-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.
        latency_side: pixels per side of the image that is timed.
        repeats: of timing.

    Returns:
        Plain values, for JSON.
    """
    images, labels = scenes(tested, torch.Generator().manual_seed(4321))

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = CONTESTANTS[name]()
        losses = fit(model, lambda g: scenes(batch, g), _loss, steps, lr=4e-3, seed=seed)
        assert all(map(math.isfinite, losses))
        model.eval()
        found = torch.cat([model.predict(part) for part in images.split(32)])
        return {"iou": mean_iou(found, labels), "parameters": parameters(model)}

    result: dict[str, Any] = {
        "what": "two resolutions against dilation: segmentation of generated scenes at equal parameters",
        "machine": machine(), "steps": steps, "batch": batch, "tested": tested, "side": SIDE,
        "one class everywhere": mean_iou(torch.zeros_like(labels), labels),
        **study(list(CONTESTANTS), run, "iou", BASELINE, seeds, progress, keep, (steps, batch, tested)),
        "latency": latency(latency_side, repeats),
    }  # fmt: skip
    if pictures is not None:
        taken = {row["name"]: row["seconds"] for row in result["latency"]["rows"]}
        taken[AUXILIARY] = taken[OURS]
        curves = {r["name"]: [(1e3 * taken[r["name"]], r["iou"]["mean"], r["iou"]["half"])] for r in result["rows"]}
        picture(
            Path(pictures) / "ddrnet-cpu.svg", curves, f"ms per image of {latency_side} pixels, one core",
            "mean IoU, %", "segmentation at equal parameters",
        )  # fmt: skip
    return result
