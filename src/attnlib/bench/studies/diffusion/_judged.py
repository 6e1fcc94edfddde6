"""What lines share: contestants draw the same prompts from the same seeds, a judge says what is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnlib

from ...clock import now
from ...small import Progress, interval
from ...stats import mean_interval, paired_interval
from ...store import identity
from ...worlds.judge import Judge, load
from ...worlds.painter import Prompt
from ...worlds.prompts import draw

#: What of a :class:`attnlib.bench.worlds.judge.Verdict` is told.
METRICS = ("right", "bound", "present", "counted", "placed", "recognisable", "things")

Draw = Callable[[Sequence[Prompt], Sequence[int]], Tensor]


def drawing(
    pipe: Any,
    techniques: Callable[[Sequence[Prompt]], Sequence[Any]],
    told: Callable[[Any], None] | None = None,
    **given: Any,
) -> Draw:
    """Who draws prompts with techniques attached that are made for them; with none, the plain pipeline does.

    Args:
        pipe: of :func:`attnlib.bench.worlds.models.pipeline`.
        techniques: from prompts to what is attached.
        told: gets the session of every call, ``None`` where nothing was attached.
        given: of the pipeline's call.
    """

    def sketch(some: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        attached, session = techniques(some), None
        if attached:
            with attnlib.attach(pipe, *attached) as session:
                images = draw(pipe, some, seeds, len(some), **given)
        else:
            images = draw(pipe, some, seeds, len(some), **given)
        if told is not None:
            told(session)
        return images

    return sketch


def judged(
    contestants: Mapping[str, Draw],
    prompts: Sequence[Prompt],
    baseline: str | None = None,
    judge: Judge | None = None,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    keep: str | Path | None = None,
    key: Any = None,
) -> dict[str, Any]:
    """Let every contestant draw every prompt, prompt i from seed ``seed + i``, and say what came of it.

    Args:
        contestants: by name, from prompts and seeds to pictures (B, 3, h, w) in [0, 1].
        prompts: what is asked for.
        baseline: whom the others are held against, prompt by prompt.
        judge: the trained one by default.
        batch: prompts given at a time.
        seed: of the first prompt.
        progress: told of every batch.
        keep: a file that takes every batch as soon as it is judged, and from which a later call goes on.
        key: what pictures depend on beside name, prompt and seed, such as settings.

    Returns:
        ``rows``: per contestant ``name``, each of :data:`METRICS` and ``seconds`` per picture as
        ``{"mean", "half", "n"}`` over prompts, and ``against``: the same of paired differences from the baseline.
    """
    if baseline is not None and baseline not in contestants:
        raise ValueError(f"baseline={baseline!r} is not among the contestants {list(contestants)}")
    if not contestants or not prompts:
        raise ValueError("contestants and prompts must hold at least one each")
    judge = load() if judge is None else judge
    mark = identity([key, [p.text for p in prompts], seed, batch])
    file = None if keep is None else Path(keep)
    held: list[dict[str, Any]] = []
    if file is not None and file.exists():
        held = [r for r in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if r.get("key") == mark]
    for start in range(0, len(prompts), batch):
        for name, sketch in contestants.items():
            if any(r["name"] == name and r["start"] == start for r in held):
                continue
            asked = prompts[start : start + batch]
            began = now()
            images = sketch(asked, [seed + start + i for i in range(len(asked))])
            seconds = (now() - began) / len(asked)
            verdicts = [asdict(v) for v in judge.judge(images.float().clamp(0, 1), asked)]
            rows = [{**{m: float(v[m]) for m in METRICS}, "seconds": seconds} for v in verdicts]
            held.append({"name": name, "start": start, "key": mark, "rows": rows})
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(held[-1]) + "\n")
            if progress is not None:
                right = sum(r["right"] for r in rows) / len(rows)
                progress(
                    f"{name}, prompts {start} to {start + len(asked) - 1}: right {right:.2f}, {seconds:.2f} s each"
                )
    by_name: dict[str, dict[int, dict[str, float]]] = {name: {} for name in contestants}
    for record in held:
        if record["name"] in by_name:
            by_name[record["name"]] |= {record["start"] + i: r for i, r in enumerate(record["rows"])}
    rows = []
    for name, own in by_name.items():
        row: dict[str, Any] = {"name": name}
        row |= {m: interval(mean_interval([r[m] for r in own.values()])) for m in (*METRICS, "seconds")}
        if baseline is not None and name != baseline:
            row["against"] = {}
            for m in (*METRICS, "seconds"):
                gap = paired_interval(
                    {i: r[m] for i, r in own.items()}, {i: r[m] for i, r in by_name[baseline].items()}
                )
                row["against"][m] = None if gap is None else interval(gap)
        rows.append(row)
    return {"prompts": len(prompts), "seed": seed, "baseline": baseline, "rows": rows}


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Pictures (B, 3, h, w) side by side as one (3, H, W), white between."""
    b, _, h, w = images.shape
    lines = -(-b // columns)
    out = torch.ones(3, lines * (h + gap) - gap, columns * (w + gap) - gap)
    for i, image in enumerate(images):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        out[:, y : y + h, x : x + w] = image
    return out
