"""Pictures and tables of docs/diffusion.md, from painted scenes and from benchmarks/results/diffusion-*-cpu.json.

    python examples/diffusion/figures.py

Pictures go to docs/diffusion/, tables between the markers of docs/diffusion.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from attnlib.bench.store import fill
from attnlib.bench.worlds import painter

ROOT = Path(__file__).resolve().parents[2]
WHAT = {
    "colour": "colour", "shape": "shape", "geometric": "shape, of geometric ones", "creatures": "shape, of creatures",
    "digits": "shape, of handwritten digits", "size": "size", "texture": "texture", "box_iou": "overlap of boxes",
    "count": "exact count", "right": "all of a picture right", "subjects": "held-out individual, 1 of 40",
    "swapped": "swapped colours noticed", "missing": "missing thing noticed", "doubled": "doubled thing noticed",
    "smeared": "smeared thing noticed",
}  # fmt: skip
KINDS = {
    "one": "one thing", "places": "one thing and where", "two": "two things",
    "held-out": "two things, held-out pairings", "relations": "two things and how they lie",
    "counts": "two or three alike", "three": "three things",
}  # fmt: skip


def scenes(path: Path) -> None:
    """Test scenes under their captions."""
    numbers = list(range(3, 15))
    some = painter.sample(numbers, "test")
    images, said = painter.paint(some, "test").images, painter.captions(some, numbers=numbers)
    figure = Figure(figsize=(8.4, 3.5), layout="constrained")
    for axis, image, prompt in zip(figure.subplots(2, 6).flat, images, said, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title("\n".join(textwrap.wrap(prompt.text, 26)), fontsize=6)
        axis.axis("off")
    figure.savefig(path, dpi=110)


def percent(held: dict[str, Any]) -> str:
    """``"98.2 ± 0.4"``, in per cent."""
    half = "" if held["half"] is None else f" ± {100 * held['half']:.1f}"
    return f"{100 * held['mean']:.1f}{half}"


def judge_table(found: dict[str, Any]) -> str:
    lines = ["| painted test scenes | % | bar |", "|---|---|---|"]
    for name, what in WHAT.items():
        bar = found["bars"].get(name)
        told = "" if bar is None else f"{100 * bar['bar']:.0f}{'' if bar['met'] else ', missed'}"
        lines.append(f"| {what} | {percent(found['found'][name])} | {told} |")
    return "\n".join(lines)


def generators_table(found: dict[str, Any]) -> str:
    own, copies = found["generators"], found["reconstruction"]
    decibels = "{mean:.1f} ± {half:.1f} dB".format(**copies["psnr"])
    said = (
        f"The autoencoder gives pictures back at {decibels} (bar: 28); the judge finds all of a picture right in "
        f"{percent(copies['originals'])} % of originals and {percent(copies['copies'])} % of copies (bar: one point "
        "less)."
    )
    lines = [f"| pictures right, % | {' | '.join(own)} |", f"|---|{'---|' * len(own)}"]
    for kind, what in KINDS.items():
        cells = [percent(own[n][kind]["right"]) if kind in own[n] else "" for n in own]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    for metric, kind, what in (
        ("present", "two", "two things: both shapes there"), ("bound", "held-out", "held-out pairings: bound"),
        ("recognisable", "two", "two things: all recognisable"),
    ):  # fmt: skip
        cells = [percent(own[n][kind][metric]) if kind in own[n] else "" for n in own]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    lines.append(f"| seconds per picture | {' | '.join(f'''{own[n]['one']['seconds']['mean']:.2f}''' for n in own)} |")
    missed = []
    for name, bars in found["bars"].items():
        if name == "reconstruction":
            if not bars["met"]:
                missed.append("the autoencoder's copies")
            continue
        for kind, bar in bars.items():
            if not bar["met"]:
                low, high = (f"{100 * v:.0f}" for v in bar["bar"])
                wanted = f"at least {low}" if bar["bar"][1] == 1 else f"{low} to {high}"
                missed.append(f"`{name}`, {KINDS[kind]}: {bar['metric']} {100 * bar['share']:.1f} % (bar: {wanted})")
    told = "Every bar is met." if not missed else "Missed bars, on which nothing is claimed: " + "; ".join(missed) + "."
    return "\n".join([said, "", *lines, "", told, "", "![What the generators draw](diffusion/generators.png)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    folder, page = args.out / "diffusion", args.out / "diffusion.md"
    folder.mkdir(parents=True, exist_ok=True)
    scenes(folder / "scenes.png")
    for name, table in (("judge", judge_table), ("generators", generators_table)):
        path = args.results / f"diffusion-{name}-cpu.json"
        if path.exists():
            fill(page, name, table(json.loads(path.read_text(encoding="utf-8"))))
    drawn = args.results / "diffusion-generators-cpu.png"
    if drawn.exists():
        shutil.move(drawn, folder / "generators.png")


if __name__ == "__main__":
    main()
