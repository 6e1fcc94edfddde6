"""Gates in one small convolutional network of equal parameters: what each of them sees.

``attnlib bench --suite gates --out benchmarks/results`` measures again what ``gates-cpu.json`` holds and draws it. Two
residual blocks of two 3 x 3 convolutions on a map of 12 x 12, a gate at the end of every branch; hidden widths such
that all networks have the parameters of the one without. Three tasks: the row of a bar beside an upright one, where a
handwritten digit among pieces of others is (a heat map), and which digit it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.layers import ConvNorm
from ...nn.registry import create
from ..clock import machine
from ..data.worlds import cluttered_digits, placed_digits
from ..small import Progress, fit, picture, study

SIDE, DIM, DEPTH, HIDDEN, CELLS, DIGIT = 24, 32, 2, 32, 12, 14

BASELINE = "none"
#: Contestant -> name and settings of its gate.
GATES: dict[str, tuple[str, dict[str, Any]] | None] = {
    BASELINE: None,
    "SE": ("squeeze-excite", {"reduction": 4}),
    "ECA": ("eca", {}),
    "PSA, parallel": ("polarized-self-attention", {}),
    "PSA, sequential": ("polarized-self-attention", {"preset": "sequential"}),
    "ELA": ("ela-efficient-local-attention", {}),
    "ULSAM": ("ulsam", {}),
}


class Branch(nn.Module):
    """``x + gate(conv(relu(conv(x))))``, with norms."""

    def __init__(self, gate: nn.Module, hidden: int):
        super().__init__()
        self.first, self.second = ConvNorm(DIM, hidden, 3, activation=nn.ReLU), ConvNorm(hidden, DIM, 3)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate(self.second(self.first(x)))


def build(name: str, hidden: int = HIDDEN) -> nn.Sequential:
    """A contestant without a head: (B, H, W, 1) -> (B, H / 2, W / 2, C)."""
    setting = GATES[name]
    blocks = [
        Branch(nn.Identity() if setting is None else create(setting[0], dim=DIM, **setting[1]), hidden)
        for _ in range(DEPTH)
    ]
    return nn.Sequential(ConvNorm(1, DIM, 3, 2, activation=nn.ReLU), *blocks)


def width_for(name: str) -> int:
    """The hidden width with which a contestant has the parameters of the network without gates."""
    with torch.device("meta"):
        goal, low, high = (
            sum(p.numel() for p in build(n, h).parameters()) for n, h in ((BASELINE, HIDDEN), (name, 1), (name, 2))
        )
    return max(1, round(1 + (goal - low) / (high - low)))


def bars(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise, a level bar whose row is asked for, and an upright one as bright."""
    del part
    x = 0.4 * torch.randn(count, SIDE, SIDE, generator=generator)
    rows = torch.randint(CELLS, (count,), generator=generator)
    at = torch.randint(SIDE - 8, (count, 3), generator=generator).tolist()
    for i, row in enumerate(rows.tolist()):
        x[i, 2 * row : 2 * row + 2, at[i][0] : at[i][0] + 8] += 1
        x[i, at[i][1] : at[i][1] + 8, at[i][2] : at[i][2] + 2] += 1
    return x.unsqueeze(-1), rows


def places(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A whole digit among pieces of others, and the cell that its middle lies in."""
    images, _, corners = placed_digits(count, SIDE, part, 8, generator, DIGIT)
    cells = (corners + DIGIT // 2) // 2
    return images.movedim(1, -1), cells[:, 0] * CELLS + cells[:, 1]


def clutter(count: int, part: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which digit stands among pieces of others."""
    images, labels = cluttered_digits(count, SIDE, part, pieces=4, generator=generator, digit=DIGIT)
    return images.movedim(1, -1), labels


def heat(labels: Tensor) -> Tensor:
    """Gaussian heat maps (B, cells, cells) of cells, with a deviation of one cell."""
    grid = torch.arange(CELLS).float()
    rows, columns = (grid[None] - at[:, None] for at in (labels // CELLS, labels % CELLS))
    return torch.exp(-(rows[:, :, None] ** 2 + columns[:, None, :] ** 2) / 2)


class Task(nn.Module):
    """A network with its head: classes of the mean token, or one number per cell."""

    def __init__(self, body: nn.Module, classes: int):
        super().__init__()
        self.body, self.norm, self.head = body, nn.LayerNorm(DIM), nn.Linear(DIM, max(classes, 1))
        self.maps = not classes

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.body(x))
        return self.head(x).squeeze(-1) if self.maps else self.head(x.mean((1, 2)))


#: Task -> (how it is drawn, classes; 0: a heat map).
TASKS: dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], int]] = {
    "row of a bar": (bars, CELLS),
    "place of a digit": (places, 0),
    "digits on clutter": (clutter, 10),
}


def _loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    y = model(given[0])
    return F.cross_entropy(y, given[1]) if y.dim() == 2 else 10 * F.mse_loss(y, heat(given[1]))


@torch.no_grad()
def score(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent right; of heat maps, percent whose highest cell is the true one, and how far it is off in cells."""
    y = torch.cat([model.eval()(part) for part in x.split(128)])
    found = y.flatten(1).argmax(-1)
    right = {"right": 100 * float((found == labels).float().mean())}
    if y.dim() == 2:
        return right
    off = torch.stack([found // CELLS - labels // CELLS, found % CELLS - labels % CELLS], -1)
    return {**right, "cells_off": float(off.float().norm(dim=-1).mean())}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 150,
    batch: int = 24,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    tested: int = 1000,
) -> dict[str, Any]:
    """Train every contestant on every task.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``gates-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {
        "what": "gates in one convolutional network of equal parameters", "machine": machine(), "steps": steps,
        "batch": batch, "tested": tested, "tasks": {},
    }  # fmt: skip
    for task, (draw, classes) in TASKS.items():
        test = draw(tested, "test", torch.Generator().manual_seed(1234))

        def run(name: str, seed: int, draw: Any = draw, classes: int = classes, test: Any = test) -> dict[str, float]:
            torch.manual_seed(seed)
            model = Task(build(name, width_for(name)), classes)
            losses = fit(model, lambda g: draw(batch, "train", g), _loss, steps, lr=4e-3, seed=seed)
            assert all(map(math.isfinite, losses))
            return {**score(model, *test), "parameters": sum(p.numel() for p in model.parameters())}

        rows = study(list(GATES), run, "right", BASELINE, seeds, progress, keep, (task, steps, batch, tested))
        result["tasks"][task] = {**rows, "most frequent answer": 100 * float(test[1].bincount().max()) / tested}
    if pictures is not None:
        curves = {
            name: [
                (task, row["right"]["mean"], row["right"]["half"])
                for task, found in result["tasks"].items()
                for row in found["rows"]
                if row["name"] == name
            ]
            for name in GATES
        }
        picture(Path(pictures) / "gates-cpu.svg", curves, "", "right, %", "gates in one network of equal parameters")
    return result
