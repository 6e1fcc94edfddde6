"""Leaving early: Dynamic Perceiver's exits against linear ones on the same CNN, and on one widened to the same cost.

``attnlib bench --suite exits --out benchmarks/results`` measures again what ``exits-cpu.json`` holds and draws it.
Handwritten digits at four levels of noise, so that some images are easy and others are not. Thresholds
come from images that were kept aside: of many ratios of samples from exit to exit the one is taken that is right most
often there within a budget of counted multiply-adds; what is told is of other images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.dynamic_perceiver import with_latents
from ...models.backbones.regnet import regnet
from ...models.exits import (
    EarlyExit,
    choose_exits,
    confidence,
    exit_costs,
    exit_fractions,
    exit_losses,
    find_thresholds,
)
from ...nn.layers import masked_mean
from ...types import State
from ..clock import interleave, machine
from ..data.files import digits
from ..small import Progress, fit, parameters, picture, study
from ..stats import mean_interval

SIDE, CLASSES, NOISE = 32, 10, (0.0, 0.3, 0.6, 1.2)
WEIGHTS = (0.5, 0.5, 1.0, 1.0)
RATIOS = (0.02, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 50.0)
OURS, BASELINE, WIDE, ALONE = "latents", "linear exits", "linear exits, wider CNN", "one exit"

_CNN: dict[str, Any] = dict(initial=32, slope=20.0, factor=1.6, depth=6, group=8, stem_dim=16)
#: Of a CNN whose last linear exit costs what the last exit of latents costs, at about as many parameters.
_WIDER: dict[str, Any] = dict(initial=48, slope=34.0, factor=1.75, depth=6, group=8, stem_dim=16)


class LinearExits(EarlyExit, nn.Module):
    """Linear maps of the mean token behind every stage of a CNN."""

    def __init__(self, cnn: Any, num_classes: int):
        super().__init__()
        self.stem, self.stages, self.num_exits = cnn.stem, cnn.stages, len(cnn.stages)
        dims = [int(info["num_chs"]) for info in cnn.feature_info[cnn.before :]]
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) for dim in dims)

    def begin(self, x: Tensor, valid: Tensor | None = None) -> State:
        return State({"x": self.stem(x.permute(0, 2, 3, 1).contiguous(), valid)[0]})

    def advance(self, exit: int, state: State) -> tuple[Tensor, State]:
        x, _ = self.stages[exit](state["x"])
        return self.heads[exit](masked_mean(x)), State({"x": x})


def build(name: str) -> Any:
    """A contestant."""
    cnn = regnet(**(_WIDER if name == WIDE else _CNN), num_classes=0, in_chans=1)
    for stage in cnn.stages:  # branches that start at zero would leave strided 1 x 1 convolutions alone at first
        for block in stage.blocks:  # type: ignore[union-attr]
            nn.init.ones_(block.conv3.norm.weight)
    if name != OURS:
        return LinearExits(cnn, CLASSES)
    return with_latents(
        cnn, num_latents=8, latent_depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), mlp_ratio=2.0, grid=4,
        num_classes=CLASSES,
    )  # fmt: skip


def graded(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits in noise, a fourth of them at each level: (count, 1, side, side) and labels."""
    known = digits()
    images, labels = known.train if part == "train" else known.test
    chosen = torch.randint(len(images), (count,), generator=generator)
    large = F.interpolate(images[chosen].permute(0, 3, 1, 2), (SIDE, SIDE), mode="bilinear")
    level = torch.tensor(NOISE)[torch.arange(count) % len(NOISE)]
    noise = torch.randn(large.shape, generator=generator)
    return large + level[:, None, None, None] * noise, labels[chosen]


def _loss(model: Any, given: tuple[Tensor, Tensor], weights: Sequence[float], distillation: float) -> Tensor:
    return torch.stack(list(exit_losses(model.exits(given[0]), given[1], weights, distillation).values())).sum()


@torch.no_grad()
def _logits(model: Any, x: Tensor) -> Tensor:
    parts = [torch.stack(model.exits(part)) for part in x.split(200)]
    return torch.cat(parts, 1)


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 400,
    batch: int = 32,
    seeds: tuple[int, ...] = (0, 1, 2),
    drawn: int = 2400,
    tested: int = 1200,
    budgets: tuple[float, ...] = (1.6, 1.8, 2.0),
    repeats: int = 5,
) -> dict[str, Any]:
    """Train every contestant, find thresholds, let test images leave.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``exits-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.
        drawn: images of training, and of what thresholds are found on a third as many.
        budgets: average millions of multiply-adds per image; contestants are compared at the middle one.
        repeats: of timing.

    Returns:
        Plain values, for JSON.
    """
    test = graded(tested, "test", torch.Generator().manual_seed(1234))
    held: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
    curves: dict[str, dict[float, list[tuple[float, float]]]] = {}

    def data(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        if seed not in held:
            held.clear()
            g = torch.Generator().manual_seed(seed)
            held[seed] = graded(drawn, "train", g), graded(drawn // 3, "train", g)
        return held[seed]

    def run(name: str, seed: int) -> dict[str, float]:
        (x, y), (val_x, val_y) = data(seed)
        torch.manual_seed(seed)
        model = build(name)
        weights, distillation = ((0.0, 0.0, 0.0, 1.0), 0.0) if name == ALONE else (WEIGHTS, 0.5)

        def some(g: torch.Generator) -> tuple[Tensor, Tensor]:
            chosen = torch.randint(len(x), (batch,), generator=g)
            return x[chosen], y[chosen]

        fit(model, some, lambda m, given: _loss(m, given, weights, distillation), steps, lr=4e-3, seed=seed)
        model.eval()
        costs = torch.tensor(exit_costs(model, test[0][:1])) / 1e6
        val, asked = _logits(model, val_x), _logits(model, test[0])
        right = (asked.argmax(-1) == test[1]).double().mean(1)
        found: dict[str, float] = {f"exit {k + 1}, right": 100 * float(r) for k, r in enumerate(right)}
        found |= {f"exit {k + 1}, M": float(c) for k, c in enumerate(costs)}
        found["parameters"] = parameters(model)
        if name == ALONE:
            return {**found, **{f"right at {b} M": found["exit 4, right"] for b in budgets}}
        sure, val_sure = confidence(asked), confidence(val)

        def outcome(logits: Tensor, sure: Tensor, target: Tensor, thresholds: Sequence[float]) -> tuple[float, float]:
            exit = choose_exits(sure, thresholds)
            answer = logits[exit, torch.arange(len(target))].argmax(-1)
            return float(costs[exit].mean()), 100 * float((answer == target).double().mean())

        ways = [find_thresholds(val_sure, exit_fractions(ratio, 4)) for ratio in RATIOS]
        ways += [tuple([math.inf] * k + [-math.inf] * (3 - k)) for k in range(4)]
        of_val = [outcome(val, val_sure, val_y, t) for t in ways]
        for budget in budgets:
            fits = [(r, -c, i) for i, (c, r) in enumerate(of_val) if c <= budget]
            best = ways[max(fits)[2]]
            cost, hit = outcome(asked, sure, test[1], best)
            found |= {f"right at {budget} M": hit, f"spent at {budget} M": cost}
            if budget == middle:
                found |= _times(model, test[0][torch.randperm(len(test[0]))[:128]], best, repeats)
        for ratio, way in zip(RATIOS, ways, strict=False):
            cost, hit = outcome(asked, sure, test[1], way)
            found |= {f"ratio {ratio}, M": cost, f"ratio {ratio}, right": hit}
        return found

    middle = budgets[len(budgets) // 2]
    key = (steps, batch, drawn, tested, budgets, repeats)
    names = [BASELINE, WIDE, ALONE, OURS]
    found = study(names, run, f"right at {middle} M", BASELINE, seeds, progress, keep, key)
    for r in found["runs"]:
        for ratio in RATIOS if r["name"] != ALONE else ():
            at = curves.setdefault(r["name"], {}).setdefault(ratio, [])
            at.append((r[f"ratio {ratio}, M"], r[f"ratio {ratio}, right"]))
    result = {
        "what": "leaving early: latents against linear exits", "machine": machine(), "steps": steps, "batch": batch,
        "drawn": drawn, "tested": len(test[0]), "chance": 100 / CLASSES, "budgets": budgets, **found,
    }  # fmt: skip
    if pictures is not None:
        shown: dict[str, list[tuple[Any, float, float | None]]] = {}
        for name, by_ratio in curves.items():
            for pairs in by_ratio.values():
                mean = mean_interval([right for _, right in pairs])
                cost = sum(c for c, _ in pairs) / len(pairs)
                shown.setdefault(name, []).append((cost, mean.mean, mean.half))
        only = next(r for r in found["rows"] if r["name"] == ALONE)
        shown[ALONE] = [(only["exit 4, M"]["mean"], only["exit 4, right"]["mean"], only["exit 4, right"]["half"])]
        picture(
            Path(pictures) / "exits-cpu.svg", shown, "average multiply-adds per image, millions", "right, %",
            "leaving early, digits at four levels of noise", dashed=(BASELINE, WIDE),
        )  # fmt: skip
    return result


def _times(model: Any, x: Tensor, thresholds: Sequence[float], repeats: int) -> dict[str, float]:
    """Milliseconds per image, whole and leaving early, one by one and all together, by the processor's clock."""
    never = (math.inf,) * len(thresholds)
    few = x[:32]
    runs: dict[str, Any] = {
        "whole, batch": lambda: model.predict(x, never),
        "early, batch": lambda: model.predict(x, thresholds),
        "whole, one": lambda: [model.predict(one, never) for one in few.split(1)],
        "early, one": lambda: [model.predict(one, thresholds) for one in few.split(1)],
    }
    taken = interleave(runs, repeats, "cpu")
    each = {name: 1e3 * taken[name].median / len(x if name.endswith("batch") else few) for name in runs}
    return {f"ms, {name}": value for name, value in each.items()}
