"""Search asymmetries: does eccNET find hard what people find hard, and is it the weights that make it so?

Displays of :mod:`attnlib.bench.data.displays` are searched by :class:`~attnlib.models.perception.EccNet`: with the
convolutions of VGG-16 that an edge detector was tuned from (``hed-vgg16``: tuned for *edges*, not the authors' weights,
which were trained on ImageNet), with random ones, with maxima in its pools, with pools that do not depend on
eccentricity (IVSN's), and by the baselines without a network. Displays are about 100 pixels wide, the network's degree
is 10 pixels and its rings 2 degrees wide, it sees 70 pixels in each direction: a third as fine as released, for time.
At this size and with these weights the network is at chance for L and T, the pair that is run by default.

``attnlib bench --suite searching --out benchmarks/results`` measures again what ``searching-cpu.json`` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...models.perception.search import (
    EccNet,
    Found,
    asymmetry_index,
    reaction_time,
    search,
    search_map,
    search_slope,
    template_map,
)
from .. import models
from ..clock import machine
from ..data.displays import HUMAN_MS, PAIRS, TASKS, Shown, display
from ..small import Progress, picture, study

TRAINED = "trained for edges"
NETS = (TRAINED, "random weights", "trained, maxima", "trained, same pools everywhere")
BASELINES = ("template", "chance")
_DEGREES = (10, 5, 2, 1, 1)
_SIDE = 100


def network(name: str, seed: int) -> EccNet:
    """One of :data:`NETS`; the seed is of random weights."""
    settings: dict[str, Any] = {"degrees": _DEGREES, "quant": 2.0}
    if name == "random weights":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = EccNet(**settings)
            for part in net.modules():
                if isinstance(part, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(part.weight)
                    torch.nn.init.zeros_(part.bias)  # type: ignore[arg-type]
        return net.eval()
    if name == "trained, maxima":
        settings["kind"] = "max"
    if name == "trained, same pools everywhere":
        settings["ecc_depth"] = 0
    return models.load("hed-vgg16", **settings)[0]


def searched(name: str, net: EccNet | None, shown: Shown, task: str, generator: torch.Generator) -> Found:
    """One search of a display by a contestant."""
    pair = TASKS[task]
    if net is None:
        x: Tensor = template_map(shown.image, shown.target) if name == "template" else torch.rand(
            shown.goal.shape, generator=generator
        )  # fmt: skip
        return search_map(x, shown.goal, shown.items)
    return search(
        net, shown.image, shown.target, shown.goal, shown.items, pair.background, reach=70, border=12, dog=pair.dog
    )


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    pairs: Sequence[str] = ("L and T",),
    displays: int = 1,
    seeds: Sequence[int] = (0, 1, 2),
    contestants: Sequence[str] = (*NETS[:3], *BASELINES),
) -> dict[str, Any]:
    """Search displays of the least and of the middle or largest number of items, and compare slopes.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``searching-cpu.svg``.
        pairs: of :data:`attnlib.bench.data.displays.PAIRS`.
        displays: per task and number of items, for each seed.
        seeds: of displays and of random weights.
        contestants: of :data:`NETS` and :data:`BASELINES`.

    Returns:
        Plain values, for JSON.
    """
    result: dict[str, Any] = {
        "what": "search asymmetries of networks and people", "model": models.MODELS["hed-vgg16"].title,
        "machine": machine(), "displays": displays, "rows": [], "pairs": {},
    }  # fmt: skip
    made: dict[tuple[str, int], EccNet] = {}
    for name in pairs:
        pair = PAIRS[name]
        counts = (pair.items[0], pair.items[1] if pair.items[-1] > 12 else pair.items[-1])
        people = [search_slope(pair.items, HUMAN_MS[task]) for task in (pair.hard, pair.easy)]

        def run(who: str, seed: int, name: str = name, counts: tuple[int, int] = counts) -> dict[str, float]:
            pair = PAIRS[name]
            if who in NETS and (who, seed) not in made:
                made.clear()
                made[who, seed] = network(who, seed)
            net = made[who, seed] if who in NETS else None
            slopes, found, moves = [], 0, {}
            for task in (pair.hard, pair.easy):
                times = []
                for count in counts:
                    taken = []
                    for i in range(displays):
                        draw = torch.Generator().manual_seed(1000 * seed + 10 * count + i)
                        shown = display(task, count, _SIDE / pair.degrees, draw)
                        search_of = searched(who, net, shown, task, draw)
                        found += search_of.found
                        taken.append(search_of.count(len(shown.items), pair.items[-1]))
                    times.append(reaction_time(sum(taken) / displays))
                    moves[f"moves, {task}, {count}"] = sum(taken) / displays
                slopes.append(search_slope(counts, times))
            of_both = asymmetry_index(*slopes)
            found_share, every = found / (4 * displays), sum(moves.values()) / len(moves)
            return {"asymmetry": of_both, "hard": slopes[0], "easy": slopes[1], "found": found_share, "moves": every,
                    **moves}  # fmt: skip

        setting = {"pair": name, "displays": displays, "counts": counts, "degrees": _DEGREES, "side": _SIDE}
        told = study(contestants, run, "asymmetry", None, seeds, progress, keep, setting)
        told["people"] = {"asymmetry": asymmetry_index(*people), "hard": people[0], "easy": people[1]}
        result["pairs"][name] = told
        result["rows"] += [{**row, "name": f"{name}: {row['name']}"} for row in told["rows"]]
    if pictures is not None:
        curves: dict[str, list[tuple[Any, float, float | None]]] = {
            who: [(n, _of(t, who)["mean"], _of(t, who)["half"]) for n, t in result["pairs"].items()]
            for who in contestants
        }
        curves["people"] = [(n, t["people"]["asymmetry"], None) for n, t in result["pairs"].items()]
        picture(Path(pictures) / "searching-cpu.svg", curves, "", "asymmetry index", "positive: as people do", (), ())
    return result


def _of(told: dict[str, Any], who: str) -> dict[str, Any]:
    return next(row["asymmetry"] for row in told["rows"] if row["name"] == who)
