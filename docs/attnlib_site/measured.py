"""Figures of ``benchmarks/results`` as tables: every file a page, every row that names a paper on that paper's page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .text import cell, table

#: What names a row of a list of measurements, the first that is there.
LABELS = ("name", "label", "contender", "candidate", "technique", "row", "case", "spread", "model", "task", "setting")

#: Lists that hold what the tables already summarise.
RAW = {"runs", "seeds", "contestants", "left_out", "commit"}

#: Keys that say nothing in a heading.
SILENT = {"rows", "records", "results", "suites", "tasks", "summary", "comparisons", "scales", "mixers"}

#: Which way a metric of a study is better: what may be ranked.
HIGHER = {"accuracy", "iou", "psnr", "cosine", "recall", "overlap", "exact", "found"}
LOWER = {"bits", "wasserstein", "chamfer", "noc", "loss", "perplexity", "error"}


@dataclass(frozen=True)
class Grid:
    """One table of measurements.

    Args:
        title: where it stands in the file, in words.
        label: what names its rows.
        columns: the measured quantities.
        rows: a label and its values, as text.
        baseline: the row that the others are measured against, where the file names one.
    """

    title: str
    label: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    baseline: str = ""

    def markdown(self, only: list[int] | None = None) -> str:
        """The table, or some of its rows."""
        rows = self.rows if only is None else [self.rows[i] for i in only]
        used = [i for i in range(len(self.columns)) if any(values[i] for _, values in rows)]
        head = [self.label, *(cell(self._head(self.columns[i])) for i in used)]
        return table(head, [[cell(name), *(values[i] for i in used)] for name, values in rows])

    def _head(self, column: str) -> str:
        return f"against {self.baseline}" if column == "against" and self.baseline else _said(column)


@dataclass(frozen=True)
class Study:
    """One file of results."""

    stem: str
    data: Mapping[str, Any]
    pictures: tuple[Path, ...] = ()
    grids: tuple[Grid, ...] = field(default=())

    @property
    def title(self) -> str:
        """What was measured, in words."""
        what = self.data.get("what") if isinstance(self.data.get("what"), str) else None
        return what[0].upper() + what[1:] if what else self.name

    @property
    def name(self) -> str:
        """What it is called in a list: its file, in words."""
        words = self.stem.removesuffix("-cpu").replace("-", " ")
        return words[0].upper() + words[1:]

    @property
    def machine(self) -> str:
        """The machine it was measured on."""
        return machine_of(self.data)


def machine_of(value: Any) -> str:
    """Processor, cores and threads, from the first place of a file that says them.

    >>> machine_of({"suites": {"a": {"machine": {"cpu": "EPYC", "cores": 2, "threads": 1, "torch": "2.13"}}}})
    'EPYC, 2 cores, 1 thread, torch 2.13'
    """
    if isinstance(value, Mapping):
        found = value.get("machine")
        if isinstance(found, str):
            return f"{found}, torch {value['torch']}" if "torch" in value else found
        if isinstance(found, Mapping):
            parts = [str(found.get("cpu") or found.get("device_name") or "")]
            for key in ("cores", "threads"):
                if isinstance(found.get(key), int):
                    parts.append(f"{found[key]} {key if found[key] != 1 else key[:-1]}")
            parts += [f"torch {found['torch']}"] if "torch" in found else []
            return ", ".join(p for p in parts if p)
        for inner in value.values():
            if said := machine_of(inner):
                return said
    return ""


def _said(key: str) -> str:
    """A key as a heading: ``both_over_dense`` -> ``both over dense``."""
    return key.removeprefix("metrics: ").removeprefix("rates: ").replace("_", " ")


def number(value: Any) -> str:
    """A number as it is read, four figures at most.

    >>> number(0.012345), number(1234567), number(True), number(28.0)
    ('0.01235', '1,234,567', 'yes', '28')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ""


def interval(value: Mapping[str, Any]) -> str:
    """``mean ± half``.

    >>> interval({"mean": 47.7115, "half": 27.0079, "n": 6}).split(), interval({"mean": 2.0, "half": 0.0})
    (['47.7', '±', '27.0'], '2')
    """
    mean, half = value["mean"], value.get("half", value.get("half_width"))
    if half is None or half == 0:
        return number(mean)
    digits = 1 if abs(mean) >= 10 or half >= 10 else 2 if max(abs(mean), half) >= 1 else 3
    return f"{mean:.{digits}f}\u00a0±\u00a0{half:.{digits}f}"  # never broken in two


def _value(value: Any) -> str | None:
    """What stands in a cell; ``None`` for what has to become columns of its own."""
    if isinstance(value, Mapping):
        if isinstance(value.get("mean"), (int, float)):
            return interval(value)
        if "value" in value and "interval" in value:
            spread = value["interval"]
            said = number(value["value"])
            return f"{said} ({number(spread[0])} to {number(spread[1])})" if spread and said else said
        return None
    if isinstance(value, list):
        return cell(", ".join(number(x) or str(x) for x in value)) if _flat(value) else ""
    if isinstance(value, str):
        return cell(value)
    return number(value)


def _flat(values: list[Any]) -> bool:
    return len(values) <= 8 and not any(isinstance(x, (dict, list)) for x in values)


def _columns(row: Mapping[str, Any], skip: str, prefix: str = "") -> dict[str, str]:
    """A row without its label: name of a column -> what stands in it."""
    out: dict[str, str] = {}
    for key, value in row.items():
        if key == skip or key in RAW or key in ("machine", "load", "authors", "seed"):
            continue
        said = _value(value)
        if said is None:
            out |= _columns(value, "", f"{prefix}{key}: ")
        else:
            out[f"{prefix}{key}"] = said
    return out


def _grid(title: str, label: str, rows: list[tuple[str, Mapping[str, Any]]], baseline: str = "") -> Grid | None:
    flat = [(name, _columns(row, label)) for name, row in rows]
    columns = tuple(dict.fromkeys(key for _, row in flat for key in row))
    if not columns or len(columns) > 40:
        return None
    filled = tuple((name, tuple(row.get(c, "") for c in columns)) for name, row in flat)
    return Grid(title, "" if label == "name" else _said(label), columns, filled, baseline)


def grids(value: Any, path: tuple[str, ...] = (), baseline: str = "", below: bool = False) -> Iterator[Grid]:
    """Every table in a file: lists of measurements, and mappings from names to measurements."""
    if isinstance(value, list):
        rows = [x for x in value if isinstance(x, Mapping)]
        groups = dict.fromkeys(r.get("group") for r in rows)
        if len(groups) > 1 and None not in groups:
            for group in groups:
                chosen = [{k: v for k, v in r.items() if k != "group"} for r in rows if r["group"] == group]
                yield from grids(chosen, (*path, str(group)), baseline)
        elif rows:
            label = next((key for key in LABELS if all(isinstance(r.get(key), str) for r in rows)), "")
            named = [(str(r[label]) if label else str(i + 1), r) for i, r in enumerate(rows)]
            if grid := _grid(": ".join(path), label or "case", named, baseline):
                yield grid
        return
    if not isinstance(value, Mapping):
        return
    baseline = str(value.get("baseline", ""))
    inner = {k: v for k, v in value.items() if k not in RAW and k not in ("machine", "settings", "against", "data")}
    inner = {k: v for k, v in inner.items() if not isinstance(v, Mapping) or _value(v) is None}
    maps = {k: v for k, v in inner.items() if isinstance(v, Mapping)}
    tables = len(maps) >= 2 and len(maps) == len(inner) and not any(_nested(v) for v in maps.values())
    if below and tables:
        if grid := _grid(": ".join(path), "name", list(maps.items())):
            yield grid
        return
    for key, item in inner.items():
        if isinstance(item, (Mapping, list)):
            step = () if key in SILENT else (_said(key),)
            yield from grids(item, (*path, *step), baseline, True)


def _nested(value: Mapping[str, Any]) -> bool:
    """Whether a mapping holds tables itself."""
    return any(
        isinstance(x, list)
        and any(isinstance(y, Mapping) for y in x)
        or (
            isinstance(x, Mapping) and _value(x) is None and any(_value(y) is None for y in x.values() if y is not None)
        )
        for x in value.values()
    )


def studies(folder: Path) -> list[Study]:
    """Every file of results with its pictures; a picture belongs to the file with the longest name it begins with."""
    files = {p.stem: p for p in sorted(folder.glob("*.json"))}
    stems = {stem.removesuffix("-cpu"): stem for stem in files}
    drawn: dict[str, list[Path]] = {}
    for picture in sorted(folder.glob("*.svg")):
        owner = max((s for s in stems if picture.stem.startswith(s)), key=len, default="")
        drawn.setdefault(owner, []).append(picture)
    out = []
    for short, stem in stems.items():
        data = json.loads(files[stem].read_text(encoding="utf-8"))
        if not isinstance(data, Mapping):
            data = {"records": data}
        out.append(Study(stem, data, tuple(drawn.get(short, ())), tuple(grids(data))))
    return out


def names_row(label: str, name: str) -> bool:
    """Whether the label of a row names a mechanism: it begins with it, or has it in brackets.

    >>> names_row("routed regions (BiFormer)", "biformer"), names_row("based, 16 features", "based")
    (True, True)
    >>> names_row("a window based on heads", "based"), names_row("agent-attention 56x56", "agent-attention")
    (False, True)
    """
    said, name = label.lower(), name.lower()
    if len(name) < 3:
        return False
    return re.search(rf"(^|\(|, |causal ){re.escape(name)}($|[ ,):])", said) is not None


def rows_of(study: Study, names: list[str]) -> list[tuple[Grid, list[int]]]:
    """The rows of a study's tables that name one of the mechanisms, with those they are measured against."""
    found = []
    said = _labels(study, names)
    for grid in study.grids:
        hits = [
            i
            for i, (label, _) in enumerate(grid.rows)
            if label in said or any(names_row(label, name) for name in names)
        ]
        if hits and len(hits) < 25:
            base = [
                i for i, (label, _) in enumerate(grid.rows) if label in ("softmax", "sdpa", "untouched", grid.baseline)
            ]
            found.append((grid, sorted({*hits, *base[:2]})))
    return [(g, rows) for g, rows in found if not any(set(g.columns) < set(other.columns) for other, _ in found)]


def _labels(study: Study, names: list[str]) -> set[str]:
    """Labels of contestants whose layers are all of these mechanisms."""
    out = set()
    for one in study.data.get("contestants", ()):
        used = {layer["name"] for layers in one["layers"].values() for layer in layers}
        if used & set(names):
            out.add(one["label"])
    return out
