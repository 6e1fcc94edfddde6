"""Claims against intervals: what counts as confirmed, refuted and open."""

import json
import math

import pytest
from scipy import stats

from attnlib.theory import Claim, Experiment


class Drawn(Experiment):
    """Says what it is told to say."""

    name = "drawn"

    def __init__(self, values, claim):
        self._values, self._claim = values, claim

    def predict(self):
        return {"x": self._claim}

    def run(self, seed):
        return {"x": self._values[seed], "beside": 1.0}


def test_intervals_are_students_and_verdicts_follow():
    values = [1.0, 1.1, 1.3]
    half = stats.t.ppf(0.975, 2) * math.sqrt(sum((v - 3.4 / 3) ** 2 for v in values) / 2 / 3)
    (row,) = Drawn(values, Claim.near(1.1, 0.5)).compare().rows
    assert row.mean == pytest.approx(3.4 / 3) and row.high - row.mean == pytest.approx(half)
    assert row.mean - row.low == pytest.approx(half)
    for claim, verdict in (
        (Claim.near(1.1, 0.5), "confirmed"), (Claim.above(1.2), "open"), (Claim.above(2.0), "refuted"),
        (Claim.below(2.0), "confirmed"), (Claim.near(-1.0, 0.5), "refuted"),
    ):  # fmt: skip
        found = Drawn(values, claim).compare()
        assert found.rows[0].verdict == verdict and found.confirmed == (verdict == "confirmed")


def test_what_has_no_spread_has_a_point_as_interval():
    (row,) = Drawn([2.0, 2.0], Claim.near(2.0, 0.0)).compare((0, 1)).rows
    assert (row.low, row.high, row.verdict) == (2.0, 2.0, "confirmed")


def test_json_and_plot(tmp_path):
    found = Drawn([1.0, 1.1, 1.3], Claim.above(0.5)).compare()
    told = json.loads(found.json())
    assert told["rows"][0]["to"] is None and told["rows"][0]["measured"]["n"] == 3 and len(told["runs"]) == 3
    figure = found.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 1000 and len(figure.axes) == 1


def test_known_runs_are_taken():
    found = Drawn([], Claim.above(0.5)).compare((3, 4), [{"x": 1.0}, {"x": 2.0}])
    assert found.rows[0].mean == 1.5


def test_what_cannot_be_compared_is_refused():
    drawn = Drawn([1.0, 2.0], Claim.above(0.5))
    with pytest.raises(ValueError, match="at least two different"):
        drawn.compare([0])
    with pytest.raises(TypeError, match="seeds"):
        drawn.compare(3)
    with pytest.raises(ValueError, match="say nothing of"):
        drawn.compare((0, 1), [{"y": 1.0}] * 2)
    with pytest.raises(ValueError, match="1 entries for 2"):
        drawn.compare((0, 1), [{"x": 1.0}])
    with pytest.raises(ValueError, match="within"):
        Claim.near(1.0, -0.1)
