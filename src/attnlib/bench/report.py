"""One self-contained HTML page from ``results.json``: nothing is loaded from anywhere else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import plots
from .data.files import require
from .store import write_text

PATTERN_TITLES = {
    "noncausal-self": "Noncausal self-attention",
    "causal-self": "Causal self-attention",
    "noncausal-cross": "Noncausal cross-attention",
    "causal-cross": "Causal cross-attention",
}


def write(results: Mapping[str, Any], path: Path) -> None:
    """Render ``results`` into ``path``, whole or not at all."""
    write_text(path, render(results))


def from_json(path: str | Path, out: str | Path) -> None:
    """Render the report of a saved ``results.json`` again."""
    write(json.loads(Path(path).read_text(encoding="utf-8")), Path(out))


def render(results: Mapping[str, Any]) -> str:
    """The page.

    Args:
        results: what :func:`attnlib.bench.compare.compare` measured.

    Returns:
        HTML without any reference outside itself.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attnlib.bench"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        number=number, count=count, milliseconds=milliseconds, signed=signed, efficiency=length_text, size=size_text
    )
    labels = [m["label"] for m in results["mechanisms"]]
    style = plots.styles(labels, results["baseline"])
    return environment.get_template("report.html.j2").render(
        r=results,
        labels=labels,
        marks={label: plots.marker_svg(style[label]) for label in labels},
        colours={label: plots.css_colour(style[label][0]) for label in labels},
        glance=_glance(results, labels),
        findings=[findings(results, t) for t in results["tasks"].values()],
        patterns=_patterns(results, labels, style),
        scaling=_scaling(results, style),
        absent=_absent(results),
    )


# --------------------------------------------------------------------------------------------------------------------
# Numbers as people read them


def number(value: Any, digits: int = 3) -> str:
    """Significant digits, no exponent in the usual range.

    >>> number(27.80342), number(0.0712)
    ('27.8', '0.0712')
    """
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:.{digits}g}" if abs(value) < 1e5 else f"{value:,.0f}"


def decimals_for(half_width: float | None, value: float) -> int:
    """Decimals that an interval of this width deserves: two significant digits of it.

    >>> decimals_for(0.034, 27.8)
    3
    """
    import math

    reference = half_width if half_width else abs(value) / 100
    if not reference or not math.isfinite(reference):
        return 3
    return max(0, min(4, 1 - math.floor(math.log10(reference))))


def estimate(mean: float | None, half_width: float | None) -> tuple[str, str]:
    """Mean and half-width with the same decimals; the second is empty with one seed."""
    if mean is None:
        return "–", ""
    digits = decimals_for(half_width, mean)
    return f"{mean:.{digits}f}", "" if half_width is None else f"± {half_width:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:+.{digits}g}".replace("-", "−")


def count(value: int) -> str:
    return f"{value:,}"


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def length_text(value: Any, extrapolated: bool = False) -> str:
    """An efficiency length: from which N on it is cheaper."""
    if value is None:
        return "–"
    if value == "inf":
        return "never"
    if value == 0:
        return "always"
    if extrapolated:  # two digits are more than such a number can bear
        return f"about {float(f'{value:.2g}'):,.0f} (extrapolated)"
    return f"{value:,.0f}"


def size_text(value: float) -> str:
    return f"{value / 2**20:.3g} MiB"


# --------------------------------------------------------------------------------------------------------------------
# Sections


def _row(results: Mapping[str, Any], task: str, label: str) -> dict[str, Any] | None:
    found = [s for s in results["summary"] if s["task"] == task and s["mechanism"] == label]
    return found[0] if found else None


def _reason(results: Mapping[str, Any], task: str, label: str) -> str:
    for item in results["skipped"]:
        if item["mechanism"] == label and item["what"] == task:
            return item["reason"]
    for item in results["failed"]:
        if item["mechanism"] == label and item["what"].split(",")[0] == task:
            return f"failed: {item['reason']}"
    return "not run"


def _best(results: Mapping[str, Any], task: Mapping[str, Any]) -> str | None:
    rows = [s for s in results["summary"] if s["task"] == task["name"] and s["mean"] is not None]
    rows = [s for s in rows if s["mechanism"] != results["control"]]
    if len(rows) < 2:
        return None
    pick = max if task["higher_is_better"] else min
    return pick(rows, key=lambda s: s["mean"])["mechanism"]


def _cell(results: Mapping[str, Any], task: Mapping[str, Any], label: str) -> dict[str, Any]:
    row = _row(results, task["name"], label)
    if row is None:
        return {"absent": _reason(results, task["name"], label)}
    mean, half = estimate(row["mean"], row["half_width"])
    gap, gain = row["difference"], row["gain"]
    sure = bool(gap and gap["half"] is not None and abs(gap["mean"]) > gap["half"])
    better = bool(gap and (gap["mean"] > 0) == task["higher_is_better"])
    return {
        "absent": None,
        "mean": "diverged" if row["mean"] is None else mean,
        "half": half,
        "best": _best(results, task) == label,
        "row": row,
        "gap": _gap(gap),
        "gain": _gap(gain),
        "no_better": row["no_better"],
        "verdict": ("better" if better else "worse") if sure else "",
    }


def _gap(gap: Mapping[str, Any] | None) -> str:
    if gap is None:
        return ""
    digits = decimals_for(gap["half"], gap["mean"])
    text = f"{gap['mean']:+.{digits}f}".replace("-", "−")
    return text if gap["half"] is None else f"{text} ± {gap['half']:.{digits}f}"


def overview(results: Mapping[str, Any], task: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
    """One task in words for the terminal: a row per mechanism, best first, and what the numbers do not say.

    Every number stands beside the model without a mechanism; ``=`` marks those that are no better.
    """
    rows = [s for s in results["summary"] if s["task"] == task["name"]]
    sign = -1 if task["higher_is_better"] else 1
    rows.sort(key=lambda s: float("inf") if s["mean"] is None else sign * s["mean"])
    control = results["control"]
    bare = _row(results, task["name"], control) if control else None
    table = []
    for s in rows:
        mean, half = estimate(s["mean"], s["half_width"])
        cells = {"mechanism": s["mechanism"], "seeds": str(len(s["seeds"])), "mean": mean, "±": half.removeprefix("± ")}
        if s["mean"] is None:
            cells["mean"] = "diverged"
        if control:
            own = s["mechanism"] == control
            cells["without"] = "" if own or bare is None else estimate(bare["mean"], bare["half_width"])[0]
            cells["gain"] = "" if own else _gap(s["gain"]) + (" =" if s["no_better"] else "  ")
        table.append(cells)
    found = findings(results, task)
    notes = []
    if any(s["no_better"] for s in rows):
        notes.append("=  no better than without a mechanism")
    notes.append(found["verdict"])
    if found["absent"]:
        notes.append(f"not here: {', '.join(found['absent'])}; the report says why")
    if found["missing"]:
        notes.append(f"{found['missing']} runs of this task are missing")
    return table or [{"mechanism": "nothing ran"}], notes


def findings(results: Mapping[str, Any], task: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs of one task show: the best, the pairs that are separated, and who is no better than nothing."""
    rows = {s["mechanism"]: s for s in results["summary"] if s["task"] == task["name"]}
    tested = [p for p in results["pairs"] if p["task"] == task["name"]]
    separated = sorted((p for p in tested if p["separated"]), key=lambda p: -p["by"])
    if not tested:
        verdict = "differences between mechanisms need two of them and three seeds"
    elif not separated:
        verdict = f"no difference found among {len(tested)} pairs of mechanisms"
    else:
        widest = separated[0]
        verdict = (
            f"{len(separated)} of {len(tested)} pairs are separated; the widest: {widest['better']} is better than "
            f"{widest['worse']} by {number(widest['by'], 2)}"
        )
    names = [m["label"] for m in results["mechanisms"] if m["label"] != results["control"]]
    best = _best(results, task)
    return {
        "task": task,
        "best": best,
        "row": rows.get(best) if best else None,
        "estimate": " ".join(estimate(rows[best]["mean"], rows[best]["half_width"])).strip() if best else "",
        "bare": rows.get(results["control"]),
        "separated": separated,
        "tested": len(tested),
        "verdict": verdict,
        "no_better": [name for name in names if name in rows and rows[name]["no_better"]],
        "absent": [name for name in names if name not in rows],
        "missing": sum(item["task"] == task["name"] for item in results["left_out"]),
    }


def _glance(results: Mapping[str, Any], labels: list[str]) -> list[dict[str, Any]]:
    settings = {m["label"]: "" if m["settings"] in m["label"] else m["settings"] for m in results["mechanisms"]}
    return [
        {
            "label": label,
            "settings": settings[label],
            "cells": [_cell(results, t, label) for t in results["tasks"].values()],
        }
        for label in labels
    ]


def _patterns(results: Mapping[str, Any], labels: list[str], style: plots.Style) -> list[dict[str, Any]]:
    out = []
    for pattern, title in PATTERN_TITLES.items():
        tasks = [t for t in results["tasks"].values() if t["pattern"] == pattern]
        if not tasks:
            continue
        present = [x for x in labels if any(_row(results, t["name"], x) for t in tasks)]
        rows = [
            {
                "label": label,
                "cells": [_cell(results, t, label) for t in tasks],
                "standing": results["standing"].get(pattern, {}).get(label),
            }
            for label in present
        ]
        out.append(
            {
                "name": pattern,
                "title": title,
                "tasks": [_task(results, t, labels, style) for t in tasks],
                "rows": rows,
                "baseline_present": results["baseline"] in present,
            }
        )
    return out


def _task(results: Mapping[str, Any], task: Mapping[str, Any], labels: list[str], style: plots.Style) -> dict[str, Any]:
    summary = [s for s in results["summary"] if s["task"] == task["name"]]
    runs = [r for r in results["runs"] if r["task"] == task["name"]]
    present = [x for x in labels if any(s["mechanism"] == x for s in summary)]
    samples = [(x, r["sample"]) for x in present for r in runs if r["label"] == x and r.get("sample")]
    exhibit = task["exhibit"]
    forecast = None
    if exhibit.get("kind") == "forecast" and samples:
        forecast = plots.forecast(exhibit, [(x, s["forecast"]) for x, s in samples], style)
    return {
        "about": task,
        "present": present,
        "scatter": plots.quality_against_time(summary, runs, task, style) if summary else None,
        "losses": plots.loss_curves(runs, present, style, task["title"]) if runs else None,
        "samples": samples,
        "forecast": forecast,
        "steps": results["steps"].get(task["name"]),
    }


def _scaling(results: Mapping[str, Any], style: plots.Style) -> list[dict[str, Any]]:
    out = []
    for pattern, title in PATTERN_TITLES.items():
        records = [r for r in results["scaling"] if r["pattern"] == pattern]
        if not records:
            continue
        summary = [s for s in results["scaling_summary"] if s["pattern"] == pattern]
        time_label, memory_label = "milliseconds, forward and backward", "peak memory, MiB"
        out.append(
            {
                "pattern": pattern,
                "title": title,
                "time": plots.cost_against_n(records, summary, "both_seconds", 1e-3, time_label, style),
                "memory": plots.cost_against_n(records, summary, "peak_bytes", 2**20, memory_label, style),
                "present": [r["mechanism"] for r in records],
                "rows": [{"record": r, "summary": s} for r, s in zip(records, summary, strict=True)],
                "noise": statistics.median([x for r in records for x in r["spread"]]),
                "stopped": [(r["mechanism"], r["stopped"]) for r in records if r.get("stopped")],
            }
        )
    return out


def _absent(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Skipped and failed, one line per mechanism and reason with the tasks it concerns."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for kind in ("skipped", "failed"):
        for item in results[kind]:
            grouped.setdefault((item["mechanism"], kind, item["reason"]), []).append(item["what"])
    return [
        {"mechanism": mechanism, "kind": kind, "reason": reason, "what": ", ".join(what)}
        for (mechanism, kind, reason), what in grouped.items()
    ]
