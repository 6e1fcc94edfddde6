"""Super-resolution of crops of photographs: HAT and RGT against a plain network of equal width and bicubic resizing.

``attnlib bench --suite restoration --out benchmarks/results`` measures again what ``restoration-cpu.json`` holds and
draws it. Crops of 32 x 32 or 64 x 64 pixels are made 2 or 4 times smaller (bicubic, low-pass filtered), so that every
restorer reads 16 x 16 pixels. Each learns, with the same crops in the same order, what is to be added to the bicubic
image, and starts as that image. They are tested on the thirds of the photographs that no training crop reaches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.restore.base import PixelShuffleHead, Restorer
from ...models.restore.hat import HAT
from ...models.restore.rgt import RGT
from ..clock import machine
from ..data.worlds import photo_crops
from ..small import Progress, fit, interval, picture, study
from ..stats import paired_interval

SIDE, DIM, HEADS, BLOCKS = 16, 96, 4, 2
BICUBIC, PLAIN = "bicubic", "plain network"


class Plain(Restorer):
    """Residual blocks of two 3 x 3 convolutions between the first and the last layers that restorers have."""

    def __init__(self, scale: int):
        super().__init__(scale, 3, 1)
        self.first, self.after = nn.Conv2d(3, DIM, 3, 1, 1), nn.Conv2d(DIM, DIM, 3, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(DIM, DIM, 3, 1, 1), nn.ReLU(), nn.Conv2d(DIM, DIM, 3, 1, 1)) for _ in range(BLOCKS)
        )
        self.head = PixelShuffleHead(DIM, 3, scale)

    def body(self, x: Tensor) -> Tensor:
        first = y = self.first(x)
        for block in self.blocks:
            y = y + block(y)
        return self.head(self.after(y) + first)


class Added(nn.Module):
    """A tenth of what a restorer makes of the image around grey is added to the bicubic one; nothing, at the start."""

    def __init__(self, restorer: Any):
        super().__init__()
        self.restorer = restorer
        nn.init.zeros_(restorer.head.last.weight)
        nn.init.zeros_(restorer.head.last.bias)
        restorer.mean = (0.0,) * 3  # it is subtracted before and added behind: here nothing is to be added

    def forward(self, x: Tensor) -> Tensor:
        return enlarged(x, self.restorer.scale) + 0.1 * self.restorer(x - 0.5)


def build(name: str, scale: int) -> nn.Module:
    """A contestant: two blocks of width 96."""
    shared: dict[str, Any] = dict(embed_dim=DIM, depths=(BLOCKS,), num_heads=(HEADS,), drop_path_rate=0.0)
    if name == PLAIN:
        return Added(Plain(scale))
    if name == "HAT":
        return Added(HAT(scale, window_size=8, squeeze_factor=8, **shared))
    return Added(RGT(scale, split_size=(4, 16), **shared))


CONTESTANTS = (BICUBIC, PLAIN, "HAT", "RGT")


def enlarged(x: Tensor, scale: int) -> Tensor:
    """Bicubic."""
    return F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)


def reduced(x: Tensor, scale: int) -> Tensor:
    """Bicubic, low-pass filtered, in [0, 1]."""
    return F.interpolate(x, scale_factor=1 / scale, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def psnr(made: Tensor, true: Tensor, border: int) -> float:
    """Mean over images of their peak signal to noise ratio in decibels, without ``border`` pixels on every side."""
    gap = (made.clamp(0, 1) - true)[..., border:-border, border:-border]
    return float((-10 * gap.square().flatten(1).mean(1).clamp(min=1e-10).log10()).mean())


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 300,
    batch: int = 4,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 96,
    scales: tuple[int, ...] = (2, 4),
    names: tuple[str, ...] = CONTESTANTS,
) -> dict[str, Any]:
    """Train every contestant at every scale.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``restoration-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.
        scales: pixels a side for one.
        names: contestants; bicubic resizing is always among them.

    Returns:
        Plain values, for JSON: PSNR in decibels, ``against`` bicubic, and ``against_plain`` per contestant.
    """
    chosen = [n for n in CONTESTANTS if n in (*names, BICUBIC)]
    result: dict[str, Any] = {
        "what": "super-resolution of crops of photographs, 2 blocks of width 96", "machine": machine(), "steps": steps,
        "batch": batch, "tested": tested, "scales": {},
    }  # fmt: skip
    for scale in scales:
        test = photo_crops(tested, SIDE * scale, "test", torch.Generator().manual_seed(4321))

        def run(name: str, seed: int, scale: int = scale, test: Tensor = test) -> dict[str, float]:
            small = reduced(test, scale)
            if name == BICUBIC:
                return {"psnr": psnr(enlarged(small, scale), test, scale), "parameters": 0}
            torch.manual_seed(seed)
            model = build(name, scale)

            def draw(generator: torch.Generator) -> Tensor:
                return photo_crops(batch, SIDE * scale, "train", generator)

            def loss(m: nn.Module, crops: Tensor) -> Tensor:
                return (m(reduced(crops, scale)) - crops).abs().mean()

            losses = fit(model, draw, loss, steps, lr=5e-4, seed=seed)
            model.eval()
            with torch.no_grad():
                made = torch.cat([model(part) for part in small.split(32)])
            return {
                "psnr": psnr(made, test, scale), "last_loss": sum(losses[-20:]) / len(losses[-20:]),
                "parameters": sum(p.numel() for p in model.parameters()),
            }  # fmt: skip

        found = study(chosen, run, "psnr", BICUBIC, seeds, progress, keep, (scale, steps, batch, tested))
        scores = {n: {r["seed"]: r["psnr"] for r in found["runs"] if r["name"] == n} for n in chosen}
        for row in found["rows"]:
            gap = paired_interval(scores[row["name"]], scores[PLAIN]) if PLAIN in chosen else None
            row["against_plain"] = None if gap is None else interval(gap)
        result["scales"][f"x{scale}"] = found
    if pictures is not None:
        curves = {
            r["name"]: [
                (at, held["against"]["mean"], held["against"]["half"])
                for at, of in result["scales"].items()
                for held in of["rows"]
                if held["name"] == r["name"]
            ]
            for r in next(iter(result["scales"].values()))["rows"]
            if r["name"] != BICUBIC
        }
        if curves:
            picture(
                Path(pictures) / "restoration-cpu.svg", curves, "scale", "PSNR above bicubic, dB",
                "super-resolution of crops, two blocks of width 96",
            )  # fmt: skip
    return result
