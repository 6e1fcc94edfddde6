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


def told(held: dict[str, Any], scale: float = 100, digits: int = 1) -> str:
    """``"98.2 ± 0.4"``, in per cent by default; the half interval is left out where there is none."""
    half = "" if held["half"] is None else f" ± {scale * held['half']:.{digits}f}"
    return f"{scale * held['mean']:.{digits}f}{half}"


def judge_table(found: dict[str, Any]) -> str:
    lines = ["| painted test scenes | % | bar |", "|---|---|---|"]
    for name, what in WHAT.items():
        bar = found["bars"].get(name)
        shown = "" if bar is None else f"{100 * bar['bar']:.0f}{'' if bar['met'] else ', missed'}"
        lines.append(f"| {what} | {told(found['found'][name])} | {shown} |")
    return "\n".join(lines)


def generators_table(found: dict[str, Any]) -> str:
    own = found["generators"]
    lines = [f"| pictures right, % | {' | '.join(own)} |", f"|---|{'---|' * len(own)}"]
    for kind, what in KINDS.items():
        cells = [told(own[n][kind]["right"]) if kind in own[n] else "" for n in own]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    for metric, kind, what in (
        ("present", "two", "two things: both shapes there"), ("bound", "held-out", "held-out pairings: bound"),
        ("recognisable", "two", "two things: all recognisable"),
    ):  # fmt: skip
        cells = [told(own[n][kind][metric]) if kind in own[n] else "" for n in own]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    lines.append(f"| seconds per picture | {' | '.join(f'''{own[n]['one']['seconds']['mean']:.2f}''' for n in own)} |")
    missed = []
    for name, bars in found["bars"].items():
        if name == "reconstruction":
            if not bars["met"]:
                missed.append("the autoencoder's copies (see above)")
            continue
        for kind, bar in bars.items():
            if not bar["met"]:
                low, high = (f"{100 * v:.0f}" for v in bar["bar"])
                wanted = f"at least {low}" if bar["bar"][1] == 1 else f"{low} to {high}"
                missed.append(f"`{name}`, {KINDS[kind]}: {bar['metric']} {100 * bar['share']:.1f} % (bar: {wanted})")
    said = "Every bar is met." if not missed else "Missed bars, on which nothing is claimed: " + "; ".join(missed) + "."
    return "\n".join([*lines, "", said, "", "![What the generators draw](diffusion/generators.png)"])


def rows_table(rows: list[dict[str, Any]], head: str, columns: dict[str, tuple[str, float, int]], metric: str) -> str:
    """A row per contestant; by column its title, scale and digits; the last column is what it gains in a metric."""
    titles = [title for title, _, _ in columns.values()]
    lines = [
        f"| {head} | {' | '.join(titles)} | {columns[metric][0]}: difference |",
        f"|---|{'---|' * len(titles)}---|",
    ]
    for row in rows:
        cells = [told(row[m], scale, digits) for m, (_, scale, digits) in columns.items()]
        against = (row.get("against") or {}).get(metric)
        gap = "" if against is None else told(against, *columns[metric][1:])
        lines.append(
            f"| {row['name']} | {' | '.join(cells)} | {gap if gap.startswith('-') or not gap else '+' + gap} |"
        )
    return "\n".join(lines)


SECONDS = {"seconds": ("seconds a picture", 1.0, 2)}
SHARES = {
    "right": ("right, %", 100.0, 1), "present": ("shapes there, %", 100.0, 1), "counted": ("exact count, %", 100.0, 1),
    "recognisable": ("all recognisable, %", 100.0, 1), **SECONDS,
}  # fmt: skip
BOUND = {"bound": ("bound, %", 100.0, 1), **SHARES}


def titled(parts: dict[str, str], picture: str, what: str) -> str:
    shown = [f"{title}:\n\n{table}" for title, table in parts.items()]
    return "\n\n".join([*shown, f"![{what}](diffusion/{picture}.png)"])


def binding_table(found: dict[str, Any]) -> str:
    kinds = {KINDS[k].capitalize(): rows_table(v["rows"], "", BOUND, "bound") for k, v in found["kinds"].items()}
    return titled(kinds, "binding", "Two things of held-out pairings, with every technique")


def editing_table(found: dict[str, Any]) -> str:
    kept = {"decibels": ("outside, dB", 1.0, 1), "ssim": ("outside, SSIM", 1.0, 3)}
    right = {"right": ("right, %", 100.0, 1), **kept}
    columns = {
        "inversion": ({"error": ("squared error of latents", 1.0, 4)}, "error"), "editing": (right, "right"),
        "composition": (right, "right"),
        "free rectangle": ({"free": ("free, %", 100.0, 1), "present": ("shapes there, %", 100.0, 1)}, "free"),
    }  # fmt: skip
    lines = {name.capitalize(): rows_table(rows, "", *columns[name]) for name, rows in found["lines"].items()}
    return titled(lines, "editing", "One word of a prompt changed, by every editor")


def sizes_table(found: dict[str, Any]) -> str:
    parts = {
        f"{KINDS[kind].capitalize()} on {factor} times the pixels a side": rows_table(v["rows"], "", SHARES, "counted")
        for factor, kinds in found["factors"].items()
        for kind, v in kinds.items()
    }
    return titled(parts, "sizes", "Pictures of twice as many pixels a side")


def caching_table(found: dict[str, Any]) -> str:
    rows = [
        {
            **row,
            "name": f"{row['name']} ({100 * row['executed']:.0f} %)",
            "near": row.get("near", {"mean": 0, "half": None}),
        }
        for row in found["rows"]
    ]
    columns = {**SHARES, "near": ("dB to the full sampling", 1.0, 1)}
    return titled({"Share of modules that ran in brackets": rows_table(rows, "", columns, "right")}, "caching",
                  "The same prompts with half of the modules")  # fmt: skip


def series_table(found: dict[str, Any]) -> str:
    columns = {
        "same": ("reference's colour, %", 100.0, 1), "swapped": ("the other's colour, %", 100.0, 1),
        "present": ("shapes there, %", 100.0, 1), "followed": ("prompt followed, %", 100.0, 1), **SECONDS,
    }  # fmt: skip
    title = f"{found['used']} of {found['series']} series whose reference shows both subjects"
    return titled({title: rows_table(found["rows"], "", columns, "same")}, "series", "Series of three pictures")


def resolutions_table(found: dict[str, Any]) -> str:
    sizes = found["sizes"]
    rows = [
        {**row, "name": f"{row['name']} ({sizes[row['name']]['parameters'] / 1e3:.0f} k parameters, "
                        f"{sizes[row['name']]['operations'] / 1e6:.0f} M operations)",
         "against": {found["metric"]: None if row["name"] == found["baseline"] else row.get("against")}}
        for row in found["rows"]
    ]  # fmt: skip
    columns = {found["metric"]: ("mean square of noise missed", 1.0, 4)}
    return rows_table(rows, "", columns, found["metric"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    folder, page = args.out / "diffusion", args.out / "diffusion.md"
    folder.mkdir(parents=True, exist_ok=True)
    scenes(folder / "scenes.png")
    tables = {
        "judge": judge_table, "generators": generators_table, "binding": binding_table, "editing": editing_table,
        "sizes": sizes_table, "caching": caching_table, "series": series_table, "resolutions": resolutions_table,
    }  # fmt: skip
    for name, table in tables.items():
        path = args.results / f"diffusion-{name}-cpu.json"
        if path.exists():
            fill(page, name, table(json.loads(path.read_text(encoding="utf-8"))))
        drawn = args.results / f"diffusion-{name}-cpu.png"
        if drawn.exists():
            shutil.move(drawn, folder / f"{name}.png")


if __name__ == "__main__":
    main()
