"""Mechanisms of the grid family in one small backbone: quality, time, memory and what a token sees.

``attnlib bench --suite mixers --out benchmarks/results`` measures again what ``mixers-cpu.json`` holds and draws it.
Every contestant stands in the same two blocks on a map of 12 x 12 tokens (images of 24 x 24 pixels, two convolutions)
with a learned table of positions; hidden layers of the MLPs are as wide as it takes for all to have the parameters of
the plain vision transformer. Two tasks: a handwritten digit among pieces of others, and the photograph that a crop is
from, told on parts of the photographs that were not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.stages import Backbone, Head, Stage
from ...models.blocks import Block, ConvStem, Place, fitted, places
from ...nn.layers import ConvNorm, Mlp, normed
from ...nn.partition.crossformer import LongShortAttention
from ...nn.partition.maxvit import PartitionAttention
from ..clock import interleave, machine, peak_bytes
from ..data.worlds import TEXTURES, cluttered_digits, texture_crops
from ..fields import mean_distance, squared_gradients
from ..small import Progress, accuracy, fit, parameters, picture, study, training_step

SIDE, PATCH, DIM, HEADS, DEPTH, RATIO = 24, 2, 48, 4, 2, 3.0

#: Task -> (how images are drawn, classes).
TASKS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], int]] = {
    "digits on clutter": (partial(cluttered_digits, pieces=4, digit=18), 10),
    "texture crops": (texture_crops, len(TEXTURES)),
}

BASELINE = "vision transformer"


class Convolutions(nn.Module):
    """Two 3 x 3 convolutions with norms: the residual network that attention is held against."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(dim, hidden, 3, padding=1), nn.Conv2d(hidden, dim, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (dim, hidden))

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        y = x.permute(0, 3, 1, 2)
        y = self.first(F.relu(self.norms[0](y)))
        y = self.second(F.relu(self.norms[1](y)))
        return x + y.permute(0, 2, 3, 1), carry


def _swin(place: Place) -> nn.Module:
    return PartitionAttention(place.dim, place.num_heads, 4, shift=2 * (place.block % 2))


def _near_far(place: Place) -> nn.Module:
    return LongShortAttention(place.dim, place.num_heads, 4, ("near", "far")[place.block % 2], 4)


def _window_channel(place: Place) -> nn.Module:
    return fitted("davit")(place) if place.block % 2 else PartitionAttention(place.dim, place.num_heads, 4)


#: Contestant -> what makes its mechanism; ``None`` for the residual network.
CONTESTANTS: dict[str, Callable[[Place], nn.Module] | None] = {
    BASELINE: fitted("softmax-attention"),
    "Swin windows": _swin,
    "residual network": None,
    "neighborhoods (NAT, 5 x 5)": fitted("dinat", {"kernel_size": 5}),
    "near and far groups (CrossFormer)": _near_far,
    "blocks and grids (MaxViT)": fitted("maxvit", {"window_size": 4}),
    "windows and channels (DaViT)": _window_channel,
    "halos (HaloNet)": fitted("halonet", {"block_size": 4, "halo_size": 2}),
    "routed regions (BiFormer)": fitted("biformer", {"n_win": 4, "topk": 4}),
    "agents": fitted("agent-attention", {"num_agents": 16}),
    "focal modulation (FocalNet)": fitted("focalnet"),
}


class Positions(nn.Module):
    """Two 3 x 3 convolutions, the second of stride 2, and a learned table of positions."""

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.convs = ConvStem(ConvNorm(1, dim // 2, 3), ConvNorm(dim // 2, dim, 3, PATCH))
        self.table = nn.Parameter(0.02 * torch.randn(1, tokens, tokens, dim))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x, valid = self.convs(x, valid)
        return x + self.table, valid


def build(name: str, classes: int, hidden: int | None = None, side: int = SIDE) -> Backbone:
    """A contestant; ``hidden`` is the width of its MLPs (of its convolutions, for the residual network)."""
    return backbone(CONTESTANTS[name], classes, hidden, side)


def backbone(
    make: Callable[[Place], nn.Module] | None, classes: int, hidden: int | None = None, side: int = SIDE
) -> Backbone:
    """Two blocks of what ``make`` makes, or of the residual network, behind convolutions and positions."""
    hidden = int(RATIO * DIM) if hidden is None else hidden
    blocks: list[nn.Module] = []
    for place in places((DIM,), (DEPTH,), (HEADS,), (PATCH,))[0]:
        if make is None:
            blocks.append(Convolutions(DIM, hidden))
        else:
            blocks.append(Block(DIM, make(place), mlp=Mlp(DIM, hidden / DIM)))
    head = Head(DIM, classes)
    stem = Positions(DIM, side // PATCH)
    return Backbone(stem, [Stage(blocks)], (DIM,), (PATCH,), nn.LayerNorm(DIM), head, classes, 1, side)


def width_for(name: str, goal: int, classes: int) -> int:
    """The hidden width with which a contestant has the wanted number of parameters, as nearly as whole widths can."""
    with torch.device("meta"):
        low, high = (parameters(build(name, classes, h)) for h in (1, 2))
    return max(1, round(1 + (goal - low) / (high - low)))


def receptive_field(model: Backbone, images: Tensor) -> float:
    """Pixels from the middle at which what the middle token of the last map depends on lies, on average.

    Weighted by the squared gradient of the token's mean with regard to every pixel (Luo et al., 2016).
    """
    x = images.clone().requires_grad_()
    y = normed(model.norm, model.forward_features(x), None)
    at = y.shape[1] // 2
    return mean_distance(squared_gradients(y[:, at, at], x), ((at + 0.5) * PATCH - 0.5,) * 2)


def costs(goal: int, side: int = 64, batch: int = 4, repeats: int = 5) -> dict[str, dict[str, float]]:
    """Seconds and bytes of a training step at ``side`` pixels, all contestants in turn."""
    x = torch.randn(batch, 1, side, side)

    steps = {}
    for name in CONTESTANTS:
        torch.manual_seed(0)
        steps[name] = training_step(build(name, 10, width_for(name, goal, 10), side), lambda m: m(x).square().sum())
    times = interleave(steps, repeats)
    plain = times[BASELINE].minimum
    return {
        name: {
            "step_seconds": times[name].minimum, "x_plain": times[name].minimum / plain,
            "peak_megabytes": peak_bytes(run) / 1e6,
        }
        for name, run in steps.items()
    }  # fmt: skip


def on_tasks(
    chosen: Sequence[str],
    make: Callable[[str, int], Backbone],
    baseline: str,
    steps: int,
    batch: int,
    seeds: tuple[int, ...],
    tested: int,
    progress: Progress | None,
    keep: str | Path | None,
) -> dict[str, Any]:
    """The study of each task: ``make(name, classes)`` builds a contestant, which is trained and looked at."""
    found: dict[str, Any] = {}
    for task, (draw, classes) in TASKS.items():
        test = draw(tested, SIDE, "test", generator=torch.Generator().manual_seed(1234))

        def run(name: str, seed: int, draw: Any = draw, classes: int = classes, test: Any = test) -> dict[str, float]:
            torch.manual_seed(seed)
            model = make(name, classes)

            def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(m(given[0]), given[1])

            losses = fit(model, lambda g: draw(batch, SIDE, generator=g), loss, steps, lr=4e-3, seed=seed)
            return {
                "accuracy": accuracy(model, *test), "last_loss": sum(losses[-20:]) / len(losses[-20:]),
                "sees_pixels": receptive_field(model.eval(), test[0][:16]), "parameters": parameters(model),
            }  # fmt: skip

        rows = study(chosen, run, "accuracy", baseline, seeds, progress, keep, (task, steps, batch, tested))
        found[task] = {**rows, "most frequent class": 100 * float(test[1].bincount().max()) / len(test[1])}
    return found


def draw_tasks(result: dict[str, Any], folder: Path, stem: str, cost: str, label: str) -> None:
    """A picture for each task: accuracy over ``cost``, which ``label`` explains."""
    for task, found in result["tasks"].items():
        curves = {
            r["name"]: [(result["costs"][r["name"]][cost], r["accuracy"]["mean"], r["accuracy"]["half"])]
            for r in found["rows"]
        }
        picture(
            folder / f"{stem}-{task.split()[0]}-cpu.svg", curves, label, "accuracy, %", f"{task}, equal parameters",
            log="x",
        )  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 300,
    batch: int = 24,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 1024,
    names: tuple[str, ...] | None = None,
    cost_side: int = 64,
) -> dict[str, Any]:
    """Train every contestant on both tasks, and time it.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``mixers-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.
        names: contestants; all by default. The plain vision transformer is always among them.
        cost_side: pixels per side of the images that time and memory are taken on.

    Returns:
        Plain values, for JSON.
    """
    chosen = [n for n in CONTESTANTS if names is None or n in (*names, BASELINE)]
    with torch.device("meta"):
        goal = parameters(build(BASELINE, 10))
    result: dict[str, Any] = {
        "what": "mechanisms in one backbone of equal parameters", "machine": machine(), "steps": steps,
        "batch": batch, "tested": tested, "tasks": {},
    }  # fmt: skip
    result["tasks"] = on_tasks(
        chosen, lambda name, classes: build(name, classes, width_for(name, goal, classes)), BASELINE, steps, batch,
        seeds, tested, progress, keep,
    )  # fmt: skip
    result["costs"] = {n: v for n, v in costs(goal, cost_side).items() if n in chosen}
    if pictures is not None:
        draw_tasks(
            result, Path(pictures), "mixers", "x_plain",
            f"time of a training step at {cost_side} pixels, times the vision transformer's",
        )  # fmt: skip
    return result
