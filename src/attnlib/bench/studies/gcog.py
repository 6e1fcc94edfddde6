"""Where instruction and grid meet decides what generalises: models of gCOG on a grid of 5 x 5.

``attnlib bench --suite gcog --out benchmarks/results`` measures again what ``gcog-cpu.json`` holds and draws it. All
read the same one-hot rows (:mod:`attnlib.bench.data.gcog`), are of one width, and train for the same steps on questions
that look something up (whether, where, which colour, which letter; not whether sums of places are even, which takes
longer) among at most five distractors; they are asked anew among as many, and among 10 and 20. The baseline keeps two
streams apart until their last tokens are added.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.gcog import gcog_model
from ..clock import machine
from ..data.gcog import PARITIES, Batch, World, encode, trials, widths
from ..small import Progress, fit, picture, study

WORLD = World(side=5, shapes=4, colors=4, features=4)
NAMES = ("two-stream", "cross")
BASELINE = "two-stream"
METRIC = "10 distractors"
#: Test -> part of the split "distractor", and how many there are.
TESTS: dict[str, tuple[str, int | tuple[int, int]]] = {
    "0 to 5 distractors": ("train", (0, 5)),
    "10 distractors": ("test", 10),
    "20 distractors": ("test", 20),
}


@functools.lru_cache(maxsize=8)
def asked(part: str, count: int, seed: int, distractors: int | tuple[int, int]) -> Batch:
    """Trials that look something up: about half of ``count``."""
    made = trials("distractor", part, count, seed=seed, world=WORLD, distractors=distractors)
    return encode([t for t in made if t.tree.question not in PARITIES], WORLD, one_hot=True)


@torch.no_grad()
def right(model: nn.Module, test: str, count: int) -> float:
    """Percent of right answers in one of :data:`TESTS`."""
    part, distractors = TESTS[test]
    batch = asked(part, count, 1, distractors)
    model.eval()
    return 100 * float((model(batch.rule, batch.grid).argmax(-1) == batch.answer).float().mean())


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 2000,
    batch: int = 64,
    lr: float = 2e-3,
    dim: int = 32,
    count: int = 20000,
    tested: int = 2000,
    seeds: Sequence[int] = (0, 1, 2),
    names: Sequence[str] = NAMES,
) -> dict[str, Any]:
    """Train every model among few distractors and ask it among more.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``gcog-cpu.svg``.
        steps, batch, lr, dim, count, seeds: of training; half of ``count`` trials look something up.
        tested: trials of every test, half of them likewise.
        names: of :data:`attnlib.models.gcog.MODELS`, the baseline among them.

    Returns:
        Plain values, for JSON.
    """

    def run(name: str, seed: int) -> dict[str, float]:
        torch.manual_seed(seed)
        model = gcog_model(name, dim=dim, classes=WORLD.classes, pos_drop=0.0, **widths(WORLD))
        data = asked("train", count, 0, (0, 5))

        def loss(model: nn.Module, at: Tensor) -> Tensor:
            return model.loss(data.rule[at], data.grid[at], data.answer[at])["answer"]  # type: ignore[operator]

        fit(model, lambda g: torch.randint(len(data.answer), (batch,), generator=g), loss, steps, lr=lr, seed=seed)
        return {t: right(model, t, tested) for t in TESTS} | {"parameters": sum(p.numel() for p in model.parameters())}

    told = study(names, run, METRIC, BASELINE, seeds, progress, keep, (steps, batch, lr, dim, count, tested))
    if pictures is not None:
        curves = {row["name"]: [(t, row[t]["mean"], row[t]["half"]) for t in TESTS] for row in told["rows"]}
        title = "gCOG, 5 x 5: questions that look something up"
        picture(Path(pictures) / "gcog-cpu.svg", curves, "test", "right, %", title)
    return {
        "what": "generalisation of gCOG's models on a grid of 5 x 5", "machine": machine(), "steps": steps,
        "batch": batch, "lr": lr, "dim": dim, "trials": count, "tested": tested, **told,
    }  # fmt: skip
