"""A formula beside the run that confirms or refutes it: what is claimed, what was measured, and which of both it is.

An experiment says with :meth:`Experiment.predict` which numbers a theory promises, and with :meth:`Experiment.run` what
one seed gives; :meth:`Experiment.compare` holds one against the other with an interval over seeds. A theory has
assumptions: :meth:`Experiment.outside` is the same claim where one of them does not hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import check_int, check_real, check_type
from ..extras import need


class Claim(NamedTuple):
    """What a theory says of a number: that it lies between two others, one of which may be infinite."""

    low: float
    high: float
    value: float | None = None

    @classmethod
    def near(cls, value: float, within: float) -> Claim:
        """A value, and how far from it, as a share of it, still counts as that value.

        >>> Claim.near(2.0, 0.05).text()
        '2 ± 5 %'
        """
        check_real("within", within, least=0)
        return cls(value - within * abs(value), value + within * abs(value), value)

    @classmethod
    def above(cls, low: float) -> Claim:
        """At least ``low``."""
        return cls(low, math.inf)

    @classmethod
    def below(cls, high: float) -> Claim:
        """At most ``high``."""
        return cls(-math.inf, high)

    def text(self) -> str:
        """The claim in a few characters."""
        if self.value is not None:
            share = 100 * (self.high - self.value) / abs(self.value) if self.value else 0.0
            return f"{self.value:.4g} ± {share:.3g} %"
        return f"> {self.low:.4g}" if math.isinf(self.high) else f"< {self.high:.4g}"

    def verdict(self, low: float, high: float) -> str:
        """What an interval says: ``confirmed`` inside, ``refuted`` outside, ``open`` across the border."""
        if self.low <= low and high <= self.high:
            return "confirmed"
        return "refuted" if high < self.low or low > self.high else "open"


@dataclass(frozen=True)
class Row:
    """One claim and what was measured: the mean over seeds and its 95 % interval."""

    name: str
    claim: Claim
    mean: float
    low: float
    high: float
    n: int

    @property
    def verdict(self) -> str:
        """``confirmed``, ``refuted`` or ``open``."""
        return self.claim.verdict(self.low, self.high)

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        return f"{self.name}: claimed {self.claim.text()}, measured {self.mean:.4g} ± {half:.2g}: {self.verdict}"


@dataclass(frozen=True)
class Comparison:
    """What :meth:`Experiment.compare` returns: ``rows`` of claims, and every number of every seed in ``runs``."""

    experiment: str
    setting: dict[str, Any]
    rows: tuple[Row, ...]
    runs: tuple[dict[str, float], ...]

    @property
    def confirmed(self) -> bool:
        """Whether every claim is."""
        return all(row.verdict == "confirmed" for row in self.rows)

    def __str__(self) -> str:
        return "\n".join(map(str, self.rows))

    def plain(self) -> dict[str, Any]:
        """Plain values, for JSON; an infinite end of a claim is ``None``."""

        def end(value: float) -> float | None:
            return value if math.isfinite(value) else None

        rows = [
            {
                "name": row.name, "claimed": row.claim.text(), "from": end(row.claim.low), "to": end(row.claim.high),
                "measured": {"mean": row.mean, "half": (row.high - row.low) / 2, "n": row.n}, "verdict": row.verdict,
            }
            for row in self.rows
        ]  # fmt: skip
        return {"experiment": self.experiment, "setting": self.setting, "rows": rows, "runs": list(self.runs)}

    def json(self) -> str:
        """The same as text."""
        return json.dumps(self.plain(), indent=1, allow_nan=False)

    def plot(self, path: str | Path | None = None) -> Any:
        """A figure of matplotlib, one axis per claim: what is claimed as a band, means with intervals and every seed.

        Args:
            path: where to write it; the ending says the format.
        """
        figure_module = need("matplotlib.figure", "a plot")
        figure = figure_module.Figure(figsize=(6.4, 0.7 + 0.75 * len(self.rows)), layout="constrained")
        for axes, row in zip(figure.subplots(len(self.rows), squeeze=False)[:, 0], self.rows, strict=True):
            seen = [run[row.name] for run in self.runs]
            ends = [e for e in (row.claim.low, row.claim.high) if math.isfinite(e)] + [row.low, row.high, *seen]
            pad = 0.1 * (max(ends) - min(ends)) or 0.1 * abs(max(ends)) or 0.1
            left, right = min(ends) - pad, max(ends) + pad
            axes.axvspan(max(left, row.claim.low), min(right, row.claim.high), color="#0ca678", alpha=0.2, linewidth=0)
            axes.plot(seen, [0.0] * len(seen), "|", color="#5c7cfa", markersize=14)
            around = [[row.mean - row.low], [row.high - row.mean]]
            axes.errorbar([row.mean], [0.0], xerr=around, fmt="o", color="#2f7de1", capsize=3)
            axes.set(xlim=(left, right), ylim=(-1, 1), yticks=[])
            axes.set_title(f"{row.name}: {row.verdict}", fontsize=8, loc="left")
            axes.tick_params(labelsize=7)
        if path is not None:
            figure.savefig(path)
        return figure


class Experiment:
    """One theory with one setting. A subclass says ``name``, ``predict``, ``run`` and ``outside``.

    >>> class Halves(Experiment):
    ...     name = "halves"
    ...     def predict(self): return {"mean": Claim.near(0.5, 0.2)}
    ...     def run(self, seed): return {"mean": 0.5 + 0.01 * (seed - 1)}
    >>> print(Halves().compare())
    mean: claimed 0.5 ± 20 %, measured 0.5 ± 0.025: confirmed
    """

    name = ""

    def predict(self) -> dict[str, Claim]:
        """Claims by name, from formulas alone."""
        raise NotImplementedError

    def run(self, seed: int) -> dict[str, float]:
        """What a seed gives: a number for every claim, and others that belong beside them."""
        raise NotImplementedError

    def outside(self) -> Experiment:
        """The same claims where one assumption does not hold."""
        raise NotImplementedError

    def setting(self) -> dict[str, Any]:
        """What the experiment was made with, as plain values."""
        return {k: v for k, v in vars(self).items() if not k.startswith("_")}

    def compare(
        self, seeds: Sequence[int] = (0, 1, 2), runs: Sequence[Mapping[str, float]] | None = None
    ) -> Comparison:
        """Claims beside 95 % intervals (Student's t over seeds).

        Args:
            seeds: at least two.
            runs: what these seeds gave, where that is known already.
        """
        check_type("seeds", seeds, (list, tuple, range))
        if len(seeds) < 2 or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be at least two different ones, got {list(seeds)}: one gives no interval")
        for seed in seeds:
            check_int("seeds", seed, least=0)
        claims = self.predict()
        found = [dict(r) for r in ([self.run(s) for s in seeds] if runs is None else runs)]
        if len(found) != len(seeds):
            raise ValueError(f"runs has {len(found)} entries for {len(seeds)} seeds")
        missing = {name for name in claims for run in found if name not in run}
        if missing:
            raise ValueError(f"runs say nothing of {sorted(missing)}")
        rows = []
        for name, claim in claims.items():
            values = [float(run[name]) for run in found]
            mean = sum(values) / len(values)
            rows.append(Row(name, claim, mean, *_interval(values, mean), len(values)))
        return Comparison(self.name, self.setting(), tuple(rows), tuple(found))


def _interval(values: Sequence[float], mean: float) -> tuple[float, float]:
    if max(values) - min(values) <= 1e-15 * abs(mean):  # every seed alike: nothing is random here
        return mean, mean
    low, high = need("scipy.stats", "an interval").ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(low), float(high)
