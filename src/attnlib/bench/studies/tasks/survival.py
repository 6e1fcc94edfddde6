"""Survival: does BioFusionNet order patients better than Cox's linear model does, in repeated cross-validation?

Real genes and clinical numbers of 198 patients where scikit-survival is at hand (made-up ones otherwise, and the result
says so); slides are not, so that patches are made up: once nothing but noise, once with something of the outcome in a
quarter of them. Cox's model, with a ridge chosen within each training fold, reads genes and clinical numbers, and once
more with the mean of the patches beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....models.bags.biofusionnet import BioFusionNet, Survival
from ....models.losses import concordance, cox_loss
from ...clock import machine
from ...data.patients import Patients, load, patches, sources
from ...small import Progress, fit, interval, panels, parameters, picture, study, told
from ...stats import paired_interval

QUESTION = "Does BioFusionNet order patients by risk better than a Cox model that reads the same?"
NAMES = ("Cox", "Cox with patches", "BioFusionNet")
PARTS = {"noise": 0.0, "telling": 1.0}
RIDGES = (0.1, 0.3, 1.0)


def folds(event: Tensor, count: int, seed: int) -> list[Tensor]:
    """Numbers of patients in each of ``count`` parts, events spread evenly."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(event), generator=generator)
    order = order[event[order].argsort(stable=True)]
    return [order[i::count] for i in range(count)]


def cox(x: Tensor, time: Tensor, event: Tensor, ridge: float) -> Tensor:
    """(C,) coefficients of Cox's model: partial likelihood per event, and ``ridge`` times half the sum of squares."""
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")
    x = x.double()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cox_loss(x @ w, time, event) + 0.5 * ridge * w.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return w.detach()


def best_ridge(x: Tensor, time: Tensor, event: Tensor, seed: int) -> float:
    """The ridge of :data:`RIDGES` that orders held-out patients best, in five parts of these."""
    total = dict.fromkeys(RIDGES, 0.0)
    for test in folds(event, 5, seed):
        rest = torch.ones(len(event), dtype=torch.bool).index_fill(0, test, False)
        for ridge in RIDGES:
            risk = x[test].double() @ cox(x[rest], time[rest], event[rest], ridge)
            total[ridge] += float(concordance(risk, time[test], event[test]))
    return max(total, key=lambda r: total[r])


def network(in_chans: int, genes: int, clinical: int) -> BioFusionNet:
    """A small one."""
    small: dict[str, Any] = dict(num_heads=2, depth=1, ff_dim=16, hidden=(16, 8, 8, 4), drop=0.2)
    return BioFusionNet(in_chans, genes, clinical, **small)


def risks(
    name: str, known: Patients, seen: Tensor, train: Tensor, test: Tensor, steps: int, seed: int
) -> tuple[Tensor, int]:
    """What one of :data:`NAMES`, trained on some patients, says of others; and how many numbers it has."""
    target = Survival(known.time[train], known.event[train])
    if name != "BioFusionNet":
        x = torch.cat([known.genes, known.clinical] + ([seen.mean(1)] if "patches" in name else []), 1)
        x = (x - x[train].mean(0)) / x[train].std(0)
        w = cox(x[train], *target, best_ridge(x[train], *target, seed))
        return x[test].double() @ w, len(w)
    torch.manual_seed(seed)
    model = network(seen.shape[2], known.genes.shape[1], known.clinical.shape[1])
    ill, well = (train[known.event[train] == e] for e in (1, 0))

    def batch(generator: torch.Generator) -> Tensor:
        """A third of those with an event, and of those without."""
        return torch.cat(
            [some[torch.randperm(len(some), generator=generator)[: -(-len(some) // 3)]] for some in (ill, well)]
        )

    def loss(m: Any, some: Tensor) -> Tensor:
        target = Survival(known.time[some], known.event[some])
        found: Tensor = m.loss(m(seen[some], known.genes[some], known.clinical[some]), target)["cox"]
        return found

    fit(model, batch, loss, steps, lr=LR, seed=seed, weight_decay=DECAY)
    with torch.no_grad():
        return model.eval()(seen[test], known.genes[test], known.clinical[test]).double(), parameters(model)


LR, DECAY = 1e-2, 0.1


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    steps: int = 80,
    seeds: Sequence[int] = (1, 2, 3),
    parts: int = 4,
    count: int = 12,
    source: str | None = None,
) -> dict[str, Any]:
    """C-index of patients held out, once a repetition of the cross-validation.

    Args:
        progress: told of every run.
        keep: file to go on from; see :func:`attnlib.bench.small.study`.
        pictures: folder for ``tasks-survival-cpu.svg`` and ``.png``.
        steps: of training.
        seeds: of repetitions: how patients are parted, made-up patches, and weights.
        parts: of the cross-validation.
        count: patches a patient.
        source: of :data:`attnlib.bench.data.patients.SOURCES`; the first that is at hand by default, which is told.

    Returns:
        Plain values, for JSON; ``source`` says whose patients these are.
    """
    source = sources()[0] if source is None else source
    known = load(source)
    if progress is not None:
        progress(f"patients: {source}, {len(known.time)} with {int(known.event.sum())} events")
    result: dict[str, Any] = {
        "question": QUESTION, "machine": machine(), "source": source, "patients": len(known.time),
        "events": int(known.event.sum()), "steps": steps, "folds": parts, "patches": count, "parts": {},
    }  # fmt: skip
    for part, shown in PARTS.items():

        def run(name: str, seed: int, shown: float = shown) -> dict[str, float]:
            seen = patches(known, count, shown, seed)
            held, size = [], 0
            for i, test in enumerate(folds(known.event, parts, seed)):
                train = torch.ones(len(known.time), dtype=torch.bool).index_fill(0, test, False).nonzero().flatten()
                risk, size = risks(name, known, seen, train, test, steps, 100 * seed + i)
                held.append(float(concordance(risk, known.time[test], known.event[test])))
            return {"c-index": 100 * sum(held) / len(held), "parameters": size}

        found = study(NAMES, run, "c-index", "Cox", seeds, progress, keep, (part, source, steps, parts, count))
        by = {n: {r["seed"]: r["c-index"] for r in found["runs"] if r["name"] == n} for n in NAMES}
        gap = paired_interval(by["BioFusionNet"], by["Cox with patches"])
        found["against Cox with patches"] = None if gap is None else interval(gap)
        result["parts"][part] = found
    if pictures is not None:
        curves = {
            name: [
                (part, row["c-index"]["mean"], row["c-index"]["half"])
                for part, found in result["parts"].items()
                for row in found["rows"]
                if row["name"] == name
            ]
            for name in NAMES
        }
        path = Path(pictures) / "tasks-survival-cpu.svg"
        picture(path, curves, "patches", "C-index, %", "patients in order", (), ("Cox",))
        _draw(Path(pictures) / "tasks-survival-cpu.png", known, seeds[0], steps, parts, count)
    return result


def kaplan_meier(time: Tensor, event: Tensor) -> tuple[Tensor, Tensor]:
    """Times of events, from 0 on, and the share that has had none until then.

    >>> kaplan_meier(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))[1].tolist()
    [1.0, 0.5, 0.0]
    """
    at = time[event.bool()].unique()
    left = 1 - torch.stack([((time == t) & event.bool()).sum() / (time >= t).sum() for t in at])
    return torch.cat([at.new_zeros(1), at]), torch.cat([left.new_ones(1), left.cumprod(0)])


def _draw(path: Path, known: Patients, seed: int, steps: int, parts: int, count: int) -> None:
    """How long patients held out went without the event, those of high risk and those of low, by model."""
    seen = patches(known, count, PARTS["telling"], seed)
    names = NAMES
    with panels(path, ["without the event"], list(names), (2.2, 1.8)) as axes:
        for axis, name in zip(axes[0], names, strict=True):
            high = torch.zeros(len(known.time), dtype=torch.bool)
            for i, test in enumerate(folds(known.event, parts, seed)):
                train = torch.ones(len(known.time), dtype=torch.bool).index_fill(0, test, False).nonzero().flatten()
                risk, _ = risks(name, known, seen, train, test, steps, 100 * seed + i)
                high[test] = risk > risk.median()
            for label, some, colour in (("high risk", high, "#c44e52"), ("low risk", ~high, "#4c72b0")):
                at, left = kaplan_meier(known.time[some], known.event[some])
                axis.step(at.numpy(), left.numpy(), where="post", color=colour, label=label, linewidth=1.2)
            axis.set_ylim(0, 1.02)
            axis.set_xlabel("time", fontsize=7)
        axes[0][0].legend(fontsize=6, frameon=False, loc="lower left")


def table(result: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    lines = ["| patches | model | C-index, % | against Cox | parameters |", "|---|---|---|---|---|"]
    for part, found in result["parts"].items():
        for row in found["rows"]:
            gap = "" if row["name"] == "Cox" else f"{row['against']['mean']:+.1f} ± {row['against']['half']:.1f}"
            cells = [part, row["name"], told(row, "c-index"), gap, f"{row['parameters']['mean']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
