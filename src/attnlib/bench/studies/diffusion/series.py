"""A series of pictures: do its two subjects stay the same where a prompt leaves open what they look like?

``attnlib bench --suite diffusion-series --out benchmarks/results`` writes ``diffusion-series-cpu.json`` and its
pictures. Prompts of a series name the same two shapes, without colours, lying otherwise and on one of
two backgrounds; the first picture is the reference. Told is how often a subject has the reference's colour in the other
pictures, how often it has that of the other subject, and whether the prompt is still followed. The sceptic's baselines
are pictures drawn by themselves, and pictures that read all of the reference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....checks import check_choice, check_int
from ....steer.diffusion.ir_diffusion import IRDiffusion
from ....steer.diffusion.references import SharedKeys
from ...clock import machine, now
from ...small import Progress, interval, sheet
from ...stats import mean_interval, paired_interval
from ...store import identity
from ...worlds import models, painter
from ...worlds.judge import Found, Judge, load
from ...worlds.painter import Prompt, Want
from ._judged import drawing
from .generators import SETTINGS

QUESTION = "Do two subjects of a series stay the same with isolation and reposition?"
PARTS = ("vae", "text", "unet", "judge")
BASELINE = "plain"

#: By name, from the two shapes to what is attached.
CONTESTANTS: dict[str, Callable[[list[str]], list[Any]]] = {
    BASELINE: lambda shapes: [],
    "all of the reference": lambda shapes: [SharedKeys("first", layers=["up_blocks*"])],
    "IR without isolation": lambda shapes: [IRDiffusion(shapes, isolation=False)],
    "IR without reposition": lambda shapes: [IRDiffusion(shapes, reposition=False)],
    "IR": lambda shapes: [IRDiffusion(shapes)],
}
METRICS = ("same", "swapped", "present", "followed", "seconds")


def series(count: int, part: str = "test", length: int = 3) -> list[list[Prompt]]:
    """Prompts of so many series, each of ``length`` pictures; ``"dev"`` and ``"test"`` are others.

    >>> [p.text for p in series(1)[0]]  # doctest: +ELLIPSIS
    ['a ... a ... on ...', 'a ... a ... on ...', 'a ... a ... on ...']
    """
    check_choice("part", part, painter.PARTS)
    rng = np.random.default_rng([painter.PARTS.index(part), 1912])
    found = []
    for _ in range(check_int("count", count, least=1)):
        wants = [Want(shape=painter.GEOMETRIC[i]) for i in rng.permutation(len(painter.GEOMETRIC))[:2]]
        relations = rng.permutation(len(painter.RELATIONS))[:length]
        grounds = rng.integers(len(painter.PLAIN), size=length)
        found.append(
            [
                painter.write(wants, painter.RELATIONS[r], painter.PLAIN[g])
                for r, g in zip(relations, grounds, strict=True)
            ]
        )
    return found


def colours(found: Sequence[Found], shapes: Sequence[str]) -> list[str | None]:
    """The colour of the surest thing of each shape; ``None`` for one that is not there."""
    best = [max((f for f in found if f.shape == shape), key=lambda f: f.score, default=None) for shape in shapes]
    return [None if one is None else one.colour for one in best]


def compare(judge: Judge, images: Tensor, asked: Sequence[Prompt]) -> dict[str, float] | None:
    """What became of the subjects of one series; ``None`` where its reference lacks one, or shows both alike."""
    shapes = [want.shape or "" for want in asked[0].wants]
    looks = judge.look(images)
    reference = colours(looks[0], shapes)
    if None in reference or len(set(reference)) < 2:
        return None
    others = [colours(found, shapes) for found in looks[1:]]
    verdicts = judge.judge(images[1:], asked[1:])
    pairs = [(s, seen[s]) for seen in others for s in range(2)]
    return {
        "same": sum(colour == reference[s] for s, colour in pairs) / len(pairs),
        "swapped": sum(colour == reference[1 - s] for s, colour in pairs) / len(pairs),
        "present": sum(colour is not None for _, colour in pairs) / len(pairs),
        "followed": sum(v.right for v in verdicts) / len(verdicts),
    }


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    names: Sequence[str] | None = None,
    count: int = 40,
    part: str = "test",
    folder: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Draw every series with every contestant from the same noise, and look at its subjects.

    Args:
        progress: told of every series.
        keep: file to go on from.
        pictures: folder for ``diffusion-series-cpu.png``.
        names: of :data:`CONTESTANTS`, all by default.
        count: series.
        part: of prompts.
        folder: of trained parts.
        settings: of the pipeline's call.

    Returns:
        Plain values, for JSON: per contestant each of :data:`METRICS` with an interval over series, and paired
        differences from the plain pipeline. A series whose reference lacks a subject, or has two of one colour, is
        left out for all: references are drawn alike.

    Raises:
        RuntimeError: that is so of every series.
    """
    chosen = {**SETTINGS["unet"], **(settings or {})}
    pipe, judge = models.pipeline("unet", folder), load(folder)
    wanted, asked = list(CONTESTANTS if names is None else names), series(count, part)
    mark = identity([part, chosen, [[p.text for p in some] for some in asked]])
    file = None if keep is None else Path(keep)
    held: dict[tuple[str, int], dict[str, float] | None] = {}
    if file is not None and file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["key"] == mark:
                held[record["name"], record["series"]] = record["row"]
    shown: dict[str, list[Tensor]] = {name: [] for name in wanted}

    def drawn(name: str, number: int) -> Tensor:
        some = asked[number]
        attached = CONTESTANTS[name]([want.shape or "" for want in some[0].wants])
        return drawing(pipe, lambda _: attached, **chosen)(some, [1000 * number + i for i in range(len(some))])

    for number, some in enumerate(asked):
        for name in wanted:
            if (name, number) not in held:
                began = now()
                images = drawn(name, number)
                row = compare(judge, images, some)
                if row is not None:
                    row["seconds"] = (now() - began) / len(some)
                held[name, number] = row
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps({"name": name, "series": number, "key": mark, "row": row}) + "\n")
        if progress is not None:
            row = held[wanted[-1], number]
            progress(f"series {number + 1} of {count}: " + ("no reference" if row is None else f"{row['same']:.2f}"))
    used = [n for n in range(count) if all(held[name, n] is not None for name in wanted)]
    if not used:
        raise RuntimeError(f"no reference shows both subjects in colours of their own, in {count} series")
    if pictures is not None:
        for name in wanted:
            shown[name] = [image for n in used[:3] for image in drawn(name, n)]
        sheet(
            Path(pictures) / "diffusion-series-cpu.png", {n: torch.stack(v) for n, v in shown.items()},
            [p.text for n in used[:3] for p in asked[n]],
        )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in wanted:
        own = {n: held[name, n] or {} for n in used}
        told: dict[str, Any] = {
            "name": name,
            **{m: interval(mean_interval([r[m] for r in own.values()])) for m in METRICS},
        }
        if name != BASELINE and BASELINE in wanted:
            plain = {n: held[BASELINE, n] or {} for n in used}
            told["against"] = {}
            for m in METRICS:
                gap = paired_interval({n: r[m] for n, r in own.items()}, {n: r[m] for n, r in plain.items()})
                told["against"][m] = None if gap is None else interval(gap)
        rows.append(told)
    return {
        "part": part, "settings": chosen, "series": count, "used": len(used), "rows": rows, "machine": machine(),
    }  # fmt: skip
