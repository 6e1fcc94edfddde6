"""Two branches of patches: what exchanging class tokens (CrossViT) gives over averaging the branches' answers.

``attnlib bench --suite branches --out benchmarks/results`` measures again what ``branches-cpu.json`` holds and draws
it. Two small vision transformers see patches of 12 and of 16 pixels of one image; their logits are averaged. Between
stages their class tokens read the other branch's patches, are added to each other, or stay apart; MLPs are as wide as
it takes for all to have equal parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.crossvit import CrossViT, crossvit
from ...nn.dense.crossvit import narrowed
from ..clock import machine
from ..data.worlds import TEXTURES, texture_crops
from ..small import Progress, accuracy, fit, operations, parameters, picture, started_small, study

SIDE = 48
DIMS, HEADS, DEPTHS, RATIO = (32, 48), (2, 3), ((1, 1), (1, 1)), 2.0
BASELINE, ADDED, OURS = "averaged branches", "class tokens added", "class tokens exchanged"
NAMES = (BASELINE, ADDED, OURS)

#: Task -> (how images are drawn, classes).
TASKS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], int]] = {
    "texture crops": (texture_crops, len(TEXTURES)),
}


class Apart(nn.Module):
    """Both streams as they are."""

    def forward(self, *streams: Tensor, valid: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        return streams


class AddedClassTokens(nn.Module):
    """The class token of each stream, in the other's width, and the other's are added, and come back.

    Args:
        dims: width of both streams.
    """

    def __init__(self, dims: Sequence[int]):
        super().__init__()
        pairs = list(zip(dims, dims[::-1], strict=True))
        self.there = nn.ModuleList(narrowed(a, b) for a, b in pairs)
        self.back = nn.ModuleList(narrowed(b, a) for a, b in pairs)

    def forward(self, *streams: Tensor, valid: Sequence[Tensor | None] | None = None) -> tuple[Tensor, ...]:
        out = []
        for there, back, x, other in zip(self.there, self.back, streams, streams[::-1], strict=True):
            out.append(torch.cat([back(there(x[:, :1]) + other[:, :1]), x[:, 1:]], 1))
        return tuple(out)


def fused(model: CrossViT, make: Callable[[], nn.Module]) -> CrossViT:
    """The same model with another module in the place of every exchange."""
    stages: Any = model.stages
    for stage in stages:
        stage.exchange = make()
    return model


def build(name: str, classes: int, ratio: float | None = None) -> CrossViT:
    """A contestant, with the parameters of the one that exchanges unless the MLPs' ``ratio`` is given."""
    ratio = (RATIO if name == OURS else ratio_for(name)) if ratio is None else ratio
    model = crossvit(
        DIMS, DEPTHS, HEADS, ratio, multi_conv=True, num_classes=classes, in_chans=1, img_size=SIDE
    )  # fmt: skip
    if name == OURS:
        return model
    return fused(model, Apart if name == BASELINE else partial(AddedClassTokens, DIMS))


@functools.cache
def ratio_for(name: str) -> float:
    """The MLPs' hidden width over the width with which a contestant has as many parameters as the exchanging one."""
    with torch.device("meta"):
        goal, low, high = (parameters(build(n, 2, r)) for n, r in ((OURS, RATIO), (name, 1.0), (name, 2.0)))
    return 1 + (goal - low) / (high - low)


@torch.no_grad()
def _alone(model: Any, x: Tensor, labels: Tensor) -> list[float]:
    """Percent right of each branch's own logits."""
    read = [torch.cat(parts)[:, 0] for parts in zip(*(model.forward_features(p) for p in x.split(128)), strict=True)]
    return [100 * float((fc(t).argmax(-1) == labels).float().mean()) for fc, t in zip(model.head.fc, read, strict=True)]


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 600,
    batch: int = 24,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 1024,
) -> dict[str, Any]:
    """Train every contestant on every task.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``branches-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {
        "what": "exchanging class tokens of two branches against averaging the branches", "machine": machine(),
        "steps": steps, "batch": batch, "tested": tested, "side": SIDE, "tasks": {},
    }  # fmt: skip
    for task, (draw, classes) in TASKS.items():
        test = draw(tested, SIDE, "test", generator=torch.Generator().manual_seed(1234))

        def run(name: str, seed: int, draw: Any = draw, classes: int = classes, test: Any = test) -> dict[str, float]:
            torch.manual_seed(seed)
            model: Any = started_small(build(name, classes), seed)

            def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(m(given[0]), given[1])

            losses = fit(model, lambda g: draw(batch, SIDE, generator=g), loss, steps, lr=3e-3, seed=seed)
            found = {
                "accuracy": accuracy(model, *test), "last_loss": sum(losses[-20:]) / len(losses[-20:]),
                "parameters": parameters(model),
                "multiply-adds, M": operations(lambda: model.eval()(test[0][:1])) / 2e6,
            }  # fmt: skip
            found["small patches alone"], found["large patches alone"] = _alone(model, *test)
            if name == OURS:  # what is left where class tokens come back without having read
                for stage in model.stages:
                    stage.exchange.attn = nn.ModuleList(_Nothing() for _ in stage.exchange.attn)
                found["not read"] = accuracy(model, *test)
            return found

        rows = study(list(NAMES), run, "accuracy", BASELINE, seeds, progress, keep, (task, steps, batch, tested))
        result["tasks"][task] = {**rows, "most frequent class": 100 * float(test[1].bincount().max()) / len(test[1])}
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            name: [
                (task, row["accuracy"]["mean"], row["accuracy"]["half"])
                for task, found in result["tasks"].items() for row in found["rows"] if row["name"] == name
            ]
            for name in NAMES
        }  # fmt: skip
        picture(
            Path(pictures) / "branches-cpu.svg", curves, "", "right, %",
            "two branches of patches, equal parameters", dashed=(BASELINE,),
        )  # fmt: skip
    return result


class _Nothing(nn.Module):
    """In the place of attention: zeros."""

    def forward(self, x: Tensor, context: Tensor, context_valid: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)
