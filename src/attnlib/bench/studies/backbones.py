"""Convolutional and hybrid backbones at the smallest: which photograph is a crop from?

``attnlib bench --suite backbones --out benchmarks/results`` measures again what ``backbones-cpu.json`` holds and draws
it. Every family's own constructor makes a network of about as many parameters as a plain residual network, which is
trained on grey crops of 48 x 48 pixels of real photographs; the test has crops of their right thirds, which no crop of
training reaches. Time and memory are those of a training step and of one image, all in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.crossvit import crossvit
from ...models.backbones.ddrnet import ddrnet
from ...models.backbones.efficientvit import efficientvit
from ...models.backbones.overlock import overlock
from ...models.backbones.patnet import patnet
from ...models.backbones.resnet import resnet
from ...models.backbones.smt import smt
from ...models.backbones.spectformer import spectformer, spectformer_h
from ...models.backbones.uniformer import uniformer
from ...models.backbones.van import van
from ..clock import interleave, machine, peak_bytes
from ..data.worlds import TEXTURES, texture_crops
from ..small import Progress, accuracy, fit, parameters, picture, started_small, study, training_step

SIDE, BASELINE = 48, "residual network"
_GIVEN: dict[str, Any] = dict(num_classes=len(TEXTURES), in_chans=1, img_size=SIDE)


#: Contestant -> what makes it.
CONTESTANTS: dict[str, Callable[[], nn.Module]] = {
    BASELINE: lambda: resnet((16, 32, 48, 64), (1, 1, 1, 1), basic=True, stem="tiered", stem_dim=16, **_GIVEN),
    "ResNet-RS": lambda: resnet(
        (12, 20, 32, 40), (1, 1, 1, 1), stem="deep", stem_dim=16, average=True, pool="conv", squeeze=0.25, **_GIVEN
    ),
    "VAN": lambda: van((16, 28, 44, 56), (1, 1, 1, 1), (4, 4, 4, 4), **_GIVEN),
    "SMT": lambda: smt(
        (16, 32, 40, 56), (1, 1, 2, 1), (1, 1, 2, 4), mlp_ratios=(4, 4, 2, 2), scales=4, **_GIVEN
    ),
    "OverLoCK": lambda: overlock(
        (12, 24, 36, 40), (1, 1, 1, 1), (1, 1), (1, 1), (9, 9, 5, 5), 3, mlp_ratio=2.0, focus_mlp_ratio=2.0,
        projection=48, auxiliary=False, **_GIVEN,
    ),
    "PATNet": lambda: patnet(
        (12, 24, 48, 96), (1, 1, 2, 1), hidden_size=64, attn_drop_rate=0.0, proj_drop_rate=0.0, **_GIVEN
    ),
    "EfficientViT": lambda: efficientvit((24, 40, 48), (1, 1, 1), (2, 2, 2), (5, 5), key_dim=8, **_GIVEN),
    "SpectFormer": lambda: spectformer(6, 52, 4, 4, 2, **_GIVEN),
    "SpectFormer-H": lambda: spectformer_h(
        (14, 28, 42, 56), (1, 1, 1, 1), (1, 2, 3, 4), (4, 4, 2, 2), stem_dim=16, **_GIVEN
    ),
    "UniFormer": lambda: uniformer((1, 1, 1, 1), (16, 32, 48, 72), head_dim=24, **_GIVEN),
    "CrossViT": lambda: crossvit((32, 48), ((1, 1), (1, 1)), (2, 3), 2.5, **_GIVEN),
    "DDRNet": lambda: ddrnet(5, (1, 1, 1, 1), last_dim=192, **_GIVEN),
}  # fmt: skip


def costs(batch: int = 8, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Seconds and bytes of a training step, and seconds of one image in evaluation, all contestants in turn."""
    x, one = torch.randn(batch, 1, SIDE, SIDE), torch.randn(1, 1, SIDE, SIDE)

    def call(model: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            model(one)

        return run

    steps, calls = {}, {}
    for name, make in CONTESTANTS.items():
        torch.manual_seed(0)
        steps[name], calls[name] = training_step(make(), lambda m: m(x).square().sum()), call(make().eval())
    trained, shown = interleave(steps, repeats, "cpu"), interleave(calls, 2 * repeats, "cpu")
    return {
        name: {
            "step_seconds": trained[name].minimum, "x_residual": trained[name].minimum / trained[BASELINE].minimum,
            "peak_megabytes": peak_bytes(steps[name]) / 1e6, "image_seconds": shown[name].minimum,
        }
        for name in CONTESTANTS
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 240,
    batch: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 1024,
    repeats: int = 5,
) -> dict[str, Any]:
    """Train every contestant with every seed, and time it.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``backbones-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.
        repeats: of timing.

    Returns:
        Plain values, for JSON.
    """
    test = texture_crops(tested, SIDE, "test", torch.Generator().manual_seed(1234))

    def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(given[0]), given[1])

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = started_small(CONTESTANTS[name](), seed)
        losses = fit(model, lambda g: texture_crops(batch, SIDE, generator=g), loss, steps, lr=4e-3, seed=seed)
        return {
            "accuracy": accuracy(model, *test), "last_loss": sum(losses[-20:]) / len(losses[-20:]),
            "parameters": parameters(model),
        }  # fmt: skip

    result: dict[str, Any] = {
        "what": "small backbones on crops of real photographs, at about equal parameters", "machine": machine(),
        "steps": steps, "batch": batch, "tested": tested, "side": SIDE,
        "most frequent class": 100 * float(test[1].bincount().max()) / tested,
        **study(list(CONTESTANTS), run, "accuracy", BASELINE, seeds, progress, keep, (steps, batch, tested)),
        "costs": costs(repeats=repeats),
    }  # fmt: skip
    if pictures is not None:
        curves = {
            r["name"]: [(result["costs"][r["name"]]["x_residual"], r["accuracy"]["mean"], r["accuracy"]["half"])]
            for r in result["rows"]
        }
        picture(
            Path(pictures) / "backbones-cpu.svg", curves, "time of a training step, times the residual network's",
            "accuracy, %", "crops of photographs, regions held out", log="x", dashed=(BASELINE,),
        )  # fmt: skip
    return result
