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
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.backbones.stages import Backbone
from ...models.blocks import Place, fitted
from ...nn.scan.mhs_vm import FAMILIES
from ..clock import interleave, machine
from ..small import Progress, fit, picture, study
from .mixers import SIDE, TASKS, accuracy, backbone, parameters, receptive_field

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

    def step(model: nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            model(x).square().sum().backward()

        return run

    steps = {}
    for name in names:
        torch.manual_seed(0)
        steps[name] = step(build(name, 10, width_for(name, goal, 10), side))
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
    for task, (draw, classes) in TASKS.items():
        test = draw(tested, SIDE, "test", generator=torch.Generator().manual_seed(1234))

        def run(name: str, seed: int, draw: Any = draw, classes: int = classes, test: Any = test) -> dict[str, float]:
            torch.manual_seed(seed)
            model = build(name, classes, width_for(name, goal, classes))

            def loss(m: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
                return F.cross_entropy(m(given[0]), given[1])

            losses = fit(model, lambda g: draw(batch, SIDE, generator=g), loss, steps, lr=4e-3, seed=seed)
            return {
                "accuracy": accuracy(model, *test), "last_loss": sum(losses[-20:]) / len(losses[-20:]),
                "sees_pixels": receptive_field(model.eval(), test[0][:16]), "parameters": parameters(model),
            }  # fmt: skip

        found = study(chosen, run, "accuracy", BASELINE, seeds, progress, keep, (task, steps, batch, tested))
        majority = 100 * float(test[1].bincount().max()) / len(test[1])
        result["tasks"][task] = {**found, "most frequent class": majority}
        if pictures is not None:
            curves = {
                r["name"]: [(result["costs"][r["name"]]["x_four_routes"], r["accuracy"]["mean"], r["accuracy"]["half"])]
                for r in found["rows"]
            }
            picture(
                Path(pictures) / f"scans-{task.split()[0]}-cpu.svg", curves,
                "time of a training step, times that of four routes", "accuracy, %", f"{task}, equal parameters",
                log="x",
            )  # fmt: skip
    return result
