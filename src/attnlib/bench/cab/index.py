"""The compositional index: scores in units of what the published efficient attentions differ by.

``CI = mean over tasks of mean over metrics of sign (x - mu) / sigma``, with fixed ``mu`` and ``sigma`` for every
metric, so that a new mechanism changes nobody else's score. The numbers are those of the published script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...checks import check_choice, check_real, check_type

PATTERNS = ("noncausal-self", "causal-self", "noncausal-cross", "causal-cross")


class Metric(NamedTuple):
    """One column of the index.

    Args:
        task: ``TTS``, ``Sum``, ``SR``, ``MLM``, ``LM``, ``PCC`` or ``LSTF``.
        name: of the metric; with the backbone or the data where a task has several.
        mean, deviation: over the published efficient attentions.
        higher: whether more is better.
    """

    task: str
    name: str
    mean: float
    deviation: float
    higher: bool


_TTS = [("TTS", "Transformer-TTS MCD", False), ("TTS", "Transformer-TTS MSD", False)]
_SUM = [("Sum", "ROUGE-1", True), ("Sum", "ROUGE-2", True), ("Sum", "ROUGE-L", True)]
_COLUMNS: dict[str, list[tuple[str, str, bool]]] = {
    "noncausal-self": [
        ("TTS", "FastSpeech 2 MCD", False), ("TTS", "FastSpeech 2 MSD", False), *_TTS, *_SUM, ("SR", "PSNR", True),
        ("SR", "SSIM", True), ("MLM", "PPL", False),
    ],
    "causal-self": [*_TTS, *_SUM, ("LM", "PPL", False)],
    "noncausal-cross": [
        ("PCC", "CD-l1", False), ("PCC", "CD-l2", False), ("PCC", "F-score", True),
        *(("LSTF", f"{data} {metric}", False) for data in ("ETT", "ECL", "Weather") for metric in ("MSE", "MAE")),
    ],
    "causal-cross": [*_TTS, *_SUM],
}  # fmt: skip
_MEANS = {
    "noncausal-self": [3.4245, 1.97429, 4.06947, 2.19021, 34.88667, 6.79333, 31.96889, 23.20800, 0.67580, 36.29200],
    "causal-self": [4.08325, 2.20085, 32.95750, 6.09250, 30.25750, 22.26000],
    "noncausal-cross": [7.70250, 0.24775, 0.76250, 1.18933, 0.80625, 0.47575, 0.51100, 0.62025, 0.58075],
    "causal-cross": [5.50370, 2.62780, 31.35000, 5.26000, 28.80000],
}
_DEVIATIONS = {
    "noncausal-self": [0.06832, 0.0361768, 0.09422, 0.03866, 1.39697, 1.41078, 1.31499, 0.27499, 0.01557, 62.30827],
    "causal-self": [0.04529, 0.01372, 1.92754, 0.41007, 1.61951, 8.29944],
    "noncausal-cross": [0.64789, 0.03366, 0.03906, 0.05615, 0.02193, 0.01057, 0.00601, 0.18948, 0.10312],
    "causal-cross": [1.29239, 0.42726, 3.77103, 1.26028, 3.28638],
}

#: The metrics of every pattern, in the order of the published script.
METRICS: dict[str, tuple[Metric, ...]] = {
    pattern: tuple(
        Metric(task, name, mean, deviation, higher)
        for (task, name, higher), mean, deviation in zip(columns, _MEANS[pattern], _DEVIATIONS[pattern], strict=True)
    )
    for pattern, columns in _COLUMNS.items()
}


def compositional_index(pattern: str, scores: Sequence[float] | Mapping[str, float]) -> dict[str, float]:
    """The index of every task of a pattern, and their mean, ``"total"``.

    Args:
        pattern: one of :data:`PATTERNS`.
        scores: a value for every metric of :data:`METRICS`, in its order; or by ``"task name"``, such as
            ``{"SR PSNR": 23.2}``, where whole tasks may be left out.

    >>> round(compositional_index("noncausal-self", {"MLM PPL": 3.42})["MLM"], 3)
    0.528
    """
    check_choice("pattern", pattern, PATTERNS)
    metrics = METRICS[pattern]
    names = [f"{m.task} {m.name}" for m in metrics]
    if isinstance(scores, Mapping):
        if unknown := sorted(set(scores) - set(names)):
            raise ValueError(f"scores names {unknown}; the metrics of {pattern} are {names}")
        given = dict(scores)
        for metric in metrics:
            mine = [n for n, m in zip(names, metrics, strict=True) if m.task == metric.task]
            if missing := [n for n in mine if n not in given]:
                if len(missing) < len(mine):
                    raise ValueError(f"scores lacks {missing}, without which {metric.task} has no index")
        if not given:
            raise ValueError(f"scores is empty; the metrics of {pattern} are {names}")
    else:
        check_type("scores", scores, Sequence, "numbers, or a mapping of them")
        if len(scores) != len(metrics):
            raise ValueError(f"scores must hold {len(metrics)} numbers for {pattern}, {names}, got {len(scores)}")
        given = dict(zip(names, scores, strict=True))
    by_task: dict[str, list[float]] = {}
    for name, metric in zip(names, metrics, strict=True):
        if name in given:
            value = check_real(f"scores[{name!r}]", given[name])
            sign = 1.0 if metric.higher else -1.0
            by_task.setdefault(metric.task, []).append(sign * (value - metric.mean) / metric.deviation)
    found = {task: math.fsum(values) / len(values) for task, values in by_task.items()}
    return {**found, "total": math.fsum(found.values()) / len(found)}


def read_scores(path: str | Path) -> dict[str, list[float]]:
    """Scores of a file of four lines, one per pattern in the order of :data:`PATTERNS`, as the published script reads.

    Raises:
        ValueError: another number of lines or of numbers in one, or what is no number.
    """
    lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != len(PATTERNS):
        raise ValueError(f"{Path(path).name} holds {len(lines)} lines of scores; one for each of {list(PATTERNS)}")
    found = {}
    for pattern, line in zip(PATTERNS, lines, strict=True):
        try:
            found[pattern] = [float(value) for value in line]
        except ValueError as error:
            raise ValueError(f"{Path(path).name}: the line of {pattern} holds what is no number: {error}") from None
        if len(line) != len(METRICS[pattern]):
            raise ValueError(
                f"{Path(path).name}: the line of {pattern} holds {len(line)} numbers instead of {len(METRICS[pattern])}"
            )
    return found
