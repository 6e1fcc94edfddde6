"""Whether people who see an explanation accept right answers and reject wrong ones, per arm of a study.

>>> log = [Decision("static", "gull", "gull", True), Decision("static", "gull", "tern", True)]
>>> decision_accuracy(log)["static"].share
0.5
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checks import check_type
from .stats import fisher_p, share_interval


@dataclass(frozen=True)
class Decision:
    """One trial.

    Args:
        arm: what was shown, such as ``"static"`` or ``"interactive"``.
        truth, predicted: the label, and what the model said.
        accepted: whether the person agreed with the model.
    """

    arm: str
    truth: str
    predicted: str
    accepted: bool

    @property
    def right(self) -> bool:
        """Accepted what is true, or rejected what is not."""
        return self.accepted == (self.truth == self.predicted)


@dataclass(frozen=True)
class Accuracy:
    """Shares of right decisions of an arm, with Wilson's 95 % intervals; ``None`` where there is no trial.

    Args:
        trials, right: of all.
        share, interval: of them.
        model: share of trials in which the model was right.
        when_right, when_wrong: share and interval among trials where the model was right, and wrong.
    """

    trials: int
    right: int
    share: float
    interval: tuple[float, float]
    model: float
    when_right: tuple[float, tuple[float, float]] | None
    when_wrong: tuple[float, tuple[float, float]] | None


def _share(rows: list[Decision]) -> tuple[float, tuple[float, float]] | None:
    right = sum(row.right for row in rows)
    return (right / len(rows), share_interval(right, len(rows))) if rows else None


def decision_accuracy(log: Iterable[Decision]) -> dict[str, Accuracy]:
    """Accuracy by arm.

    Raises:
        ValueError: no trials.
    """
    arms: dict[str, list[Decision]] = {}
    for row in log:
        check_type("a trial", row, Decision, "a Decision")
        arms.setdefault(row.arm, []).append(row)
    if not arms:
        raise ValueError("log is empty: there are no decisions to count")
    out = {}
    for arm, rows in arms.items():
        kinds = [[r for r in rows if (r.truth == r.predicted) == true] for true in (True, False)]
        whole = _share(rows)
        assert whole is not None
        right = sum(r.right for r in rows)
        out[arm] = Accuracy(
            len(rows), right, *whole, len(kinds[0]) / len(rows), _share(kinds[0]), _share(kinds[1])
        )  # fmt: skip
    return out


def arms_differ(a: Accuracy, b: Accuracy) -> float:
    """Fisher's p that two arms have one accuracy, trials taken as independent."""
    return fisher_p((a.right, b.right), (a.trials, b.trials))


def read_decisions(path: str | Path, arm: str) -> list[Decision]:
    """Trials of a log as CHM-Corr's release writes them, a line of JSON each.

    Labels are compared without the number before the name, ``_``, ``-`` and capitals. Lines whose decision is neither
    ``"Accept"`` nor ``"Reject"``, such as answers among 200 classes, are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no trial.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no log {str(path)!r}")
    out = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            truth, predicted, said = row["gt-label"], row["ai-prediction"]["label"], row["decision"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {str(path)!r} is no trial: {error!r}") from None
        if said in ("Accept", "Reject"):
            out.append(Decision(arm, _plain(truth), _plain(predicted), said == "Accept"))
    return out


def _plain(label: str) -> str:
    return label.split(" ")[-1].lower().replace("_", "").replace("-", "")
