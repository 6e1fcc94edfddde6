"""Events seen and heard: does it help CACE-Net that sound guides sight and sight guides sound?

Digits move, one of them has a tone; a segment holds an event where both are there. The same network without guidance
and with both guiding one another, with the same clips and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.detect.cace import CACENet
from ...clock import machine
from ...data.events import BANDS, KINDS, Clips, clips
from ...small import Progress, fit, panels, parameters, picture, study, told

QUESTION = "Are events that must be both seen and heard found more often when sound and sight guide one another?"
NAMES = {"no guidance": "none", "both guide": "both"}


def trained(name: str, seed: int, steps: int, count: int = 24) -> CACENet:
    """A small network after so many batches."""
    torch.manual_seed(seed)
    model = CACENet(KINDS, 64, BANDS, 16, 2, (16, 32, 32), guide=NAMES[name])
    done = [0]

    def loss(m: Any, made: Clips) -> Tensor:
        m.set_progress(done[0] / steps)
        done[0] += 1
        total: Tensor = sum(m.loss(m(made.video, made.audio), made.target).values())  # type: ignore[assignment]
        return total

    fit(model, lambda g: clips(count, g), loss, steps, lr=5e-3, seed=seed, clip=0.5)
    model.set_progress(1.0)
    return model.eval()


def scored(found: Tensor, made: Clips) -> dict[str, float]:
    """Percent of segments that are right: of all, of events, and of those that are unheard, unseen or neither."""
    right, event = (found == made.target).float(), made.target < KINDS
    kinds = {
        "events": event, "unheard": made.seen & ~made.heard, "unseen": made.heard & ~made.seen,
        "neither": ~made.seen & ~made.heard,
    }  # fmt: skip
    shares = {name: 100 * float(right[some].mean()) if bool(some.any()) else 0.0 for name, some in kinds.items()}
    return {"accuracy": 100 * float(right.mean()), **shares}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 200,
    seeds: Sequence[int] = (1, 2, 3),
    tested: int = 300,
) -> dict[str, Any]:
    """Train both, and count right segments.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-events-cpu.svg`` and ``.png``.
        steps, seeds, tested: of training, and clips of the test.

    Returns:
        Plain values, for JSON; ``background`` is what calling everything background would get right.
    """

    held: dict[str, CACENet] = {}  # of the first seed, for the picture

    def run(name: str, seed: int) -> dict[str, float]:
        model = trained(name, seed, steps)
        if seed == seeds[0]:
            held[name] = model
        made = clips(tested, torch.Generator().manual_seed(10_000 + seed), test=True)
        idle = 100 * float((made.target == KINDS).float().mean())
        found = scored(model.predict(made.video, made.audio), made)
        return found | {"background": idle, "parameters": parameters(model)}

    result = study(list(NAMES), run, "accuracy", "no guidance", seeds, progress, keep, (steps, tested))
    result |= {"question": QUESTION, "machine": machine(), "steps": steps, "tested": tested}
    if pictures is not None:
        what = ("accuracy", "events", "unheard", "unseen", "neither")
        curves = {r["name"]: [(k, r[k]["mean"], r[k]["half"]) for k in what] for r in result["rows"]}
        path = Path(pictures) / "tasks-events-cpu.svg"
        picture(path, curves, "segments", "right, %", "events seen and heard", (), ("no guidance",))
        _draw(Path(pictures) / "tasks-events-cpu.png", seeds[0], steps, held)
    return result


def _draw(path: Path, seed: int, steps: int, held: dict[str, CACENet]) -> None:
    """Two clips, segment by segment: cells, sound, truth, and what two models answer."""
    made = clips(2, torch.Generator().manual_seed(30_000 + seed), test=True)
    models = [held[n] if n in held else trained(n, seed, steps) for n in NAMES]
    answers = [made.target, *(m.predict(made.video, made.audio) for m in models)]
    length = made.target.shape[1]
    seen = made.video.reshape(2, length, 3, 3, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, length, 24, 24)
    rows = [f"{part} {i + 1}" for i in range(2) for part in ("seen", "heard")] + ["answers"]
    with panels(path, rows, [str(t + 1) for t in range(length)], (0.75, 0.75)) as axes:
        for t in range(length):
            for i in range(2):
                axes[2 * i][t].imshow(seen[i, t].numpy(), cmap="gray", vmin=0, vmax=1)
                axes[2 * i + 1][t].bar(range(BANDS), made.audio[i, t].clamp(min=0).tolist(), color="#4c72b0")
                axes[2 * i + 1][t].set_ylim(0, 1.8)
            said = "\n".join(
                f"{i + 1}: " + " ".join("-" if int(a[i, t]) == KINDS else str(int(a[i, t])) for a in answers)
                for i in range(2)
            )
            axes[4][t].text(0.5, 0.5, said, ha="center", va="center", fontsize=7, transform=axes[4][t].transAxes)


def table(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| model | segments right, % | against no guidance | events | seen, unheard | heard, unseen | neither "
        "| parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        against = row["against"]
        gap = "" if row["name"] == result["baseline"] else f"{against['mean']:+.1f} ± {against['half']:.1f}"
        cells = [row["name"], told(row, "accuracy"), gap]
        cells += [told(row, k) for k in ("events", "unheard", "unseen", "neither")]
        lines.append("| " + " | ".join([*cells, f"{row['parameters']['mean']:.0f}"]) + " |")
    idle = result["rows"][0]["background"]["mean"]
    return "\n".join([*lines, f"| all background | {idle:.1f} |  | 0 | 100 | 100 | 100 | 0 |"])
