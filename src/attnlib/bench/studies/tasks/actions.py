"""Actions in time: does a gate from the recogniser's features help a localiser more than one from its own?

Made-up features whose first channels mark which action is on, in noise; one small boundary network, without a gate,
with squeeze-and-excitation of the same layers on its own features, and with class semantics-based attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.detect.temporal import BoundaryDetector, average_precision
from ...clock import machine
from ...data.actions import clips
from ...small import Progress, fit, parameters, picture, study

QUESTION = "Does a gate from the recogniser's features localise actions better than one from the localiser's own?"
NAMES = ("none", "se", "csa")


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 150,
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    tested: int = 80,
    noise: float = 1.0,
) -> dict[str, Any]:
    """Train the three, and measure mean average precision.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-actions-cpu.svg``.
        steps, seeds, tested, noise: of training, and of the videos.

    Returns:
        Plain values, for JSON.
    """

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = BoundaryDetector(8, 16, name)

        def loss(m: Any, given: tuple[Tensor, list[Tensor]]) -> Tensor:
            total: Tensor = sum(m.loss(m(given[0]), given[1]).values())  # type: ignore[assignment]
            return total

        fit(model, lambda g: clips(16, g, noise=noise), loss, steps, lr=4e-3, seed=seed)
        features, truth = clips(tested, torch.Generator().manual_seed(10_000 + seed), noise=noise)
        found = average_precision(model.eval().predict(features), truth)
        mean = 100 * sum(found.values()) / len(found)
        return {"map": mean, **{f"at {k}": 100 * v for k, v in found.items()}, "parameters": parameters(model)}

    result = study(NAMES, run, "map", "se", seeds, progress, keep, (steps, tested, noise))
    result |= {"question": QUESTION, "machine": machine(), "steps": steps, "tested": tested, "noise": noise}
    if pictures is not None:
        at = [k for k in result["rows"][0] if k.startswith("at ")]
        curves = {r["name"]: [(float(k[3:]), r[k]["mean"], r[k]["half"]) for k in at] for r in result["rows"]}
        picture(
            Path(pictures) / "tasks-actions-cpu.svg", curves, "overlap", "average precision, %", "actions in time", (),
            ("none", "se"),
        )  # fmt: skip
    return result
