"""Judges whose verdict can be checked, because what they judge is planted.

``attnlib bench --suite multimodal-models-judges --out benchmarks/results`` writes ``multimodal-models-judges-cpu.json``
and its picture. Nobody here is a trained multimodal model: answerers speak from the truth of generated scenes, less a
planted blindness and one answer in ten that is guessed; systems invent at known rates; a reader of toy documents has
two heads that disagree.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...clock import machine
from ...exams import agnosia, crosscheck, pca
from ...exams.consistency import Box, Sample, compare
from ...small import Progress, picture, study
from ._documents import Reader, answers, documents, tune

QUESTION = "Do exams tell planted blindness apart, rank inventors, locate errors, and see answers that readings belie?"

#: What every answerer is blind to, and the kinds of questions that must show it.
BLIND: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sees all": ((), ()), "colour-blind": (("colour",), ("attribute",)),
    "place-blind": (("place",), ("identification", "location", "relation")), "count-blind": (("count",), ("count",)),
}  # fmt: skip
#: Shares of facts whose difficulty and wrong answer are common.
SHARED = (0.0, 0.25, 0.5, 0.75, 1.0)
METHODS = ("crosscheck", "own family out", "selfcheck")


@functools.lru_cache(maxsize=8)
def _exam(scenes: int, per_kind: int, seed: int) -> tuple[list[agnosia.SceneGraph], list[agnosia.Question]]:
    graphs = agnosia.painted(scenes, seed=100 + seed)
    made = agnosia.questions(graphs, agnosia.PAINTED, per_kind=None, seed=seed)
    few = [q for kind in agnosia.KINDS for q in [m for m in made if m.groups["kind"] == kind][:per_kind]]
    return graphs, few


@functools.lru_cache(maxsize=64)
def _report(name: str, scenes: int, per_kind: int, lapses: float, seed: int) -> agnosia.Report:
    graphs, asked = _exam(scenes, per_kind, seed)
    return agnosia.examine(asked, agnosia.answerer(graphs, BLIND[name][0], lapses), seed=seed)


def diagnosed(name: str, seed: int, scenes: int, per_kind: int, lapses: float) -> dict[str, float]:
    """Agnosia of an answerer by kind, and whether its weaknesses against who sees all are those that were planted."""
    report = _report(name, scenes, per_kind, lapses, seed)
    # Another run of who sees all: its lapses fall elsewhere.
    graphs, asked = _exam(scenes, per_kind, seed)
    clear = agnosia.examine(asked, agnosia.answerer(graphs, (), lapses), seed=seed + 1000)
    found, planted = set(report.weaknesses(clear)), set(BLIND[name][1])
    return {
        "diagnosed": float(found == planted), "missed": float(len(planted - found)),
        "false alarms": float(len(found - planted)), "questions": float(len(report.answers.answers)),
        **{f"agnosia, {kind}": value for kind, value in report.degrees().items()},
    }  # fmt: skip


def rank_correlation(shared: float, method: str, seed: int, systems: int, queries: int) -> dict[str, float]:
    """Spearman's correlation of scores with true error rates, for systems that invent together; 0 where all are equal.

    ``"own family out"`` does without the evidence of a third of them, which does not help where all share.
    """
    rates = {f"m{i}": float(r) for i, r in enumerate(np.linspace(0.05, 0.6, systems))}
    families = {m: f"f{i % 3}" for i, m in enumerate(rates)}
    world = crosscheck.simulate(rates, queries, shared=shared, seed=seed)
    evidence = crosscheck.explicit(world.responses, world.passages, crosscheck.same_claim)
    if method == "selfcheck":
        own = [
            [np.mean(crosscheck.selfcheck(t, p, crosscheck.same_claim))
             for t, p in zip(world.responses[m], world.passages[m], strict=True)]
            for m in rates
        ]  # fmt: skip
        found = crosscheck.Ranking(tuple(rates), np.asarray(own))
    else:
        found = evidence.rank(families=families if method == "own family out" else None)
    value = found.correlation(world.errors, draws=1).value
    return {"spearman": 0.0 if np.isnan(value) else value}


def family_correlation(method: str, seed: int, queries: int) -> dict[str, float]:
    """Share of pairs in right order of three careful systems and five clones of a careless one that invent together."""
    rates = {"good1": 0.1, "good2": 0.15, "good3": 0.2, **{f"clone{i}": 0.5 for i in range(5)}}
    families = {m: "clones" if m.startswith("clone") else m for m in rates}
    world = crosscheck.simulate(rates, queries, shared=0.95, families=families, seed=seed)
    evidence = crosscheck.explicit(world.responses, world.passages, crosscheck.same_claim)
    scores = evidence.rank(families=families if method == "own family out" else None).scores
    good, clones = ([s for m, s in scores.items() if (families[m] == "clones") == c] for c in (False, True))
    return {"clones behind": float(np.mean([a < b for a in good for b in clones]))}


def located(step: str, seed: int, count: int) -> dict[str, float]:
    """Share of errors planted in one step that a judge of rules locates there, and of answers whose genuine score is
    the planted one."""
    cases = pca.own_instances(count, seed=seed)
    wrong = np.random.default_rng([seed, pca.STEPS.index(step)]).random(count) < 0.4
    said = [
        pca.oracle(c, seen=not (w and step == "perception"), reasoned=not (w and step != "action"), acted=not w)
        for c, w in zip(cases, wrong, strict=True)
    ]
    report = pca.score(cases, said, pca.rule_judge(cases))
    return {"located": report.errors[step] / max(1, int(wrong.sum())), "genuine": report.genuine.share,
            "planted": float(1 - wrong.mean())}  # fmt: skip


def _first(seed: int, steps: int) -> Reader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Reader()
    g = torch.Generator().manual_seed(seed)
    tune(model, steps, g, ("answer",), 0.9, 3e-3)  # where a key tells its value, answering learns the habit
    tune(model, steps, g, ("read", "answer"), 0.9, 3e-3)
    return model


@functools.lru_cache(maxsize=8)
def _before(seed: int, steps: int) -> Reader:
    return _first(seed, steps)


def conflicts(name: str, seed: int, steps: int, tuned: int, count: int) -> dict[str, float]:
    """Consistency and both accuracies of the reader on documents without habits, before and after tuning on 600."""
    model = copy.deepcopy(_before(seed, steps))
    few = documents(600, torch.Generator().manual_seed(seed + 7), 0.0)
    tasks = {"separate tasks": ("answer", "read"), "with connector": ("answer", "read", "connect")}
    if name in tasks:
        tune(model, tuned, torch.Generator().manual_seed(seed + 9), tasks[name], few, 1e-3)
    g = torch.Generator().manual_seed(seed + 1000)
    said, read, true = answers(model, documents(count, g, 0.0), g)
    box = Box(0, 0, 1, 1, "unit")
    samples = [Sample(str(i), "What stands there?", f"value {v}", box) for i, v in enumerate(true.tolist())]
    cognition, perception = ({str(i): f"value {v}" for i, v in enumerate(t.tolist())} for t in (said, read))
    report = compare(samples, cognition, perception, right=lambda text, truth: text == truth)
    return {w: getattr(report, w) for w in ("consistency", "cognition", "perception")}


def measure(
    progress: Progress | None = None,
    keep: str | Path | None = None,
    pictures: str | Path | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    scenes: int = 600,
    per_kind: int = 100,
    lapses: float = 0.1,
    systems: int = 9,
    queries: int = 40,
    cases: int = 100,
    steps: int = 300,
    tuned: int = 90,
    count: int = 2000,
) -> dict[str, Any]:
    """Every exam on what was planted.

    Args:
        progress: told of every piece.
        keep: file to go on from.
        pictures: folder for ``multimodal-models-judges-cpu.svg``.
        seeds: of scenes, systems and readers.
        scenes: of an exam; ``per_kind`` questions of each kind at most.
        lapses: share of answers that are guessed by whoever answers.
        systems, queries: of a ranking.
        cases: decisions of a seed.
        steps, tuned: updates of the reader before and while it is tuned; ``count`` documents to test it.

    Returns:
        Plain values, for JSON: for every exam, rows with intervals over seeds and paired differences.
    """
    given: dict[str, Any] = {"seeds": seeds, "progress": progress, "keep": keep}
    result: dict[str, Any] = {"question": QUESTION, "scenes": scenes * len(seeds)}
    result["emma"] = study(
        list(BLIND), lambda name, seed: diagnosed(name, seed, scenes, per_kind, lapses), "diagnosed", "sees all",
        key=["emma", scenes, per_kind, lapses], **given,
    )  # fmt: skip
    names = {f"{method}, shared {s:g}": (s, method) for method in METHODS for s in SHARED}
    result["crosscheck"] = study(
        list(names), lambda name, seed: rank_correlation(*names[name], seed, systems, queries), "spearman",
        "crosscheck, shared 0", key=["crosscheck", systems, queries], **given,
    )  # fmt: skip
    result["clones"] = study(
        METHODS[:2], lambda name, seed: family_correlation(name, seed, queries), "clones behind", METHODS[0],
        key=["clones", queries], **given,
    )  # fmt: skip
    result["pca"] = study(
        list(pca.STEPS), lambda name, seed: located(name, seed, cases), "located", key=["pca", cases], **given
    )
    result["consistency"] = study(
        ["before", "separate tasks", "with connector"],
        lambda name, seed: conflicts(name, seed, steps, tuned, count), "consistency", "before",
        key=["consistency", steps, tuned, count], **given,
    )  # fmt: skip
    if pictures is not None:
        rows = {r["name"]: r["spearman"] for r in result["crosscheck"]["rows"]}
        curves = {
            method: [(s, *(rows[f"{method}, shared {s:g}"][k] for k in ("mean", "half"))) for s in SHARED]
            for method in METHODS
        }
        picture(
            Path(pictures) / "multimodal-models-judges-cpu.svg", curves, "share of facts with common errors",
            "rank correlation with true errors", "Ranking systems by what others do not repeat",
        )  # fmt: skip
    return {**result, "machine": machine()}
