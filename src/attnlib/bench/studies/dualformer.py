"""Fast, slow and auto on small mazes, against a model of the same size that learns solutions only.

``attnlib bench --suite dualformer --out benchmarks/results`` measures and draws it, and goes on where it was stopped.
Both see the same mazes in the same order, for the same number of steps; Dualformer's responses hold traces of
A* that are thinned out anew every time, up to none in one of twenty. Greedy answers to mazes that none has seen.
Mazes of 3 x 3 by default, which are learnt in minutes: in 800 steps of 16 the model of solutions solved 1 of 100 mazes
of 6 x 6 (``measure(side=6, steps=...)`` takes more).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.dualformer import MODES, Dualformer, Words
from ..clock import machine
from ..data.mazes import LEVELS, Maze, draw_level, padded, random_maze, score, search, thinned, words
from ..small import Progress, fit, picture, study

NAMES = ("solution only", "Dualformer")
BASELINE = "solution only"
METRIC = "fast, optimal"


def response(maze: Maze, seed: int, level: int | None) -> list[str]:
    """A trace of random order at a level, drawn where it is ``None``, and the plan."""
    rng = random.Random(seed)
    trace, plan = search(maze, seed=seed)
    kept = thinned(trace, draw_level(rng, LEVELS["maze"]) if level is None else level, rng)
    return ["bos", *kept, *plan, "eos"]


def longest(side: int) -> int:
    """Words of a response, at most: both clauses of every cell, the plan and the end."""
    return 13 * side**2 + 1


def prompts(mazes: Sequence[Maze], vocabulary: Words) -> tuple[Tensor, Tensor]:
    """Problems as numbers, and which of these exist."""
    return padded([vocabulary.encode(["bos", *maze.prompt, "eos"]) for maze in mazes])


def blind(maze: Maze) -> bool:
    """Whether a plan is right that first goes along x, then along y, and looks at no wall.

    >>> blind(Maze(3, 3, (0, 0), (2, 1), frozenset({(1, 1)}))), blind(Maze(3, 3, (0, 0), (2, 1), frozenset({(1, 0)})))
    (True, False)
    """
    (x, y), (gx, gy) = maze.start, maze.goal
    passed = [(i, y) for i in range(min(x, gx), max(x, gx) + 1)] + [(gx, j) for j in range(min(y, gy), max(y, gy) + 1)]
    return not maze.walls.intersection(passed)


@torch.no_grad()
def answered(model: Dualformer, mazes: Sequence[Maze], mode: str, vocabulary: Words) -> dict[str, float]:
    """Percent solved and optimal, of all mazes and of those that :func:`blind` plans do not solve, and words of trace,
    of greedy responses in a mode."""
    model.eval()
    prompt, valid = prompts(mazes, vocabulary)
    said = model.generate(prompt, vocabulary.prefix(mode), valid, max_len=longest(mazes[0].width))
    each = [score(maze, vocabulary.decode(row)) for maze, row in zip(mazes, said, strict=True)]
    mean = {key: sum(e[key] for e in each) / len(each) for key in each[0]}
    barred = [e["solved"] for maze, e in zip(mazes, each, strict=True) if not blind(maze)]
    return {
        f"{mode}, solved around walls": 100 * sum(barred) / len(barred) if barred else math.nan,
        f"{mode}, solved": 100 * mean["solved"], f"{mode}, optimal": 100 * mean["optimal"],
        f"{mode}, words of trace": mean["trace"],
    }  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    side: int = 3,
    steps: int = 500,
    batch: int = 24,
    lr: float = 2e-3,
    dim: int = 64,
    depth: int = 2,
    count: int = 3000,
    tested: int = 200,
    seeds: Sequence[int] = (0, 1, 2),
    names: Sequence[str] = NAMES,
) -> dict[str, Any]:
    """Train both and ask them for plans, Dualformer in all its modes.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``dualformer-cpu.svg``.
        side: cells per side of a maze.
        steps, batch, lr, dim, depth, seeds: of training, on ``count`` mazes.
        tested: mazes that are asked for, which none has seen.
        names: contestants, the baseline among them.

    Returns:
        Plain values, for JSON.
    """
    vocabulary = words(side, side)
    made = [random_maze(side, side, seed) for seed in range(count + tested)]
    train, known = made[:count], set(made[:count])
    test = [maze for maze in made[count:] if maze not in known]

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = Dualformer(len(vocabulary), dim, depth, num_heads=2, multiple_of=32)
        level = 4 if name == BASELINE else None

        def draw(generator: torch.Generator) -> Any:
            at = torch.randint(len(train), (batch,), generator=generator).tolist()
            fresh = torch.randint(2**31, (batch,), generator=generator).tolist()
            mazes = [train[i] for i in at]
            answers = [vocabulary.encode(response(m, s, level)) for m, s in zip(mazes, fresh, strict=True)]
            return *prompts(mazes, vocabulary), *padded(answers)

        def loss(model: nn.Module, given: Any) -> Tensor:
            prompt, prompt_valid, answer, answer_valid = given
            return model.loss(prompt, answer, prompt_valid, answer_valid)["words"]  # type: ignore[operator]

        fit(model, draw, loss, steps, lr=lr, seed=seed)
        found: dict[str, float] = {}
        for mode in ("fast",) if name == BASELINE else MODES:
            found |= answered(model, test, mode, vocabulary)
        return found

    told = study(
        names, run, METRIC, BASELINE, seeds, progress, keep, (side, steps, batch, lr, dim, depth, count, tested)
    )
    if pictures is not None:
        curves = {
            f"{row['name']}, {mode}": [
                (what, row[f"{mode}, {what}"]["mean"], row[f"{mode}, {what}"]["half"]) for what in ("solved", "optimal")
            ]
            for row in told["rows"]
            for mode in MODES
            if f"{mode}, solved" in row
        }
        picture(
            Path(pictures) / "dualformer-cpu.svg",
            curves,
            "plan",
            "mazes, %",
            f"mazes of {side} x {side}, greedy answers",
        )
    return {
        "what": "fast, slow and auto against solutions only", "machine": machine(), "side": side, "steps": steps,
        "batch": batch, "lr": lr, "dim": dim, "depth": depth, "mazes": count, "tested": len(test),
        "solved without looking at walls": 100 * sum(map(blind, test)) / len(test), **told,
    }  # fmt: skip
