"""Hidden lanes: what a coarse map knows beforehand, as a picture and as polylines, after how many steps.

Made-up roads from above, in noise and with a quarter of the square hidden; maps are turned by degrees and metres off.
One small network without a map, with it drawn, and with a token for every road.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.maps.standard import MappedLanes, Roads
from ...clock import machine
from ...data.lanes import REACH, lanes, recovered
from ...small import Progress, fit, parameters, picture, study

QUESTION = "Does a coarse map that is metres off recover lanes that sensors do not see, and in how many steps?"
NAMES = ("none", "raster", "polyline")


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: Sequence[int] = (50, 100, 200),
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 96,
) -> dict[str, Any]:
    """Train the three for each number of steps.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-lanes-cpu.svg``.
        steps, seeds, tested: of training and of the test.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {"question": QUESTION, "machine": machine(), "tested": tested, "steps": {}}
    for count in steps:

        def run(name: str, seed: int, count: int = count) -> dict[str, float]:
            torch.manual_seed(seed)
            model = MappedLanes(2, 16, name, reach=REACH)

            def loss(m: Any, given: tuple[Tensor, Roads, Tensor]) -> Tensor:
                found: Tensor = m.loss(m(given[0], given[1]), given[2])["lanes"]
                return found

            fit(model, lambda g: lanes(12, g), loss, count, lr=8e-3, seed=seed)
            bev, roads, truth = lanes(tested, torch.Generator().manual_seed(10_000 + seed))
            found = model.eval().predict(bev, roads)
            seen = recovered(found, truth, 1 - bev[:, 1])
            hidden = recovered(found, truth, bev[:, 1])
            return {"hidden": 100 * hidden, "seen": 100 * seen, "parameters": parameters(model)}

        result["steps"][count] = study(NAMES, run, "hidden", "none", seeds, progress, keep, (count, tested))
    if pictures is not None:
        curves = {
            name: [
                (count, row["hidden"]["mean"], row["hidden"]["half"])
                for count, found in result["steps"].items()
                for row in found["rows"]
                if row["name"] == name
            ]
            for name in NAMES
        }
        path = Path(pictures) / "tasks-lanes-cpu.svg"
        picture(path, curves, "steps", "overlap where nothing was seen, %", "hidden lanes", ("x",), ("none",))
    return result
