"""Measuring: mechanisms trained side by side on real data, and the times of operators and mechanisms."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..types import check_choice
from .models import is_here
from .store import writable
from .worlds.models import missing_parts

#: Suites that stand in :mod:`attnlib.bench.studies`: every module of it, but for those that are run by hand.
STUDIES = tuple(
    m.name
    for m in pkgutil.iter_modules([str(Path(__file__).parent / "studies")])
    if m.name not in ("language",) and not m.ispkg
)


def _lines(family: str) -> tuple[str, ...]:
    """``<family>-<line>`` of every module of the family's package in :mod:`attnlib.bench.studies`."""
    found = pkgutil.iter_modules([str(Path(__file__).parent / "studies" / family.replace("-", "_"))])
    return tuple(f"{family}-{m.name.replace('_', '-')}" for m in found if not m.name.startswith("_"))


#: Suites of several lines, each a package of :mod:`attnlib.bench.studies`; the family's name is all of them.
FAMILIES = {family: _lines(family) for family in ("real", "diffusion", "multimodal-models", "tasks")}
REAL, DIFFUSION, MULTIMODAL_MODELS, TASKS = FAMILIES.values()

#: Suites with a module of their own; the others stand in :mod:`attnlib.bench.speed.operators`.
ENGINES = (
    "linear", "segments", "local", "halo", "hyper", "circular", "scan", "sparse", "super-token", "cache", "hooks",
    "isolation", "enlarged", "references", "transfer", "look", "saliency", "steps", "task-parts",
    "multimodal-models-speed", "gpu", *STUDIES, *REAL, *DIFFUSION, *MULTIMODAL_MODELS, *TASKS,
)  # fmt: skip

#: Those that run models of transformers.
NEEDS_HF = (
    "multimodal", "cache", "hooks", "steps", "enlarged", "references", "conversion", "spans", "finetuning", "look",
    "choices", "attribution", "rounding", "multimodal-models-speed", "tasks-sentence", *REAL, *DIFFUSION,
    *(name for name in MULTIMODAL_MODELS if name.split("-")[-1] not in ("judges", "depth", "geometry")),
)  # fmt: skip

#: Those that load models which ``make models`` fetches, and which.
NEEDS_MODELS = {
    "look": ("smollm2-135m",), "conversion": ("smollm2", "minilm"), "spans": ("smollm2",), "searching": ("hed-vgg16",),
    "tasks-sentence": ("minilm",),
}  # fmt: skip


def suites() -> list[str]:
    """Names that :func:`run_bench` takes as ``suite``, besides ``"all"``."""
    from .speed.operators import SUITES

    return [*SUITES, *ENGINES, *FAMILIES]


def needed_models(name: str) -> tuple[str, ...]:
    """Models that a suite loads."""
    return _module(name).MODELS if name in REAL else NEEDS_MODELS.get(name, ())


def _module(name: str) -> Any:
    room, own = "studies" if name in STUDIES else "speed", name
    for family, lines in FAMILIES.items():
        if name in lines:
            room, own = f"studies.{family.replace('-', '_')}", name.removeprefix(f"{family}-")
    return importlib.import_module(f".{room}.{own.replace('-', '_')}", __name__)


def _engine(name: str, out: Path | None, progress: Any) -> dict[str, Any]:
    measure = _module(name).measure
    known, kept = inspect.signature(measure).parameters, None
    given: dict[str, Any] = {"progress": progress}
    if out is not None and "keep" in known:  # a study that was stopped goes on
        kept = given["keep"] = out / f".{name}.partial.jsonl"
    if out is not None and "pictures" in known:
        given["pictures"] = out
    result = measure(**given)
    if out is not None:
        path = out / ("gpu.json" if name == "gpu" else f"{name}-cpu.json")
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for beside in ("mechanisms", "kvpress", "captum"):  # recorded against others' code, which is not at hand here
            if beside in held and beside not in result:
                result[beside] = held[beside]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        if kept is not None:
            kept.unlink(missing_ok=True)
    return result


def run_bench(
    names: Sequence[str],
    suite: str = "all",
    grid: Sequence[int] = (1024,),
    settings: dict[str, Any] | None = None,
    out: Path | str | None = None,
    console: Console | None = None,
    quiet: bool = False,
    workers: int = 1,
    ray: bool = False,
) -> dict[str, Any]:
    """Time mechanisms against softmax attention, or operator suites when no mechanism is named.

    Args:
        names: registry names.
        suite: one of :func:`suites`, or ``"all"``.
        grid: grid of the mechanisms' inputs.
        settings: further settings of the mechanisms, ``dim`` and ``num_heads`` among them.
        out: folder for JSON results.
        console: where tables and progress go.
        quiet: print nothing.
        workers: studies at a time (:data:`STUDIES`), each in a process on a core of its own; at most as many as cores.
            What is timed runs alone, before.
        ray: studies go to a Ray cluster instead (extra ``ray``), whose machines write to the same ``out``.

    Returns:
        Results by name.

    Raises:
        ValueError: an unknown mechanism, suite or setting; more workers than cores.
        ImportError: Ray is wanted and not installed.
    """
    from .speed.operators import bench_mechanism, bench_operators
    from .workers import at_once, check_workers

    check_workers(workers, ray)

    console = Console() if console is None else console
    if not names:
        check_choice("suite", suite, [*suites(), "all"])
    folder = None if out is None else writable(out)

    def progress(line: str) -> None:
        if not quiet:
            console.print(f"[dim]{line}[/]", highlight=False)

    results: dict[str, Any] = {}
    if names:
        table = Table("mechanism", "pass", "median s", "x softmax attention", box=None)
        for name in names:
            progress(f"{name} on {tuple(grid)}")
            results[name] = row = bench_mechanism(name, grid, **(settings or {}))
            for what in ("forward", "backward", "decode"):
                if what in row:
                    against = row[what].get("ratio")
                    label = {"forward": "inference", "backward": "training step", "decode": "one token"}[what]
                    table.add_row(name, label, f"{row[what]['median_s']:.4f}", f"{against:.2f}" if against else "")
        if not quiet:
            console.print(table)
        if folder is not None:
            (folder / "mechanisms.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        return results
    apart: list[str] = []
    several = {"all": [name for name in suites() if name not in FAMILIES], **FAMILIES}
    chosen = several.get(suite, [suite])
    if suite != "all":
        lacking = sorted({m for name in chosen for m in needed_models(name) if not is_here(m)})
        if lacking:
            raise FileNotFoundError(f"the suite {suite} needs the models {', '.join(lacking)}: make models")
    for name in chosen:
        if name in NEEDS_HF and suite == "all" and importlib.util.find_spec("transformers") is None:
            progress(f"{name}: left out, it needs transformers; pip install 'attnlib[hf]'")
        elif suite == "all" and (lacking := [m for m in needed_models(name) if not is_here(m)]):
            progress(f"{name}: left out, it needs the models {', '.join(lacking)}; make models")
        elif name in DIFFUSION and suite == "all" and (parts := missing_parts(_module(name).PARTS)):
            progress(f"{name}: left out, it needs the trained {', '.join(parts)}; examples/diffusion/train.py")
        elif name == "gpu" and (reason := _module("gpu").why_not()):
            results["gpu"] = {"skipped": reason}
            progress(f"gpu: skipped, {reason}")
        elif name in STUDIES and (workers > 1 or ray):
            apart.append(name)
        elif name in ENGINES:
            results[name] = _engine(name, folder, progress)
        else:
            path = None if folder is None else folder / "operators-cpu.json"
            results[name] = bench_operators(name, path, progress=progress)
            if not quiet:
                _print_rows(console, name, results[name]["rows"])
    for number, result in at_once(_engine, [(n, folder, _silent) for n in apart], workers, ray=ray) if apart else ():
        results[apart[number]] = result
        progress(f"{apart[number]}: done")
    return results


def _silent(line: str) -> None:
    """Progress of a study that runs beside others."""


def run_against(
    against: str | Path,
    rows: str = "*",
    out: Path | str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """What small calls cost in this source tree beside another one; see :mod:`attnlib.bench.speed.revisions`.

    Args:
        against: a revision of the repository, or a folder with sources.
        rows: a pattern of the calls.
        out: folder for the JSON result, ``revisions-cpu.json``.
        console: where every row goes as soon as it is measured.
        quiet: print nothing.

    Raises:
        ValueError: no such revision, folder or row.
    """
    from .speed import revisions

    console = Console() if console is None else console

    def progress(line: str) -> None:
        if not quiet:
            console.print(line, highlight=False, markup=False, soft_wrap=True)

    folder = None if out is None else writable(out)
    result = revisions.measure(against, rows, progress=progress)
    if folder is not None:
        path = folder / "revisions-cpu.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def run_techniques(
    model: str | None,
    techniques: Sequence[str],
    length: int = 1024,
    out: Path | str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Techniques side by side on one pretrained language model; see :func:`attnlib.bench.beside.measure`.

    Args:
        model: of :mod:`attnlib.bench.models`, a folder of a transformers model, or its name on the hub.
        techniques: ``"Name,key=value"`` each.
        length: tokens of a prompt.
        out: folder for ``techniques.json`` and ``report.html``.
        console: where the table and progress go.
        quiet: print nothing.

    Raises:
        ValueError: no model, no technique, an unknown one.
    """
    from .beside import measure, print_table

    if model is None:
        raise ValueError("with: techniques are measured on a model; name it, for example --model smollm2")
    console = Console() if console is None else console

    def progress(line: str) -> None:
        console.print(f"[dim]{line}[/]", highlight=False)

    result = measure(model, techniques, length, out=out, progress=None if quiet else progress)
    if not quiet:
        print_table(result, console)
        if out is not None:
            console.print(f"report: {Path(out) / 'report.html'}", highlight=False)
    return result


def _print_rows(console: Console, suite: str, rows: list[dict[str, Any]]) -> None:
    table = Table("case", "what", "candidate", "median s", "ratio", "exponent", box=None, title=suite)
    for row in rows:
        table.add_row(
            row.get("case", ""), row.get("what", ""), row.get("candidate", ""),
            f"{row['median_s']:.4f}" if "median_s" in row else "", f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['exponent']:.2f}" if "exponent" in row else "",
        )  # fmt: skip
    console.print(table)
