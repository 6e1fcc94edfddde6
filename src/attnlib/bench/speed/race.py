"""Ours beside another implementation of the same: what both give is compared before anything is timed.

This module reads nobody's code. Whoever has a checkout of a release builds both modules with the same weights and hands
them over::

    race = Race("a sentence on what was raced")
    race.run("inline deit 8x197x192", ours, theirs, [x], authors="LeapLabTHU/InLine InLineAttention", commit="e463a6f")
    race.write("benchmarks/results/linear-authors-cpu.json")

Runs take turns on one thread. A ratio above 1 says that ours is faster; it is the median over the rounds of a pair of
neighbouring runs, so that what else the machine does falls on both. What a file holds of other cases stays in it; each
case says its rounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_int, check_real
from ..clock import interleave, limit_threads, machine, ratio

Run = Callable[..., Tensor]


def _leaves(run: Run, given: Sequence[Tensor]) -> list[Tensor]:
    weights = [p for p in run.parameters() if p.requires_grad] if isinstance(run, nn.Module) else []
    return [t for t in given if t.requires_grad] + weights


def _forward(run: Run, given: Sequence[Tensor]) -> None:
    with torch.no_grad():
        run(*given)


def _both(run: Run, given: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    torch.autograd.grad(run(*given).square().sum(), list(leaves), allow_unused=True)


class Race:
    """Records of pairs.

    Args:
        what: what was raced, in a sentence.
        rounds: measurements per contender.
        tolerance: largest difference of the outputs, of the largest entry.

    >>> layer = nn.Linear(4, 4)
    >>> race = Race("a layer beside itself", rounds=1)
    >>> sorted(race.run("linear", layer, layer, [torch.randn(2, 4, requires_grad=True)]))
    ['both', 'difference', 'forward', 'rounds']
    """

    def __init__(self, what: str, rounds: int = 11, tolerance: float = 1e-4):
        self.what = what
        self.rounds = check_int("rounds", rounds, least=1)
        self.tolerance = check_real("tolerance", tolerance, least=0.0)
        self.records: dict[str, dict[str, Any]] = {}

    def run(
        self, case: str, ours: Run, theirs: Run, given: Sequence[Tensor], backward: bool = True, **origin: Any
    ) -> dict[str, Any]:
        """Time a pair, forward and forward with backward, and keep the record.

        Args:
            case: its name in the file.
            ours, theirs: modules or functions of ``given``, each giving one tensor; the other is put into the shape of
                ours by whoever calls.
            given: what both are called with. Gradients are taken of those that ask for them, and of the modules'
                weights.
            backward: also forward with backward.
            origin: repository, class, commit, shapes; kept as they are.

        Raises:
            ValueError: when the outputs differ.
        """
        with limit_threads(1):
            with torch.no_grad():
                a, b = ours(*given), theirs(*given)
            if a.shape != b.shape:
                raise ValueError(f"{case}: ours gives {tuple(a.shape)}, theirs {tuple(b.shape)}")
            difference = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
            if not difference <= self.tolerance:
                raise ValueError(f"{case}: outputs differ by {difference:.1e} of the largest entry")
            pair = {"ours": ours, "theirs": theirs}
            record: dict[str, Any] = {"difference": difference, "rounds": self.rounds}
            for what in ("forward", "both") if backward else ("forward",):
                jobs = {
                    name: partial(_forward, run, given)
                    if what == "forward"
                    else partial(_both, run, given, _leaves(run, given))
                    for name, run in pair.items()
                }
                times = interleave(jobs, self.rounds, "cpu")
                compared = ratio(times["theirs"], times["ours"])
                record[what] = {
                    "ours_s": times["ours"].median,
                    "theirs_s": times["theirs"].median,
                    "speedup": compared["ratio"],
                    "speedup_of_minima": compared["ratio_of_minima"],
                }
        self.records[case] = {**record, **origin}
        return record

    def write(self, path: str | Path) -> dict[str, Any]:
        """Add the records to a file; those of the same names are replaced."""
        target = Path(path)
        held = json.loads(target.read_text(encoding="utf-8"))["results"] if target.exists() else {}
        with limit_threads(1):
            found = {
                "what": self.what,
                "settings": {"dtype": "float32", "threads": 1, "clock": "cpu", "rounds": self.rounds},
                "machine": machine(),
                "results": held | self.records,
            }
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found


def table(found: Mapping[str, Any]) -> str:
    """What :meth:`Race.write` writes as rows of a page: how many times as fast ours is, and the geometric means."""
    rows = found["results"]
    kinds = {"forward": "forward", "both": "with gradients"}
    lines = [f"| case | {' | '.join(kinds.values())} |", "|---|---|---|"]
    for case, row in sorted(rows.items()):
        lines.append(f"| {case} | {' | '.join(_cell(row, kind) for kind in kinds)} |")
    means = []
    for kind in kinds:
        held = [math.log(row[kind]["speedup"]) for row in rows.values() if kind in row]
        means.append(f"{math.exp(sum(held) / len(held)):.2f}" if held else "")
    lines.append(f"| geometric mean | {' | '.join(means)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], kind: str) -> str:
    return f"{row[kind]['speedup']:.2f}" if kind in row else ""
