"""Formulas beside runs: every experiment of :mod:`attnlib.theory` as assumed, and with one assumption broken.

``attnlib bench --suite theory --out benchmarks/results`` measures again what ``theory-cpu.json`` holds and draws it. A
claim is ``confirmed`` where the 95 % interval over seeds lies inside it, ``refuted`` where it lies outside, ``open``
where it crosses the border. Nothing is fitted to the runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...theory.dynamical import OneFramework
from ...theory.experiment import Comparison, Experiment
from ...theory.icl import InContextRegression
from ...theory.jepa import FeatureOrder
from ...theory.random_features import RandomFeatures
from ...theory.stiffness import StiffSteps
from ...theory.svm import AttentionSVM
from ..clock import machine
from ..plots import PALETTE, _figure
from ..small import Progress, _write, study

#: Theory -> the experiment, and what its ``outside()`` breaks.
EXPERIMENTS: dict[str, tuple[Callable[[], Experiment], str]] = {
    "SVM, W trained": (AttentionSVM, "Adam instead of gradient descent"),
    "SVM, K and Q trained": (lambda: AttentionSVM(factors=True), "Adam instead of gradient descent"),
    "JEPA, order of features": (FeatureOrder, "the gradient goes through the target"),
    "regression in context": (InContextRegression, "correlated coordinates"),
    "random features": (RandomFeatures, "the target reads the first key alone"),
    "one linear system": (OneFramework, "scores twenty times as large"),
    "gated steps": (StiffSteps, "a system that is not stiff"),
}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare every theory with its runs, inside and outside its assumptions.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``theory-cpu.svg``.
        seeds: at least two.
        names: of :data:`EXPERIMENTS`, all by default.

    Returns:
        Plain values, for JSON.
    """
    found: dict[str, list[Comparison]] = {}
    rows: list[dict[str, Any]] = []
    for name in EXPERIMENTS if names is None else names:
        make, broken = EXPERIMENTS[name]
        sides = {f"{name}, as assumed": make(), f"{name}: {broken}": make().outside()}

        def run(side: str, seed: int, sides: dict[str, Experiment] = sides) -> dict[str, float]:
            return sides[side].run(seed)

        for side, experiment in sides.items():
            first = next(iter(experiment.predict()))
            told = study([side], run, first, None, seeds, progress, keep, experiment.setting())["runs"]
            numbers = [{k: _number(v) for k, v in r.items() if k not in ("name", "seed")} for r in told]
            compared = experiment.compare(list(seeds), numbers)
            found.setdefault(name, []).append(compared)
            for row in compared.plain()["rows"]:
                measured = row["measured"]
                rows.append(
                    {
                        "name": f"{side}: {row['name']}", "claimed": row["claimed"], "measured": measured,
                        "verdict": row["verdict"],
                    }
                )  # fmt: skip
    if pictures is not None:
        draw(Path(pictures) / "theory-cpu.svg", found)
    told_all = {name: [c.plain() for c in pair] for name, pair in found.items()}
    return {
        "what": "theories beside runs, inside and outside their assumptions", "machine": machine(),
        "seeds": list(seeds), "rows": rows, "runs": told_all,
    }  # fmt: skip


def _number(value: Any) -> float:
    return float(value)  # infinities were kept as text


def draw(path: Path, found: dict[str, list[Comparison]]) -> None:
    """A small axis per claim: the claim as a band, as assumed above, outside below."""
    cells = [(name, i) for name, pair in found.items() for i in range(len(pair[0].rows))]
    across = 3
    down = math.ceil(len(cells) / across)
    figure, first = _figure(10.5, 0.4 + 1.05 * down)
    first.remove()
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, i) in zip(grid.flat, cells, strict=False):
        axes.axis("on")
        pair = [c.rows[i] for c in found[name]]
        claim = pair[0].claim
        ends = [e for r in pair for e in (r.low, r.high)] + [e for e in claim[:2] if math.isfinite(e)]
        pad = 0.12 * (max(ends) - min(ends)) or 0.1 * abs(max(ends)) or 0.1
        left, right = min(ends) - pad, max(ends) + pad
        axes.axvspan(max(left, claim.low), min(right, claim.high), color="#0ca678", alpha=0.2, linewidth=0)
        for height, row, colour in ((1.0, pair[0], PALETTE[0]), (0.0, pair[1], PALETTE[1])):
            around = [[row.mean - row.low], [row.high - row.mean]]
            axes.errorbar([row.mean], [height], xerr=around, fmt="o", color=colour, capsize=2.5, markersize=4)
        axes.set(xlim=(left, right), ylim=(-0.7, 1.7))
        axes.set_yticks([0, 1], ["outside", "as assumed"], fontsize=6.5)
        axes.tick_params(labelsize=6.5, length=2)
        axes.set_title(f"{name}\n{pair[0].name}", fontsize=7, loc="left")
    _write(path, figure)
