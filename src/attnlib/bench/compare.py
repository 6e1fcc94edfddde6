"""Train and time attention mechanisms side by side on real data, everything else equal.

``compare`` makes one small model per mechanism, task and seed, gives all of them the same number of steps, keeps every
finished run in its own file, and writes ``results.json`` and ``report.html``.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

import attnlib

from . import stats, training
from .clock import limit_threads, machine, now
from .data.files import resolve
from .data.tasks import TASKS, Task, expand, task_class
from .specs import Spec, shorten
from .speed import scaling
from .store import StorageError, Store, plain, write_json
from .training import Settings

SCHEMA = 1
BASELINE = "softmax-attention"
MIN_STEPS = 30
SCALING_SHARE = 0.13
REPORT_SECONDS = 12.0


@dataclass(frozen=True)
class Preset:
    """A ready-made comparison. Mechanisms that the registry does not have are left out.

    Args:
        mechanisms: names with settings, as :meth:`Spec.parse` reads them.
        tasks: names or patterns.
        budget_minutes: wall-clock limit.
        seeds: number of seeds.
        what: one sentence.
    """

    mechanisms: tuple[str, ...]
    tasks: tuple[str, ...] = tuple(TASKS)
    budget_minutes: float = 10.0
    seeds: int = 3
    what: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def available(self) -> list[Spec]:
        """The mechanisms that exist."""
        known = set(attnlib.list_mechanisms())
        return [s for s in map(Spec.parse, self.mechanisms) if s.name in known]


# Settings fit the grids of the tasks: 8 × 8 and 16 × 16.
_MATTER = (
    "softmax-attention",
    "sigmoid-attention",
    "lightning-attention-2",
    "agent-attention,num_agents=16,grid=16",
    "focalnet",
    "biformer,n_win=4,topk=4",
    "fused-neighborhood-attention,kernel_size=7",
    "deformable-attention",
)

PRESETS: dict[str, Preset] = {
    "demo": Preset(
        _MATTER,
        budget_minutes=6.8,
        seeds=3,
        what="eight mechanisms on every task, in minutes",
        settings={"dim": 48},
    ),
    "quick": Preset(_MATTER[:3], tasks=("text", "digits"), budget_minutes=1.0, seeds=2, what="a first look"),
    "long": Preset(_MATTER, budget_minutes=120.0, seeds=5, what="the demo with time to learn"),
}


class Interrupted(KeyboardInterrupt):
    """The comparison was stopped; the message says what is kept and how to go on."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns.

    Args:
        results: what ``results.json`` holds.
        json: where it is.
        report: the HTML report.
    """

    results: dict[str, Any]
    json: Path
    report: Path


@dataclass
class _Entry:
    """One mechanism in one task."""

    task: Task
    spec: Spec
    step_seconds: float = 0.0
    evaluate_seconds: float = 0.0


def compare(
    mechanisms: Sequence[str | Spec | tuple[str, Mapping[str, Any]]] | None = None,
    tasks: Iterable[str] | None = None,
    budget_minutes: float | None = None,
    out: str | Path = "attnlib-compare",
    data: str | Path | Mapping[str, str | Path] | None = None,
    *,
    seeds: int | Sequence[int] | None = None,
    preset: str | None = None,
    settings: Settings | None = None,
    baseline: str | None = BASELINE,
    scale: bool = True,
    threads: int | None = None,
    confidence: float = 0.95,
    console: Console | None = None,
    quiet: bool = False,
) -> Comparison:
    """Compare mechanisms on real data within a time budget.

    Every task gets a share of the budget; all its runs take the same number of steps, as many as fit the share by the
    measured time of a step. Runs go seed by seed, so that a budget that runs out costs seeds, never mechanisms. The
    same call in the same folder continues: finished runs are read, not repeated.

    Args:
        mechanisms: ``"name"``, ``"name,key=value"``, ``"module:Class"`` or ``(name, {key: value})``.
        tasks: of ``text``, ``digits``, ``superres``, ``upsample``, ``forecast``, or patterns; all when ``None``.
        budget_minutes: wall-clock budget.
        out: folder for runs, ``results.json`` and ``report.html``.
        data: a text file, a folder of images or a CSV file instead of the packaged data, or ``{task: path}``.
        seeds: how many, or which.
        preset: one of :data:`PRESETS`; other arguments override it.
        settings: width, depth, heads and optimiser, the same for all.
        baseline: what efficiency lengths and differences refer to; added when missing. ``None`` for none.
        scale: also measure time and memory against N.
        threads: CPU threads; when ``None``, one or torch's number, whichever trains a small model faster.
        confidence: of the intervals over seeds.
        console: where to print.
        quiet: print nothing.

    Returns:
        The results and where they are.

    Raises:
        ValueError: an argument that names nothing that exists; the message lists what does.
        StorageError: the disk did not take a measurement; what is kept and how to go on are in the message.
        Interrupted: Ctrl-C; the report of what was finished has been written.

    Reference: after Zhang et al. 2022, arXiv:2210.07661 (patterns, efficiency length).

    >>> compare(["softmax-attention"], ["nothing"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: tasks: 'nothing' is not possible; ...
    """
    chosen: Preset | None = None
    if preset is not None:
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is not possible; choose one of {sorted(PRESETS)}")
        chosen = PRESETS[preset]
    task_names = expand(tasks if tasks is not None else (chosen.tasks if chosen else None))
    specs = _specs(mechanisms, chosen, baseline)
    budget = budget_minutes if budget_minutes is not None else (chosen.budget_minutes if chosen else 10.0)
    if not budget > 0:
        raise ValueError(f"budget_minutes={budget} is not possible; it must be positive")
    seed_list = _seeds(seeds if seeds is not None else (chosen.seeds if chosen else 3))
    if settings is None:
        settings = Settings(**(chosen.settings if chosen else {}))
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not possible; it must lie strictly between 0 and 1")
    paths = resolve(data, {n: task_class(n).kind for n in task_names})
    if data is not None and tasks is None and not isinstance(data, Mapping):
        task_names = [n for n in task_names if n in paths]
    _needs_bench_extra()
    store = Store(out)
    console = console or Console(quiet=quiet)
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads} is not possible; it must be at least 1")
    with limit_threads(None):
        session = _Session(
            store,
            console,
            specs,
            task_names,
            paths,
            seed_list,
            settings,
            budget * 60,
            baseline,
            scale,
            confidence,
            threads,
        )
        return session.go(quiet)


def _specs(
    given: Sequence[str | Spec | tuple[str, Mapping[str, Any]]] | None, preset: Preset | None, baseline: str | None
) -> list[Spec]:
    if isinstance(given, str):
        given = [given]
    specs = [Spec.parse(m) for m in given] if given else (preset.available() if preset else [])
    if not specs:
        raise ValueError(f"mechanisms is empty; give names of `attnlib list`, or preset= one of {sorted(PRESETS)}")
    for spec in specs:
        spec.find()
    unique: dict[str, Spec] = {}
    for spec in specs:
        unique.setdefault(spec.full, spec)
    if baseline is not None:
        plain_one = Spec.parse(baseline)
        plain_one.find()
        unique.setdefault(plain_one.full, plain_one)
        # First in every table and legend.
        unique = {plain_one.full: unique.pop(plain_one.full), **unique}
    return shorten(list(unique.values()))


def _seeds(given: int | Sequence[int]) -> list[int]:
    seeds = list(range(given)) if isinstance(given, int) else [int(s) for s in given]
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={given!r} is not possible; give a positive number of seeds or different integers")
    return seeds


def _needs_bench_extra() -> None:
    from .data.files import require

    for module in ("sklearn", "skimage", "matplotlib", "jinja2", "scipy.stats"):
        require(module)


class _Session:
    """One call of :func:`compare`."""

    def __init__(
        self,
        store: Store,
        console: Console,
        specs: list[Spec],
        task_names: list[str],
        paths: dict[str, Path],
        seeds: list[int],
        settings: Settings,
        budget: float,
        baseline: str | None,
        scale: bool,
        confidence: float,
        threads: int | None,
    ) -> None:
        self.store, self.console, self.specs, self.seeds = store, console, specs, seeds
        self.settings, self.budget, self.scale = settings, budget, scale
        wanted = Spec.parse(baseline).full if baseline is not None else None
        self.baseline = next((s.label for s in specs if s.full == wanted), None)
        self.confidence, self.threads = confidence, threads
        self.began = now()
        self.tasks = {name: task_class(name)(paths.get(name)) for name in task_names}
        self.entries: list[_Entry] = []
        self.steps: dict[str, int] = {}
        self.skipped: list[dict[str, str]] = []
        self.failed: list[dict[str, str]] = []
        self.left_out: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.scales: list[dict[str, Any]] = []
        self.reused = 0
        self.done: set[tuple[str, str, int]] = set()
        self.spent = self.predicted = 0.0

    def elapsed(self) -> float:
        return now() - self.began

    # ---- the whole

    def go(self, quiet: bool) -> Comparison:
        progress = Progress(
            TextColumn("[bold]{task.description:<14}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=quiet or self.console.quiet,
            transient=True,
        )
        try:
            with progress:
                self._choose_threads()
                self._plan(progress)
                if self.scale:
                    self._scale(progress)
                self._train(progress)
        except StorageError:
            raise
        except KeyboardInterrupt as stop:
            # Whatever was finished is in files already; a report of it is a courtesy that must not hide the message.
            kept = self.store.count()
            try:
                self._collect_finished()
                written = self._write(finished=False)
                shown = f"; the report so far is {written.report}"
            except Exception as error:
                shown = f"; no report could be written ({error})"
            message = (
                f"stopped: {kept} finished pieces are kept in {self.store.out}{shown}. "
                "Run the same command again: it goes on from there"
            )
            # Command-line frameworks swallow the text of a KeyboardInterrupt, so it is printed here.
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)
            raise Interrupted(message) from stop
        comparison = self._write(finished=True)
        self._show(comparison)
        return comparison

    def _show(self, comparison: Comparison) -> None:
        """The table at a glance, and where the report is."""
        from .report import estimate

        rows = {(s["task"], s["mechanism"]): s for s in comparison.results["summary"]}
        table = Table(title=f"mean ± {100 * self.confidence:g} % interval over {len(self.seeds)} seeds")
        table.add_column("mechanism")
        for task in self.tasks.values():
            table.add_column(f"{task.name}\n{task.metric} {'↑' if task.higher_is_better else '↓'}", justify="right")
        for spec in self.specs:
            cells = []
            for name in self.tasks:
                row = rows.get((name, spec.label))
                cells.append("–" if row is None else " ".join(estimate(row["mean"], row["half_width"])).strip())
            table.add_row(escape(spec.label), *cells)
        self.console.print(table)
        self.console.print(f"report: {comparison.report}", highlight=False, markup=False, soft_wrap=True)

    # ---- how many threads, how many steps

    def _choose_threads(self) -> None:
        """Small models on few cores often train faster on one thread, on a busy machine by far."""
        if self.threads is None:
            saved = self.store.read("plan.json").get("threads")
            usual = torch.get_num_threads()
            if isinstance(saved, int) and 1 <= saved <= max(usual, os.cpu_count() or 1):
                self.threads = saved  # timings of a continued comparison must stay comparable
            elif usual == 1:
                self.threads = 1
            else:
                task = next(iter(self.tasks.values()))
                seconds = {}
                for count in (usual, 1):
                    torch.set_num_threads(count)
                    seconds[count] = training.measure(task, Spec(BASELINE), self.settings, steps=7, seconds=1.0)[0]
                self.threads = 1 if seconds[1] < 0.95 * seconds[usual] else usual
        torch.set_num_threads(self.threads)

    def _plan(self, progress: Progress) -> None:
        bar = progress.add_task("measuring", total=len(self.tasks) * len(self.specs), note="the time of a step")
        for task in self.tasks.values():
            for spec in self.specs:
                progress.update(bar, note=f"{task.name}: {spec.label}")
                reason = spec.why_not(task.pattern, task.grid, self.settings.dim, self.settings.num_heads, task.context)
                if reason is None:
                    entry = _Entry(task, spec)
                    try:
                        entry.step_seconds, entry.evaluate_seconds = training.measure(task, spec, self.settings)
                        self.entries.append(entry)
                    except (ValueError, TypeError) as error:
                        reason = f"refuses this task: {_first_line(error)}"
                    except Exception as error:
                        self.failed.append(
                            {"mechanism": spec.label, "what": task.name, "reason": f"{type(error).__name__}: {error}"}
                        )
                if reason is not None:
                    self.skipped.append({"mechanism": spec.label, "what": task.name, "reason": reason})
                progress.advance(bar)
        progress.remove_task(bar)

    def _of(self, task: str) -> list[_Entry]:
        return [e for e in self.entries if e.task.name == task]

    def _plan_key(self) -> Any:
        return plain({"budget": self.budget, "seeds": len(self.seeds), "settings": self.settings.to_dict()})

    def _fix_steps(self, task: str) -> None:
        """Decide how many steps all runs of ``task`` take, when its first run is due.

        Not earlier: by then it is known how the runs so far compared with the time predicted for them, so that a
        machine that others slow down gets fewer steps instead of a budget overrun. An earlier call with the same
        budget has decided already.
        """
        saved = self.store.read("plan.json")
        known = saved.get("steps", {}) if saved.get("key") == self._plan_key() else {}
        if task in known:
            self.steps[task] = int(known[task])
            return
        reserved = sum(
            self._predict(e) * sum((e.task.name, e.spec.label, s) not in self.done for s in self.seeds)
            for e in self.entries
            if e.task.name in self.steps
        )
        left = self.budget - self.elapsed() - REPORT_SECONDS - reserved
        waiting = {e.task.name for e in self.entries} - set(self.steps)
        weights = {n: self.tasks[n].weight * len(self._of(n)) for n in waiting}
        seconds = max(0.0, left) * weights[task] / sum(weights.values()) / self._slowdown() / len(self.seeds)
        entries = self._of(task)
        fit = (seconds - sum(e.evaluate_seconds for e in entries)) / max(sum(e.step_seconds for e in entries), 1e-6)
        self.steps[task] = max(MIN_STEPS, min(int(fit), self.tasks[task].max_steps))
        plan = {"key": self._plan_key(), "threads": self.threads, "steps": {**known, **self.steps}}
        self._save_top("plan.json", plan)

    def _slowdown(self) -> float:
        """Seconds that the runs of this call took over the seconds predicted for them."""
        return min(20.0, max(0.5, self.spent / self.predicted)) if self.predicted > 0 else 1.0

    def _limit(self, first: bool) -> float:
        """Seconds after which no further run starts. The first seed may overdraw, as without it there is no result."""
        return max(1.5 * self.budget, self.budget + 60.0) if first else 1.1 * self.budget

    def _predict(self, entry: _Entry) -> float:
        """Seconds that one run is expected to take."""
        return self._slowdown() * (entry.step_seconds * self.steps[entry.task.name] + entry.evaluate_seconds)

    # ---- time and memory against N

    def _scale(self, progress: Progress) -> None:
        groups = [g for g in scaling.GROUPS if any(t.pattern == g for t in self.tasks.values())]
        selfs = [g for g in groups if g.endswith("self")]
        groups = selfs or groups  # cross patterns scale as their self forms do; time them only when alone
        bar = progress.add_task("scaling", total=None, note="")
        for group in groups:
            key = {
                "schema": SCHEMA,
                "specs": [s.full for s in self.specs],
                "pattern": group,
                "settings": self.settings.to_dict(),
                "sides": scaling.SIDES,
                "machine": machine(),
            }
            found = self.store.find("scaling", group, key)
            if found is None:
                records, skipped = scaling.measure_group(
                    self.specs,
                    group,
                    self.settings.dim,
                    self.settings.num_heads,
                    self.budget * SCALING_SHARE / len(groups),
                    progress=lambda note: progress.update(bar, note=note),
                )
                found = {"records": records, "skipped": skipped}
                self.store.save("scaling", group, key, found)
            else:
                self.reused += 1
            labels = {s.full: s.label for s in self.specs}
            self.scales += [{**r, "mechanism": labels[r["mechanism"]]} for r in found["records"]]
            for item in found["skipped"]:
                label = labels[item["mechanism"]]
                # What the traits forbid is listed by task already.
                if not item["reason"].startswith("trait "):
                    self.skipped.append({**item, "mechanism": label})
        progress.remove_task(bar)

    # ---- training

    def _key(self, entry: _Entry, seed: int) -> dict[str, Any]:
        task = entry.task
        return {
            "schema": SCHEMA,
            "attnlib": attnlib.__version__,
            "task": task.name,
            "data": task.data.fingerprint,
            "grid": task.grid,
            "context": task.context,
            "batch_size": task.batch_size,
            "learning_rate": task.learning_rate,
            "mechanism": entry.spec.name,
            "config": dict(entry.spec.config),
            "settings": self.settings.to_dict(),
            "seed": seed,
            "steps": self.steps[task.name],
        }

    def _name(self, entry: _Entry, seed: int) -> str:
        return f"{entry.task.name}-{entry.spec.full}-seed{seed}"

    def _jobs(self) -> Iterator[tuple[_Entry, int]]:
        """Seed by seed: when time runs out, every mechanism has lost the same."""
        for seed in self.seeds:
            for entry in self.entries:
                yield entry, seed

    def _train(self, progress: Progress) -> None:
        jobs = list(self._jobs())
        overall = progress.add_task("all runs", total=len(jobs), note="")
        current = progress.add_task("this run", total=1, note="")
        first = self.seeds[0]
        for number, (entry, seed) in enumerate(jobs, 1):
            progress.update(overall, note=f"{number} of {len(jobs)}")
            if entry.task.name not in self.steps:
                self._fix_steps(entry.task.name)
            key, name = self._key(entry, seed), self._name(entry, seed)
            record = self.store.find("runs", name, key)
            if record is not None:
                record["label"] = entry.spec.label
                self.reused += 1
            elif self.elapsed() + self._predict(entry) > self._limit(seed == first):
                self.left_out.append({"mechanism": entry.spec.label, "task": entry.task.name, "seed": seed})
            else:
                record = self._run(entry, seed, key, name, progress, current)
            if record is not None:
                self.runs.append(record)
                self.done.add((entry.task.name, entry.spec.label, seed))
            progress.advance(overall)

    def _run(
        self, entry: _Entry, seed: int, key: dict[str, Any], name: str, progress: Progress, bar: Any
    ) -> dict[str, Any] | None:
        steps = self.steps[entry.task.name]
        progress.reset(
            bar, total=steps, description="this run", note=f"{entry.task.name}: {entry.spec.label}, seed {seed}"
        )

        def show(taken: int, loss: float) -> None:
            if taken % 5 == 0 or taken == steps:
                note = f"{entry.task.name}: {entry.spec.label}, seed {seed}, loss {loss:.4g}"
                progress.update(bar, completed=taken, note=note)

        began = now()
        try:
            result = training.run(
                entry.task, entry.spec, seed, steps, self.settings, sample=seed == self.seeds[0], progress=show
            )
        except Exception as error:
            self.failed.append(
                {
                    "mechanism": entry.spec.label,
                    "what": f"{entry.task.name}, seed {seed}",
                    "reason": f"{type(error).__name__}: {_first_line(error)}",
                }
            )
            return None
        self.spent += now() - began
        self.predicted += entry.step_seconds * steps + entry.evaluate_seconds
        record = {
            "task": entry.task.name,
            "label": entry.spec.label,
            "seed": seed,
            "steps": steps,
            "key": key,
            **result,
        }
        self.store.save("runs", name, key, record)
        return record

    def _collect_finished(self) -> None:
        """Read every finished run of this comparison from its file, whatever this call had reached."""
        have = {(r["task"], r["label"], r["seed"]) for r in self.runs}
        for entry, seed in self._jobs():
            if entry.task.name in self.steps and (entry.task.name, entry.spec.label, seed) not in have:
                record = self.store.find("runs", self._name(entry, seed), self._key(entry, seed))
                if record is not None:
                    self.runs.append({**record, "label": entry.spec.label})

    # ---- results

    def results(self, finished: bool) -> dict[str, Any]:
        """Everything measured, as plain values."""
        return plain(
            {
                "schema": SCHEMA,
                "finished": finished,
                "machine": machine(),
                "budget_minutes": self.budget / 60,
                "minutes": self.elapsed() / 60,
                "reused": self.reused,
                "confidence": self.confidence,
                "seeds": self.seeds,
                "settings": self.settings.to_dict(),
                "baseline": self.baseline,
                "mechanisms": [s.to_dict() for s in self.specs],
                "steps": self.steps,
                "tasks": {name: task.describe() for name, task in self.tasks.items()},
                "summary": summarise(
                    self.runs, self.tasks, [s.label for s in self.specs], self.baseline, self.confidence
                ),
                "standing": standing(self.runs, self.tasks, [s.label for s in self.specs]),
                "scaling": self.scales,
                "scaling_summary": scaling.summarise(self.scales, self.baseline),
                "skipped": self.skipped,
                "failed": self.failed,
                "left_out": self.left_out,
                "damaged_files": self.store.broken,
                "runs": self.runs,
            }
        )

    def _save_top(self, name: str, value: Any) -> None:
        self._guard(name, lambda: write_json(self.store.out / name, value))

    def _guard(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            raise StorageError(
                f"could not write {name} ({error.strerror or error}): {self.store.count()} finished pieces are safe in "
                f"{self.store.out}. Make room and run the same command again: nothing is measured twice",
                [],
            ) from error

    def _write(self, finished: bool) -> Comparison:
        from . import report

        results = self.results(finished)
        json_path, html_path = self.store.out / "results.json", self.store.out / "report.html"
        self._save_top("results.json", results)
        self._guard("report.html", lambda: report.write(results, html_path))
        return Comparison(results, json_path, html_path)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --------------------------------------------------------------------------------------------------------------------


def _metric(runs: Sequence[dict[str, Any]], task: Task, label: str) -> dict[int, float]:
    return {
        r["seed"]: r["metrics"][task.metric]
        for r in runs
        if r["task"] == task.name and r["label"] == label and r["status"] == "ok"
    }


def summarise(
    runs: Sequence[dict[str, Any]],
    tasks: Mapping[str, Task],
    labels: Sequence[str],
    baseline: str | None,
    confidence: float,
) -> list[dict[str, Any]]:
    """One row per task and mechanism that ran: quality with its interval, difference to the baseline, time, size."""
    out = []
    for task in tasks.values():
        reference = _metric(runs, task, baseline) if baseline else {}
        for label in labels:
            mine = [r for r in runs if r["task"] == task.name and r["label"] == label]
            if not mine:
                continue
            values = _metric(runs, task, label)
            quality = stats.mean_interval(list(values.values()), confidence) if values else None
            gap = stats.paired_interval(values, reference, confidence) if label != baseline and values else None
            out.append(
                {
                    "task": task.name,
                    "mechanism": label,
                    "metric": task.metric,
                    "mean": quality.mean if quality else None,
                    "half_width": quality.half if quality else None,
                    "seeds": sorted(values),
                    "diverged": sum(r["status"] == "diverged" for r in mine),
                    "difference": gap._asdict() if gap else None,
                    "step_seconds": statistics.median(r["step_seconds"] for r in mine),
                    "parameters": mine[0]["parameters"],
                    "steps": mine[0]["steps"],
                }
            )
    return out


def standing(
    runs: Sequence[dict[str, Any]], tasks: Mapping[str, Task], labels: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Per pattern, each mechanism's mean z-score over the tasks of the pattern; compares only within this run.

    A mechanism that lacks one of the pattern's tasks is left out of that pattern, as its mean would be over others.
    """
    per_task: dict[str, dict[str, float]] = {}
    for task in tasks.values():
        means = {}
        for label in labels:
            values = _metric(runs, task, label)
            if values:
                means[label] = sum(values.values()) / len(values)
        if len(means) > 2:  # with two, every score is +1 or -1
            per_task[task.name] = stats.z_scores(means, task.higher_is_better)
    out: dict[str, dict[str, float]] = {}
    for pattern in dict.fromkeys(t.pattern for t in tasks.values()):
        scores = [per_task[t.name] for t in tasks.values() if t.pattern == pattern and t.name in per_task]
        if scores:
            shared = [label for label in labels if all(label in s for s in scores)]
            out[pattern] = {label: sum(s[label] for s in scores) / len(scores) for label in shared}
    return out
