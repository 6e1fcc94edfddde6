"""Which mechanism for which task and length, from what was measured: no row without a file and a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .measured import HIGHER, LOWER, SILENT, Study, interval, number
from .text import cell, table

#: A row of the table: task, what was measured, the best with its figure, what is level with it, the baseline or cost,
#: study.
Row = tuple[str, str, str, str, str, Study]

#: Keys of settings that say how long what was timed is.
SIZES = ("tokens", "grid", "prompt", "context", "length")

#: Metrics whose names in the files are short.
METRICS = {
    "iou": "mean IoU, %", "psnr": "PSNR, dB", "bits": "bits per byte", "accuracy": "accuracy, %",
    "noc_80": "clicks to an overlap of 80 %", "cosine": "cosine to the original's vectors",
}  # fmt: skip

#: Keys of times, and what they are of.
TIMES = {
    "forward_seconds": "forward", "both_seconds": "forward and backward", "seconds": "forward",
    "step_seconds": "one decoding step",
}  # fmt: skip


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
                yield from comparisons(inner, path if key in SILENT else (*path, key))


def _ranked(where: str, block: Mapping[str, Any], study: Study) -> Row | None:
    metric = block["metric"]
    sign = better(metric)
    rows = [r for r in block["rows"] if isinstance(r.get(metric), Mapping) and r[metric]["half"] is not None]
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
    base = next((f"{r['name']}: {interval(r[metric])}" for r in rows if r["name"] == block["baseline"]), "")
    base = "the best itself" if best["name"] == block["baseline"] else base
    what = METRICS.get(metric, metric.replace("_", " ")) + (f", {n} seeds" if n else "")
    return task, what, f"{best['name']}: {interval(best[metric])}", said or "none", base, study


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
        first = next((c["label"] for c in study.data["contestants"] if c["label"] == c.get("reference")), "")
        cost = f"{first}: {interval(said[first])}; the best's step takes {number(rows[0]['over_first'])} × as long"
        cost = "the best itself" if first == best else cost if first in said else ""
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
                   f"{other} ({number(second * 1e3)} ms)",
                   f"{number(base / first)} × as fast as {rows[0]['contender']}", study)  # fmt: skip


def _at_one_length(study: Study) -> Iterator[Row]:
    """Contenders timed once: the fastest, at the size that the settings say."""
    records = study.data.get("records")
    settings = study.data.get("settings")
    if not isinstance(records, list) or not isinstance(settings, Mapping):
        return
    size = next((f"{key.replace('_', ' ')} {_size(settings[key])}" for key in SIZES if key in settings), "")
    for key, what in TIMES.items():
        rows = [r for r in records if isinstance(r.get("contender"), str) and isinstance(r.get(key), float)]
        if len(rows) < 2 or not size:
            continue
        first, second = sorted(rows, key=lambda r: r[key])[:2]
        yield (f"Speed: {study.title}", f"{size}, {what}", f"{first['contender']}: {number(first[key] * 1e3)} ms",
               f"{second['contender']} ({number(second[key] * 1e3)} ms)",
               f"{number(rows[0][key] / first[key])} × as fast as {rows[0]['contender']}", study)  # fmt: skip


def _size(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else number(value)


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
        out += _at_one_length(study)
    return out


def page(studies: list[Study]) -> str:
    """The page: quality first, then speed."""
    quality, speed = [], []
    for task, size, best, level, cost, study in rows(studies):
        source = f"[{study.stem}](results/{study.stem}.md), {study.machine.partition(', torch')[0]}"
        row = [cell(task), cell(size), cell(best), cell(level), cell(cost), source]
        if task.startswith("Speed: "):
            speed.append([row[0].removeprefix("Speed: "), *row[1:]])
        else:
            quality.append(row)
    return "---\nhide: [navigation, toc]\n---\n\n" + "\n".join([
        "# Which one should I use?\n",
        "What was best where it was measured, and what cannot be told apart from it. Every row is computed from a file "
        "of `benchmarks/results`; most of the models are small and young, and each row names its machine. Measure at "
        "*your* shape: "
        "`attnlib compare` trains and times mechanisms side by side on your machine.\n",
        "## By task\n",
        "Means and 95 % intervals over seeds. Level with it: the intervals of the two reach into each other, which "
        "does not say that they are equal. Where rows of a study spend different budgets (a density, a size of "
        "patches, a bound that nobody reaches), the best is the one that spends most: its page has the others.\n",
        table(["task", "measured", "best", "level with it", "baseline", "from"], quality),
        "## By length\n",
        table(["what", "length", "fastest", "then", "against", "from"], speed),
    ])  # fmt: skip
