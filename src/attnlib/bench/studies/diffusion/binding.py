"""Binding and neglect: are all things of a prompt there, each with its own colour?

``attnlib bench --suite diffusion-binding --out benchmarks/results`` writes ``diffusion-binding-cpu.json`` and its
pictures. Two things whose pairings of colour and shape training did not show, and three things; every
technique draws the same prompts from the same noise as the plain pipeline, and its time is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ....steer.diffusion.a_star import AStar, AttendExcite
from ....steer.diffusion.structured_guidance import StructuredGuidance
from ...clock import machine
from ...small import Progress, sheet
from ...worlds import models, painter
from ...worlds.judge import load
from ...worlds.painter import Prompt
from ...worlds.prompts import prompts
from ._judged import drawing, judged
from .generators import SETTINGS

QUESTION = "Do losses on maps, or edited values, bind attributes and save neglected things?"
PARTS = ("vae", "text", "unet", "judge")
BASELINE = "plain"


def shapes(some: Sequence[Prompt]) -> list[list[str]]:
    """The words of things, for each prompt."""
    return [[w.shape or "thing" for w in p.wants] for p in some]


def phrases(some: Sequence[Prompt]) -> list[list[str]]:
    """The noun phrases, for each prompt."""
    return [[painter.phrase(w) for w in p.wants] for p in some]


#: Of losses on maps, to be chosen on ``"dev"``; so far as many steps and as long as in 50 steps of Attend-and-Excite.
UPDATE: dict[str, Any] = {"steps": 10, "step_size": 20.0}
#: By name, from prompts to what is attached; a line is added for every technique.
CONTESTANTS: dict[str, Callable[[Sequence[Prompt]], list[Any]]] = {
    BASELINE: lambda some: [],
    "Attend-and-Excite": lambda some: [AttendExcite(shapes(some), targets={0: 0.95, 4: 0.5, 8: 0.2}, **UPDATE)],
    "A-STAR": lambda some: [AStar(shapes(some), targets={4: 0.5, 8: 0.2}, **UPDATE)],
    "structured guidance": lambda some: [StructuredGuidance(phrases(some))],
}  # fmt: skip


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    names: Sequence[str] | None = None,
    kinds: Sequence[str] = ("held-out", "three"),
    count: int = 96,
    part: str = "test",
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    batch: int = 8,
) -> dict[str, Any]:
    """Draw with every technique, and let the judge say what is there.

    Args:
        progress: told of every batch.
        keep: file to go on from.
        pictures: folder for ``diffusion-binding-cpu.png``.
        names: of :data:`CONTESTANTS`, all by default.
        kinds: of :data:`attnlib.bench.worlds.prompts.KINDS`.
        count: prompts of every kind.
        part: of prompts.
        folder: of trained parts.
        settings: of the pipeline's call.
        batch: prompts at a time.

    Returns:
        Plain values, for JSON: by kind, rows with intervals and paired differences from the plain pipeline.
    """
    chosen = {**SETTINGS["unet"], **(settings or {})}
    pipe, judge = models.pipeline("unet", folder), load(folder)
    wanted = list(CONTESTANTS if names is None else names)
    result: dict[str, Any] = {"part": part, "settings": chosen, "kinds": {}}
    shown: dict[str, Tensor] = {}

    for kind in kinds:
        asked = prompts(kind, count, part)
        contestants = {name: drawing(pipe, CONTESTANTS[name], **chosen) for name in wanted}
        result["kinds"][kind] = judged(
            contestants, asked, BASELINE, judge, batch, progress=progress, keep=keep, key=[part, kind, chosen]
        )  # fmt: skip
        if pictures is not None and kind == kinds[0]:
            first = range(min(8, count))
            shown = {name: sketch(asked[: len(first)], first) for name, sketch in contestants.items()}
            titles = [p.text for p in asked[: len(first)]]
            sheet(Path(pictures) / "diffusion-binding-cpu.png", shown, titles)
    return {**result, "machine": machine()}
