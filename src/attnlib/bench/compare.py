"""Train and time attention mechanisms side by side on real data, everything else equal.

``compare`` makes one small model per mechanism, task and seed, gives all of them the same number of steps on any
machine, keeps every finished run in its own file, and writes ``results.json`` and ``report.html``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import attnlib

from ..checks import check_choice, check_int, check_real
from . import stats, training
from .clock import limit_threads, machine, now
from .data.files import resolve
from .data.tasks import TASKS, Task, expand, task_class
from .specs import CONTROL, Spec, shorten
from .speed import scaling
from .store import StorageError, Store, plain, write_json
from .training import Settings
from .workers import at_once, check_workers

SCHEMA = 2
BASELINE = "softmax-attention"


@dataclass(frozen=True)
class Preset:
    """A ready-made comparison: the same work on any machine. Mechanisms that the registry does not have are left out.

    Args:
        mechanisms: names with settings, as :meth:`Spec.parse` reads them.
        tasks: names or patterns.
        effort: every run takes so many times the steps of its task.
        seeds: number of seeds.
        what: one sentence.
        settings: of the models.
        sides: square roots of the numbers of tokens at which time and memory are measured.
    """

    mechanisms: tuple[str, ...]
    tasks: tuple[str, ...] = tuple(TASKS)
    effort: float = 1.0
    seeds: int = 3
    what: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    sides: tuple[int, ...] = scaling.SIDES

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
    "fused-neighborhood-attention,kernel_size=7",
    "deformable-attention",
)

PRESETS: dict[str, Preset] = {
    "demo": Preset(
        _MATTER,
        tasks=("text", "digits", "upsample", "forecast"),
        seeds=5,
        what="seven mechanisms, one task for each of the four patterns, in minutes",
        settings={"dim": 48},
        sides=(8, 16, 24, 32, 48),
    ),
    "quick": Preset(
        _MATTER[:3],
        tasks=("text", "digits"),
        effort=0.5,
        seeds=2,
        what="a first look",
        settings={"dim": 48},
        sides=(8, 16, 24),
    ),
    "long": Preset((*_MATTER, "biformer,n_win=4,topk=4"), effort=8.0, seeds=5, what="all tasks, with time to learn"),
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
    out: str | Path = "attnlib-compare",
    data: str | Path | Mapping[str, str | Path] | None = None,
    *,
    steps: int | Mapping[str, int] | None = None,
    seeds: int | Sequence[int] | None = None,
    preset: str | None = None,
    settings: Settings | None = None,
    device: str | torch.device | None = None,
    baseline: str | None = BASELINE,
    control: bool = True,
    scale: bool = True,
    budget_minutes: float | None = None,
    threads: int = 1,
    workers: int = 1,
    ray: bool = False,
    confidence: float = 0.95,
    console: Console | None = None,
    quiet: bool = False,
) -> Comparison:
    """Compare mechanisms on real data.

    All runs of a task take the same number of steps, which does not depend on the machine. Runs go seed by seed, so
    that every task has its first seed before any has a second. The same call in the same folder continues: finished
    runs are read, not repeated.

    Args:
        mechanisms: ``"name"``, ``"name,key=value"``, ``"module:Class"`` or ``(name, {key: value})``.
        tasks: of ``text``, ``digits``, ``superres``, ``upsample``, ``forecast``, or patterns; all when ``None``.
        out: folder for runs, ``results.json`` and ``report.html``.
        data: a text file, a folder of images or a CSV file instead of the packaged data, or ``{task: path}``.
        steps: optimiser steps of every run, or ``{task: steps}``; each task's own number when ``None``.
        seeds: how many, or which.
        preset: one of :data:`PRESETS`; other arguments override it.
        settings: width, depth, heads and optimiser, the same for all.
        device: where models are trained and timed; that of ``settings`` when ``None``.
        baseline: what efficiency lengths and differences refer to; added when missing. ``None`` for none.
        control: also train a model whose blocks mix nothing, which every number is held against.
        scale: also measure time and memory against N.
        budget_minutes: after so many minutes no further run starts; what is missing is said, and the same call goes
            on from there. It never changes the steps.
        threads: CPU threads of every run. One is fastest for models this small, and numbers do not depend on cores.
        workers: runs at a time, each in a process of its own when more than one, on a core of its own; at most as many
            as cores. What is only timed is timed alone, before.
        ray: the runs go to a Ray cluster instead (extra ``ray``): the one at ``RAY_ADDRESS``, or ``workers`` processes
            here. They need the data at the same paths.
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
        check_choice("preset", preset, sorted(PRESETS))
        chosen = PRESETS[preset]
    task_names = expand(tasks if tasks is not None else (chosen.tasks if chosen else None))
    specs = _specs(mechanisms, chosen, baseline, control)
    if budget_minutes is not None:
        check_real("budget_minutes", budget_minutes, above=0)
    seed_list = _seeds(seeds if seeds is not None else (chosen.seeds if chosen else 3))
    if settings is None:
        settings = Settings(**(chosen.settings if chosen else {}))
    if device is not None:
        settings = replace(settings, device=str(_device(device)))
    check_real("confidence", confidence, above=0, below=1)
    check_int("threads", threads, least=1)
    check_workers(workers, ray)
    paths = resolve(data, {n: task_class(n).kind for n in task_names})
    if data is not None and tasks is None and not isinstance(data, Mapping):
        task_names = [n for n in task_names if n in paths]
    steps = _steps(steps, task_names, chosen.effort if chosen else 1.0)
    _needs_bench_extra()
    store = Store(out)
    console = console or Console(quiet=quiet)
    with limit_threads(threads):
        session = _Session(
            store=store,
            console=console,
            specs=specs,
            tasks={name: task_class(name)(paths.get(name)) for name in task_names},
            paths=paths,
            seeds=seed_list,
            steps=steps,
            settings=settings,
            budget=None if budget_minutes is None else 60 * budget_minutes,
            baseline=baseline,
            sides=(chosen.sides if chosen else scaling.SIDES) if scale else (),
            confidence=confidence,
            threads=threads,
            workers=workers,
            ray=ray,
        )
        return session.go(quiet)


def _device(device: str | torch.device) -> torch.device:
    """The device, when there is one; raises ``ValueError`` before anything is trained."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={str(device)!r} is not possible here: {_first_line(error)}") from error
    if found.type == "meta":
        raise ValueError("device='meta' is not possible: nothing is computed there; give a device such as 'cpu'")
    return found


def _steps(given: int | Mapping[str, int] | None, tasks: Sequence[str], effort: float) -> dict[str, int]:
    usual = {name: max(1, round(effort * task_class(name).steps)) for name in tasks}
    if given is None:
        return usual
    if isinstance(given, Mapping):
        for name, value in given.items():
            check_choice("a task of steps", name, list(tasks))
            check_int(f"steps of {name}", value, least=1)
        return {**usual, **given}
    check_int("steps", given, least=1)
    return dict.fromkeys(tasks, given)


def _specs(
    given: Sequence[str | Spec | tuple[str, Mapping[str, Any]]] | None,
    preset: Preset | None,
    baseline: str | None,
    control: bool,
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
    if control:
        unique[CONTROL] = Spec(CONTROL)
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


# --------------------------------------------------------------------------------------------------------------------
# One run, here or in a process of its own

_tasks: dict[tuple[str, Path | None], Task] = {}


def _work(
    task: str, path: Path | None, spec: Spec, seed: int, steps: int, settings: Settings, sample: bool
) -> dict[str, Any]:
    """:func:`training.run` in a process of its own; failures come back as values."""
    if (task, path) not in _tasks:
        _tasks[task, path] = task_class(task)(path)
    return _attempt(_tasks[task, path], spec, seed, steps, settings, sample, lambda taken, loss: None)


def _attempt(
    task: Task, spec: Spec, seed: int, steps: int, settings: Settings, sample: bool, show: Callable[[int, float], None]
) -> dict[str, Any]:
    try:
        return training.run(task, spec, seed, steps, settings, sample=sample, progress=show)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {_first_line(error)}"}


@dataclass
class _Job:
    """A run that is due."""

    number: int
    entry: _Entry
    seed: int
    key: dict[str, Any]
    name: str
    seconds: float  # that it is expected to take
    taken: int = 0


class _Session:
    """One call of :func:`compare`."""

    def __init__(
        self,
        *,
        store: Store,
        console: Console,
        specs: list[Spec],
        tasks: dict[str, Task],
        paths: dict[str, Path],
        seeds: list[int],
        steps: dict[str, int],
        settings: Settings,
        budget: float | None,
        baseline: str | None,
        sides: Sequence[int],
        confidence: float,
        threads: int,
        workers: int,
        ray: bool,
    ) -> None:
        self.store, self.console, self.specs, self.seeds = store, console, specs, seeds
        self.tasks, self.paths, self.steps = tasks, paths, steps
        self.settings, self.budget, self.sides = settings, budget, sides
        self.confidence, self.threads, self.workers, self.ray = confidence, threads, workers, ray
        wanted = Spec.parse(baseline).full if baseline is not None else None
        self.baseline = next((s.label for s in specs if s.full == wanted), None)
        self.control = next((s.label for s in specs if s.name == CONTROL), None)
        self.began = now()
        self.entries: list[_Entry] = []
        self.skipped: list[dict[str, str]] = []
        self.failed: list[dict[str, str]] = []
        self.left_out: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        self.scales: list[dict[str, Any]] = []
        self.reused = 0

    def elapsed(self) -> float:
        return now() - self.began

    # ---- the whole

    def go(self, quiet: bool) -> Comparison:
        progress = Progress(
            TextColumn("[bold]{task.description:<9}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=quiet or self.console.quiet,
            transient=True,
        )
        try:
            with progress:
                self._plan(progress)
                if self.sides:
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
        """A table per task, best first, and where the report is."""
        from .report import overview

        results = comparison.results
        for task in results["tasks"].values():
            table, notes = overview(results, task)
            unit = "" if task["unit"] in task["metric"] else f" in {task['unit']}"
            head = f"[bold]{escape(task['title'])}[/]: {escape(task['metric'] + unit)}, "
            head += f"{'higher' if task['higher_is_better'] else 'lower'} is better"
            self.console.print(head, highlight=False)
            shown = Table(box=None, pad_edge=False)
            for name in table[0]:
                shown.add_column(name, justify="left" if name == "mechanism" else "right", no_wrap=True)
            for row in table:
                cells = [escape(cell) for cell in row.values()]
                shown.add_row(*cells, style="dim" if row["mechanism"] == self.control else None)
            self.console.print(shown)
            for note in notes:
                self.console.print(f"[dim]{escape(note)}[/]", highlight=False)
            self.console.print()
        if results["left_out"]:
            self.console.print(
                f"[bold]{len(results['left_out'])} runs were not started[/] within {self.budget or 0:.0f} s; "
                "run the same command again: it goes on from there",
                highlight=False,
            )
        self.console.print(f"report: {comparison.report}", highlight=False, markup=False, soft_wrap=True)

    # ---- what can run, and how long it will take

    def _plan(self, progress: Progress) -> None:
        bar = progress.add_task("planning", total=len(self.tasks) * len(self.specs), note="")
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

    def _predict(self, entry: _Entry) -> float:
        """Seconds that one run is expected to take."""
        return entry.step_seconds * self.steps[entry.task.name] + entry.evaluate_seconds

    # ---- time and memory against N

    def _scale(self, progress: Progress) -> None:
        groups = [g for g in scaling.GROUPS if any(t.pattern == g for t in self.tasks.values())]
        selfs = [g for g in groups if g.endswith("self")]
        groups = selfs or groups  # cross patterns scale as their self forms do; time them only when alone
        specs = [s for s in self.specs if s.name != CONTROL]
        bar = progress.add_task("scaling", total=len(groups) * len(self.sides), note="")
        for group in groups:
            key = {
                "schema": SCHEMA,
                "specs": [s.full for s in specs],
                "pattern": group,
                "settings": self.settings.to_dict(),
                "sides": list(self.sides),
                "machine": {k: v for k, v in machine(self.settings.device).items() if k != "load"},
            }
            found = self.store.find("scaling", group, key)
            if found is None:
                records, skipped = scaling.measure_group(
                    specs,
                    group,
                    self.settings.dim,
                    self.settings.num_heads,
                    sides=self.sides,
                    device=self.settings.device,
                    progress=lambda note: progress.update(bar, note=note),
                    finished=lambda: progress.advance(bar),
                )
                found = {"records": records, "skipped": skipped}
                self.store.save("scaling", group, key, found)
            else:
                self.reused += 1
                progress.advance(bar, len(self.sides))
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

    def _order(self) -> Iterator[tuple[_Entry, int]]:
        """Seed by seed: no task gets a second seed before all have their first."""
        for seed in self.seeds:
            for entry in self.entries:
                yield entry, seed

    def _train(self, progress: Progress) -> None:
        due: list[_Job] = []
        for entry, seed in self._order():
            key, name = self._key(entry, seed), self._name(entry, seed)
            record = self.store.find("runs", name, key)
            if record is not None:
                self.reused += 1
                self.runs.append({**record, "label": entry.spec.label})
            else:
                due.append(_Job(len(due), entry, seed, key, name, self._predict(entry)))
        total = sum(job.seconds for job in due)
        bar = progress.add_task("training", total=max(total, 1e-9), note="")
        counts = f"{len(self.runs)} runs kept, " if self.reused else ""
        state = {"done": 0.0, "runs": 0}
        started = now()

        def show(running: Sequence[_Job]) -> None:
            # What a running job has done counts by its steps; what remains follows from the pace so far.
            part = sum(j.seconds * j.taken / self.steps[j.entry.task.name] for j in running)
            done = state["done"] + part
            spent = now() - started
            left = spent * (total - done) / done if done > 0.02 * total else (total - done) / self.workers
            note = f"{counts}{state['runs']} of {len(due)} runs, {_minutes(left)} left"
            progress.update(bar, completed=done, note=note)

        def finish(job: _Job, result: dict[str, Any]) -> None:
            state["done"] += job.seconds
            state["runs"] += 1
            self._keep(job, result)

        run = self._in_processes if self.ray or (self.workers > 1 and len(due) > 1) else self._here
        run(due, show, finish)
        # In the order of seeds, tasks and mechanisms, whoever finished first.
        place = {(e.task.name, e.spec.label, s): i for i, (e, s) in enumerate(self._order())}
        self.runs.sort(key=lambda r: place[r["task"], r["label"], r["seed"]])

    def _late(self) -> bool:
        return self.budget is not None and self.elapsed() > self.budget

    def _leave(self, job: _Job) -> None:
        self.left_out.append({"mechanism": job.entry.spec.label, "task": job.entry.task.name, "seed": job.seed})

    def _arguments(self, job: _Job) -> tuple[int, int, Settings, bool]:
        return job.seed, self.steps[job.entry.task.name], self.settings, job.seed == self.seeds[0]

    def _here(
        self, due: list[_Job], show: Callable[[Sequence[_Job]], None], finish: Callable[[_Job, dict[str, Any]], None]
    ) -> None:
        for job in due:
            if self._late():
                self._leave(job)
                continue

            def advance(taken: int, loss: float, job: _Job = job) -> None:
                job.taken = taken
                if taken % 5 == 0:
                    show([job])

            finish(job, _attempt(job.entry.task, job.entry.spec, *self._arguments(job), advance))
            show([])

    def _in_processes(
        self, due: list[_Job], show: Callable[[Sequence[_Job]], None], finish: Callable[[_Job, dict[str, Any]], None]
    ) -> None:
        started: list[_Job] = []

        def calls() -> Iterator[tuple[Any, ...]]:
            for job in due:
                if self._late():
                    self._leave(job)
                    continue
                started.append(job)
                yield job.entry.task.name, self.paths.get(job.entry.task.name), job.entry.spec, *self._arguments(job)

        for number, result in at_once(_work, calls(), self.workers, threads=self.threads, ray=self.ray):
            finish(started[number], result)
            show([])

    def _keep(self, job: _Job, result: dict[str, Any]) -> None:
        entry = job.entry
        if "error" in result:
            what = f"{entry.task.name}, seed {job.seed}"
            self.failed.append({"mechanism": entry.spec.label, "what": what, "reason": result["error"]})
            return
        record = {
            "task": entry.task.name,
            "label": entry.spec.label,
            "seed": job.seed,
            "steps": self.steps[entry.task.name],
            "key": job.key,
            **result,
        }
        self.store.save("runs", job.name, job.key, record)
        self.runs.append(record)

    def _collect_finished(self) -> None:
        """Read every finished run of this comparison from its file, whatever this call had reached."""
        have = {(r["task"], r["label"], r["seed"]) for r in self.runs}
        for entry, seed in self._order():
            if (entry.task.name, entry.spec.label, seed) not in have:
                record = self.store.find("runs", self._name(entry, seed), self._key(entry, seed))
                if record is not None:
                    self.runs.append({**record, "label": entry.spec.label})

    # ---- results

    def results(self, finished: bool) -> dict[str, Any]:
        """Everything measured, as plain values."""
        labels = [s.label for s in self.specs]
        return plain(
            {
                "schema": SCHEMA,
                "finished": finished and not self.left_out,
                "machine": machine(self.settings.device),
                "budget_minutes": None if self.budget is None else self.budget / 60,
                "minutes": self.elapsed() / 60,
                "workers": self.workers,
                "reused": self.reused,
                "confidence": self.confidence,
                "seeds": self.seeds,
                "settings": self.settings.to_dict(),
                "baseline": self.baseline,
                "control": self.control,
                "mechanisms": [s.to_dict() for s in self.specs],
                "steps": self.steps,
                "tasks": {name: task.describe() for name, task in self.tasks.items()},
                "summary": summarise(self.runs, self.tasks, labels, self.baseline, self.control, self.confidence),
                "pairs": pairs(self.runs, self.tasks, [x for x in labels if x != self.control], self.confidence),
                "standing": standing(self.runs, self.tasks, [x for x in labels if x != self.control]),
                "scaling": self.scales,
                "scaling_summary": scaling.summarise(self.scales, self.baseline),
                "skipped": self.skipped,
                "failed": self.failed,
                "left_out": self.left_out,
                "damaged_files": self.store.broken,
                "runs": self.runs,
            }
        )

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
        self._guard("results.json", lambda: write_json(json_path, results))
        self._guard("report.html", lambda: report.write(results, html_path))
        return Comparison(results, json_path, html_path)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _minutes(seconds: float) -> str:
    """
    >>> _minutes(75), _minutes(20)
    ('1:15', '0:20')
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# --------------------------------------------------------------------------------------------------------------------


def _metric(runs: Sequence[dict[str, Any]], task: Task, label: str | None) -> dict[int, float]:
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
    control: str | None,
    confidence: float,
) -> list[dict[str, Any]]:
    """One row per task and mechanism that ran: quality with its interval, time, size, and differences paired by seed.

    ``difference`` is to the baseline; ``gain`` is to the model without a mechanism, positive when better, and
    ``no_better`` says that its interval does not lie above zero.
    """
    out = []
    for task in tasks.values():
        reference = _metric(runs, task, baseline)
        bare = _metric(runs, task, control)
        for label in labels:
            mine = [r for r in runs if r["task"] == task.name and r["label"] == label]
            if not mine:
                continue
            values = _metric(runs, task, label)
            quality = stats.mean_interval(list(values.values()), confidence) if values else None
            gap = stats.paired_interval(values, reference, confidence) if label != baseline else None
            gain = None
            if label != control and bare:
                sign = 1.0 if task.higher_is_better else -1.0
                better = {seed: sign * v for seed, v in values.items()}
                gain = stats.paired_interval(better, {seed: sign * v for seed, v in bare.items()}, confidence)
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
                    "gain": gain._asdict() if gain else None,
                    # One seed has no interval: then the sign has to do.
                    "no_better": label != control and bool(bare) and not (gain is not None and gain.low > 0),
                    "step_seconds": statistics.median(r["step_seconds"] for r in mine),
                    "parameters": mine[0]["parameters"],
                    "steps": mine[0]["steps"],
                }
            )
    return out


def pairs(
    runs: Sequence[dict[str, Any]], tasks: Mapping[str, Task], labels: Sequence[str], confidence: float
) -> list[dict[str, Any]]:
    """Every pair of mechanisms of every task: the difference paired by seed, best first, and whether it is separated.

    Separated means that it survives Holm's correction over all pairs of the task, so that among many pairs without a
    difference one is found with a probability of at most ``1 - confidence``.
    """
    out = []
    for task in tasks.values():
        found: list[dict[str, Any]] = []
        for i, a in enumerate(labels):
            for b in labels[i + 1 :]:
                test = stats.paired_test(_metric(runs, task, a), _metric(runs, task, b))
                if test is None:
                    continue
                difference, p = test
                first, second = (a, b) if (difference > 0) == task.higher_is_better else (b, a)
                found.append({"task": task.name, "better": first, "worse": second, "by": abs(difference), "p": p})
        for row, holds in zip(found, stats.holm([row["p"] for row in found], 1 - confidence), strict=True):
            out.append({**row, "separated": holds})
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
