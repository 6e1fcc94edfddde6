"""Which mechanism for which task and length, from what was measured: no row without a file and a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .measured import HIGHER, LOWER, Study, interval, number
from .text import cell, table

#: A row of the table: task, size, the best with its figure, what is level with it, what it costs, study.
Row = tuple[str, str, str, str, str, Study]


def better(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where nobody said.

    >>> better("accuracy"), better("noc_80"), better("recall at 1/8"), better("sees_pixels"), better("AP at 600 steps")
    (1, -1, 1, 0, 1)
    """
    word = metric.lower().replace("_", " ").split()[0] if metric else ""
    return 1 if word in HIGHER | {"ap"} else -1 if word in LOWER else 0


def comparisons(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every comparison in a file: a metric, a baseline, and rows with means and intervals."""
    if isinstance(value, Mapping):
        rows = value.get("rows")
        if isinstance(value.get("metric"), str) and isinstance(rows, list) and "baseline" in value:
            yield ": ".join(path), value
            return
        for key, inner in value.items():
            if key not in ("runs", "machine"):
                yield from comparisons(inner, (*path, key) if key not in ("tasks", "comparisons") else path)


def _ranked(where: str, block: Mapping[str, Any], study: Study) -> Row | None:
    metric = block["metric"]
    sign = better(metric)
    rows = [r for r in block["rows"] if isinstance(r.get(metric), Mapping)]
    if not sign or len(rows) < 2:
        return None
    rows.sort(key=lambda r: -sign * r[metric]["mean"])
    best = rows[0]
    # Level: the interval of the one reaches into that of the other.
    level = [
        r for r in rows[1:]
        if sign * (best[metric]["mean"] - r[metric]["mean"]) <= best[metric]["half"] + r[metric]["half"]
    ]  # fmt: skip
    said = ", ".join(f"{r['name']} ({interval(r[metric])})" for r in level[:4])
    if len(level) > 4:
        said += f" and {len(level) - 4} more"
    task = study.title + (f": {where}" if where else "")
    n = max((r[metric].get("n", 0) for r in rows), default=0)
    cost = f"{n} seeds, 95 % intervals" if n else ""
    return task, metric.replace("_", " "), f"{best['name']}: {interval(best[metric])}", said or "none", cost, study


def _language(study: Study) -> Iterator[Row]:
    """Bits per byte by trained length, with the time of a step."""
    summary = study.data.get("summary", [])
    for length in sorted({r["length"] for r in summary}):
        rows = [r for r in summary if r["length"] == length and "bits per byte" in r.get("metrics", {})]
        ahead = {c["label"] for c in study.data.get("contestants", ()) if c.get("lookahead")}
        rows = sorted((r for r in rows if r["label"] not in ahead), key=lambda r: r["metrics"]["bits per byte"]["mean"])
        if len(rows) < 2:
            continue
        said = {r["label"]: r["metrics"]["bits per byte"] for r in rows}
        best = rows[0]["label"]
        reach = said[best]["mean"] + said[best]["half_width"]
        level = [n for n, v in said.items() if n != best and v["mean"] - v["half_width"] <= reach]
        shown = ", ".join(f"{n} ({interval(said[n])})" for n in level[:4])
        more = f" and {len(level) - 4} more" if len(level) > 4 else ""
        cost = f"step {number(rows[0]['over_first'])} × softmax"
        yield ("Language, byte level, young models", f"{length} bytes, bits per byte",
               f"{best}: {interval(said[best])}", (shown or "none") + more, cost, study)  # fmt: skip


def _by_length(study: Study) -> Iterator[Row]:
    """Contenders timed over several lengths: the fastest at each."""
    records = study.data.get("records")
    if not isinstance(records, list) or not all(isinstance(r, Mapping) and "sizes" in r for r in records):
        return
    for key in ("forward_seconds", "both_seconds", "seconds"):
        rows = [r for r in records if isinstance(r.get(key), list)]
        if len(rows) < 2:
            continue
        for i, size in enumerate(rows[0]["sizes"]):
            timed = sorted((r[key][i], r["contender"]) for r in rows if len(r[key]) > i and r[key][i] is not None)
            (first, name), (second, other) = timed[0], timed[1]
            base = rows[0][key][i]
            what = {"forward_seconds": "forward", "both_seconds": "forward and backward"}.get(key, "time")
            yield (f"Speed: {study.title}", f"N = {size:,}, {what}", f"{name}: {number(first * 1e3)} ms",
                   f"next: {other} ({number(second * 1e3)} ms)",
                   f"{number(base / first)} × as fast as {rows[0]['contender']}", study)  # fmt: skip


def rows(studies: list[Study]) -> list[Row]:
    """Every row of the table, in the order of the files."""
    out: list[Row] = []
    for study in studies:
        for where, block in comparisons(study.data):
            if row := _ranked(where, block, study):
                out.append(row)
        if study.data.get("summary") and study.data.get("contestants"):
            out += _language(study)
        out += _by_length(study)
    return out


def page(studies: list[Study]) -> str:
    """The page: quality first, then speed."""
    quality, speed = [], []
    for task, size, best, level, cost, study in rows(studies):
        source = f"[{study.stem}](results/{study.stem}.md), {study.machine}"
        row = [cell(task), cell(size), cell(best), cell(level), cell(cost), source]
        (speed if task.startswith("Speed") else quality).append(row)
    return "\n".join([
        "# Which one should I use?\n",
        "What was best where it was measured, and what cannot be told apart from it. Every row is computed from a file "
        "of `benchmarks/results`; the models are small and young, and the machine is a CPU. Measure at *your* shape: "
        "`attnlib compare` trains and times mechanisms side by side on your machine.\n",
        "## By task\n",
        "Level with it: the 95 % intervals of the two reach into each other. That does not say they are equal.\n",
        table(["task", "measured", "best", "level with it", "seeds or cost", "from"], quality),
        "## By length\n",
        table(["what", "length", "fastest", "then", "against", "from"], speed),
    ])  # fmt: skip
