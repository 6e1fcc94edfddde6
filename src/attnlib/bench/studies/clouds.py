"""Reconstruction of point clouds: random directions against directions that a map predicts.

``attnlib bench --suite clouds --out benchmarks/results`` measures again what ``clouds-cpu.json`` holds. A PointNet
autoencoder reconstructs generated surfaces from a short code, trained by the sliced Wasserstein distance along few
directions: drawn anew for every pair, or by an amortized map (Nguyen et al., 2023, arXiv 2301.04791). What is reported
is the exact Wasserstein distance to held-out clouds, which none of them is trained on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...extras import need
from ...models.clouds import (
    AmortizedSlicedWasserstein,
    DirectionMap,
    PointNetAutoencoder,
    random_directions,
    sliced_wasserstein,
)
from ..cab.metrics import chamfer
from ..clock import machine
from ..small import Progress, fit, study

SURFACES = ("sphere", "box", "cylinder", "torus", "cone", "helix")

#: Contestant -> the kind of its map and the concentration of its draws; ``None`` for random directions.
LOSSES: dict[str, tuple[str, float | None] | None] = {
    "random directions": None,
    "attention, kappa 1": ("attention", 1.0),
    "efficient, kappa 1": ("efficient", 1.0),
    "efficient, kappa 10": ("efficient", 10.0),
    "efficient, one direction": ("efficient", None),
}


def surfaces(
    count: int, points: int, generator: torch.Generator | None = None, kinds: Tensor | None = None
) -> Tensor:  # fmt: skip
    """(count, points, 3) points of stretched and turned surfaces inside the cube of side 2.

    ``kinds`` (count,) are numbers of :data:`SURFACES`, drawn where they are not given.
    """

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    if kinds is None:
        kinds = torch.randint(len(SURFACES), (count,), generator=generator)
    u, v, face = (
        2 * math.pi * draw(count, points),
        draw(count, points),
        torch.randint(3, (count, points), generator=generator),
    )
    side = torch.randint(2, (count, points), generator=generator) * 2.0 - 1
    z = 2 * v - 1
    ring = (1 - z.square()).clamp(min=0).sqrt()
    flat = torch.stack([side, 2 * draw(count, points) - 1, z], -1)
    # A face of the box is one axis at its end; the others are free.
    box = torch.stack([flat.roll(i, -1) for i in range(3)], 0).gather(0, face[None, ..., None].expand(1, -1, -1, 3))[0]
    tube = 2 * math.pi * v
    made = [
        torch.stack([ring * u.cos(), ring * u.sin(), z], -1),
        box,
        torch.stack([u.cos(), u.sin(), z], -1),
        torch.stack([(0.7 + 0.3 * tube.cos()) * u.cos(), (0.7 + 0.3 * tube.cos()) * u.sin(), 0.3 * tube.sin()], -1),
        torch.stack([(1 - v.sqrt()) * u.cos(), (1 - v.sqrt()) * u.sin(), 2 * v.sqrt() - 1], -1),
        torch.stack([(3 * math.pi * z).cos(), (3 * math.pi * z).sin(), z], -1),
    ]
    cloud = torch.stack(made)[kinds, torch.arange(count)]
    cloud = cloud * (0.3 + 0.7 * draw(count, 1, 3))
    turn = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator)).Q
    cloud = cloud @ turn
    return 0.9 * cloud / cloud.abs().amax((1, 2), keepdim=True)


def wasserstein(x: Tensor, y: Tensor) -> float:
    """Mean over pairs of clouds of the exact distance of order 2 (of points that weigh the same)."""
    assign = need("scipy.optimize", "exact distances between clouds").linear_sum_assignment
    total = 0.0
    for cost in torch.cdist(x.double(), y.double()).square():
        rows, columns = assign(cost.numpy())
        total += math.sqrt(float(cost[rows, columns].mean()))
    return total / len(x)


class _Trained(nn.Module):
    """An autoencoder and the loss it is trained by, whose map has an optimizer of its own."""

    def __init__(self, name: str, points: int, directions: int, latent: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.auto = PointNetAutoencoder(latent, points=points)
        self.directions, chosen = directions, LOSSES[name]
        self.held: list[Any] = []  # not a part: the map is trained for itself
        if chosen is not None:
            loss = AmortizedSlicedWasserstein(DirectionMap(chosen[0], points=points, key_dim=16), directions, chosen[1])
            self.held = [loss, torch.optim.Adam(loss.map.parameters(), lr=1e-3, betas=(0.0, 0.9))]

    def loss(self, x: Tensor) -> Tensor:
        y = self.auto(x)
        if not self.held:
            return sliced_wasserstein(x, y, random_directions(len(x), self.directions, 3)).mean() / x.shape[1]
        loss, moving = self.held
        loss.train_map(x, y, moving)
        return loss(x, y) / x.shape[1]


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    steps: int = 300,
    batch: int = 16,
    points: int = 64,
    latent: int = 32,
    directions: int = 10,
    tested: int = 256,
    seeds: tuple[int, ...] = (0, 1, 2),
    losses: tuple[str, ...] = tuple(LOSSES),
) -> dict[str, Any]:
    """Train by every loss, from the same weights and on the same clouds.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        steps, batch: of training, the same for all.
        points: of a cloud.
        latent: width of its code.
        directions: along which a pair is compared; ``one direction`` compares along one.
        tested: held-out clouds.
        seeds: of initial weights, batches and draws.
        losses: of :data:`LOSSES`; the first is the baseline.

    Returns:
        Plain values, for JSON: the rows of the study, by the exact Wasserstein distance times 100, with the Chamfer
        distance, and the mean distance between two clouds of the test for scale.
    """
    test = surfaces(tested, points, torch.Generator().manual_seed(1234))

    def run(name: str, seed: int) -> dict[str, float]:
        model = _Trained(name, points, directions, latent, seed)
        torch.manual_seed(1000 + seed)
        fit(
            model, lambda g: surfaces(batch, points, g), lambda m, x: m.loss(x), steps,  # type: ignore[operator]
            lr=1e-3, seed=seed,
        )  # fmt: skip
        model.eval()
        with torch.no_grad():
            made = model.auto(test)
        return {"wasserstein": 100 * wasserstein(made, test), "chamfer": chamfer(made, test)}

    found = study(
        list(losses), run, "wasserstein", losses[0], seeds, progress, keep,
        (steps, batch, points, latent, directions, tested),
    )  # fmt: skip
    return {
        "what": "reconstruction of clouds by directions that are drawn or predicted", "machine": machine(),
        "steps": steps, "batch": batch, "points": points, "latent": latent, "directions": directions, "tested": tested,
        "between two clouds": 100 * wasserstein(test, test.roll(1, 0)), **found,
    }  # fmt: skip
