"""Scans of maps in one small backbone: do they see images, and do their routes matter?

``attnlib bench --suite scans --out benchmarks/results`` measures what ``scans-cpu.json`` holds and draws it. Every
contestant stands in the two blocks of :mod:`attnlib.bench.studies.mixers`, with hidden layers of the MLPs as wide as it
takes for all to have the parameters of four routes; scans have one number of state per channel and the width of the
block. Against four routes over rows and columns: one of them, two, snakes, zigzags and spirals, two scales, heads of
several families; and what needs no scan, gated convolutions (MambaOut) and softmax attention. Beside the accuracy, how
far from the middle lies what the middle token depends on, and what a training step costs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...models.backbones.stages import Backbone
from ...models.blocks import Place, fitted
from ...nn.scan.mhs_vm import FAMILIES
from ..clock import interleave, machine
from ..small import Progress, parameters, training_step
from .mixers import SIDE, backbone, draw_tasks, on_tasks

BASELINE = "four routes (VMamba)"


def _routes(*names: str, **settings: Any) -> Callable[[Place], nn.Module]:
    return fitted("vmamba", {"expand": 1.0, "state_dim": 1, **({"routes": names} if names else {}), **settings})


#: Contestant -> what makes its mechanism.
CONTESTANTS: dict[str, Callable[[Place], nn.Module]] = {
    BASELINE: _routes(),
    "one route (rows)": _routes("rows"),
    "rows both ways": _routes("rows", "rows-reversed"),
    "snakes": _routes(*FAMILIES["C"]),
    "zigzags and spirals": _routes("zigzag", "zigzag-mirrored-reversed", "spiral", "spiral-flipped-reversed"),
    "two scales (MSVMamba)": fitted("msvmamba", {"expand": 1.0, "state_dim": 1}),
    "heads of four families (MHS-VM)": fitted("mhs-vm", {"state_dim": 1}),
    "convolution only (MambaOut)": fitted("mambaout", {"expansion": 1.0}),
    "softmax attention": fitted("softmax-attention"),
}


def build(name: str, classes: int, hidden: int | None = None, side: int = SIDE) -> Backbone:
    """A contestant; ``hidden`` is the width of its MLPs."""
    return backbone(CONTESTANTS[name], classes, hidden, side)


def width_for(name: str, goal: int, classes: int) -> int:
    """The hidden width with which a contestant has the wanted number of parameters, as nearly as whole widths can."""
    with torch.device("meta"):
        low, high = (parameters(build(name, classes, h)) for h in (1, 2))
    return max(1, round(1 + (goal - low) / (high - low)))


def costs(names: list[str], goal: int, side: int = SIDE, batch: int = 8, repeats: int = 3) -> dict[str, dict[str, Any]]:
    """Seconds of a training step, all contestants in turn."""
    x = torch.randn(batch, 1, side, side)

    steps = {}
    for name in names:
        torch.manual_seed(0)
        steps[name] = training_step(build(name, 10, width_for(name, goal, 10), side), lambda m: m(x).square().sum())
    times = interleave(steps, repeats)
    plain = times[BASELINE].minimum
    return {n: {"step_seconds": t.minimum, "x_four_routes": t.minimum / plain} for n, t in times.items()}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 180,
    batch: int = 16,
    seeds: tuple[int, ...] = (0, 1, 2),
    tested: int = 256,
    names: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Train every contestant on both tasks, and time it.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``scans-digits-cpu.svg`` and ``scans-texture-cpu.svg``.
        steps, batch, seeds, tested: of training and of the test.
        names: contestants; all by default. Four routes are always among them.

    Returns:
        Plain values, for JSON.
    """
    chosen = [n for n in CONTESTANTS if names is None or n in (*names, BASELINE)]
    with torch.device("meta"):
        goal = parameters(build(BASELINE, 10))
    result: dict[str, Any] = {
        "what": "scans of maps in one backbone of equal parameters", "machine": machine(), "steps": steps,
        "batch": batch, "tested": tested, "tasks": {}, "costs": costs(chosen, goal),
    }  # fmt: skip
    result["tasks"] = on_tasks(
        chosen, lambda name, classes: build(name, classes, width_for(name, goal, classes)), BASELINE, steps, batch,
        seeds, tested, progress, keep,
    )  # fmt: skip
    if pictures is not None:
        label = "time of a training step, times that of four routes"
        draw_tasks(result, Path(pictures), "scans", "x_four_routes", label)
    return result
