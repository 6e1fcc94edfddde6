"""Are two digits far apart the same? Large kernels, dynamic ones, attention and spectra against 3 x 3 convolutions.

``attnlib bench --suite reach --out benchmarks/results`` measures again what ``reach-cpu.json`` holds and draws it. Two
handwritten digits stand in a strip of 32 x 128 pixels, 26 to 104 pixels apart. Networks of the families' own
constructors, three stages and equal parameters, are read at the two tokens (16 x 16 pixels) where the digits are: which
digit is here, and is the other one the same. The second cannot be told without reach. So that a failure is one of reach
and not of telling digits apart, a residual network is also trained and tested on pairs that nearly touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.overlock import overlock
from ...models.backbones.resnet import resnet
from ...models.backbones.spectformer import spectformer_h
from ...models.backbones.stages import Backbone, Features
from ...models.backbones.uniformer import uniformer
from ...models.backbones.van import van
from ...nn.local.overlock_contmix import ContMix
from ...nn.local.uniformer import LocalRelation
from ...nn.modulation.spectformer import SpectralGating
from ...nn.modulation.van import LargeKernelAttention
from ..clock import machine
from ..data.worlds import digit_pairs
from ..fields import mean_distance, squared_gradients, support
from ..small import Progress, fit, picture, started_small, study

SIZE, DIGIT, CLASSES, TOKEN = (32, 128), 24, 4, 16
APART, NEAR = (26, 104), (26, 34)
#: Lower ends of the distances that are told apart in the picture, and the end of the last.
BINS = (26, 46, 66, 86, 105)

BASELINE, CONTROL = "3 x 3 residual network", "3 x 3 residual network, near pairs alone"
_GIVEN: dict[str, Any] = dict(num_classes=0, in_chans=1, img_size=SIZE)


def _residual() -> Backbone:
    return resnet((16, 32, 48), (2, 2, 2), basic=True, stem="tiered", stem_dim=24, **_GIVEN)


#: Contestant -> its backbone; what stands behind the map of 16 pixels a token is let go.
CONTESTANTS: dict[str, Callable[[], Backbone]] = {
    BASELINE: _residual,
    CONTROL: _residual,
    "VAN": lambda: van((18, 36, 54), (1, 1, 2), (4, 4, 4), **_GIVEN),
    "OverLoCK": lambda: overlock(
        (16, 32, 48, 48), (1, 1, 1, 1), (1, 1), (1, 1), (9, 9, 5, 5), 3, mlp_ratio=2.0, focus_mlp_ratio=2.0,
        projection=64, auxiliary=False, **_GIVEN,
    ),
    "UniFormer": lambda: uniformer((1, 1, 2, 1), (20, 40, 60, 60), head_dim=20, **_GIVEN),
    "SpectFormer": lambda: spectformer_h((18, 36, 54), (1, 1, 2), (1, 2, 3), (4, 4, 4), stem_dim=12, **_GIVEN),
}  # fmt: skip

#: Mechanism -> (itself at 8 channels, sides of a map that it is looked at on).
MECHANISMS: dict[str, Callable[[int], nn.Module]] = {
    "VAN's large kernel attention": lambda side: LargeKernelAttention(8),
    "UniFormer's local relation": lambda side: LocalRelation(8),
    "OverLoCK's ContMix, 7 x 7": lambda side: ContMix(8, 1, 7, 5),
    "SpectFormer's spectral gate": lambda side: SpectralGating(8, (side, side)),
}


class Pairs(nn.Module):
    """A backbone read at given tokens: logits of the digit that is there, and of whether the other is the same."""

    def __init__(self, name: str):
        super().__init__()
        model = CONTESTANTS[name]()
        level = next(i for i, info in enumerate(model.feature_info) if info["reduction"] == TOKEN)
        self.body = Features(model, [level])
        dim = self.body.feature_info.channels()[0]
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES + 2)

    def forward(self, x: Tensor, corners: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, H, W) and (B, 2, 2) -> (B, 2, classes) and (B, 2, 2)."""
        at = (corners + DIGIT // 2) // TOKEN
        y = self.tokens(x)[torch.arange(len(x))[:, None], at[..., 0], at[..., 1]]
        own, same = self.head(y).split([CLASSES, 2], -1)
        return own, same

    def tokens(self, x: Tensor) -> Tensor:
        """(B, H / 16, W / 16, C), normed."""
        return self.norm(self.body(x)[0].movedim(1, -1))


def sees(model: Pairs, x: Tensor) -> float:
    """Pixels from the middle of a token in the middle to what it depends on, on average; see :mod:`..fields`."""
    x = x.clone().requires_grad_()
    row, column = (n // TOKEN // 2 for n in SIZE)
    centre = ((row + 0.5) * TOKEN - 0.5, (column + 0.5) * TOKEN - 0.5)
    return mean_distance(squared_gradients(model.tokens(x)[:, row, column], x), centre)


def _loss(model: nn.Module, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x, classes, corners = given
    own, same = model(x, corners)
    alike = (classes[:, 0] == classes[:, 1]).long()[:, None].expand(-1, 2)
    return F.cross_entropy(own.flatten(0, 1), classes.flatten()) + F.cross_entropy(same.flatten(0, 1), alike.flatten())


@torch.no_grad()
def score(model: Pairs, x: Tensor, classes: Tensor, corners: Tensor) -> dict[str, float]:
    """Percent of digits named, of pairs told, and the second at every stretch of distances that there is."""
    parts = [model.eval()(*given) for given in zip(x.split(100), corners.split(100), strict=True)]
    own, same = (torch.cat(part).argmax(-1) for part in zip(*parts, strict=True))
    right = (same == (classes[:, :1] == classes[:, 1:])).float().mean(1)
    gap = corners[:, 1, 1] - corners[:, 0, 1]
    found = {"same": 100 * float(right.mean()), "digit": 100 * float((own == classes).float().mean())}
    for low, end in zip(BINS[:-1], BINS[1:], strict=True):
        inside = (gap >= low) & (gap < end)
        if inside.any():
            found[f"same_{low}"] = 100 * float(right[inside].mean())
    return found


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 280,
    batch: int = 32,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 2000,
    side: int = 41,
) -> dict[str, Any]:
    """Train every contestant with every seed, and look at what it sees.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``reach-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.
        side: of the map that mechanisms alone are looked at on.

    Returns:
        Plain values, for JSON.
    """

    def draw(name: str, count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        apart = NEAR if name == CONTROL else APART
        return digit_pairs(count, SIZE, DIGIT, apart, CLASSES, part, generator=generator)

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = started_small(Pairs(name), seed)
        assert isinstance(model, Pairs)
        test = draw(name, tested, "test", torch.Generator().manual_seed(1234))
        before = sees(model.eval(), test[0][:32])
        losses = fit(model, lambda g: draw(name, batch, "train", g), _loss, steps, lr=4e-3, seed=seed)
        assert all(map(math.isfinite, losses))
        return {
            **score(model, *test), "sees_pixels": sees(model.eval(), test[0][:32]), "saw_pixels_untrained": before,
            "parameters": sum(p.numel() for p in model.parameters()),
        }  # fmt: skip

    key = (steps, batch, tested)
    result: dict[str, Any] = {
        "what": "two digits far apart, the same or not: networks of equal parameters", "machine": machine(),
        "steps": steps, "batch": batch, "tested": tested, "chance": {"same": 50.0, "digit": 100 / CLASSES},
        "tokens that one token of a mechanism depends on": {
            name: dict(zip(("rows", "columns"), support(make(side), 8, side), strict=True))
            for name, make in MECHANISMS.items()
        },
        "map_side": side,
        **study(list(CONTESTANTS), run, "same", BASELINE, seeds, progress, keep, key),
    }  # fmt: skip
    if pictures is not None:
        curves = {
            row["name"]: [
                ((low + end - 1) / 2, row[f"same_{low}"]["mean"], row[f"same_{low}"]["half"])
                for low, end in zip(BINS[:-1], BINS[1:], strict=True)
                if f"same_{low}" in row
            ]
            for row in result["rows"]
        }
        picture(
            Path(pictures) / "reach-cpu.svg", curves, "distance of the digits, pixels", "right: same or not, %",
            "two digits in a strip, equal parameters", dashed=(BASELINE, CONTROL),
        )  # fmt: skip
    return result
