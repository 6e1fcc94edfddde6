"""The benchmark of attached no-ops, and what its committed figures have to hold."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from attnlib.bench import NEEDS_HF, suites  # noqa: E402
from attnlib.bench.speed import hooks as bench  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "hooks-cpu.json"


def test_every_contender_is_measured_and_changes_nothing():
    said = []
    result = bench.measure(64, 2, 32, 16, rounds=1, steps=1, progress=said.append)
    assert [r["contender"] for r in result["records"]] == list(bench.CONTENDERS)
    assert all(r["step_seconds"] > 0 and r["over_untouched"] > 0 for r in result["records"])
    assert result["settings"]["layers"] == 2 and result["machine"] and said[-1] == "round 1 of 1: recorded entropy"
    assert "hooks" in suites() and "hooks" in NEEDS_HF


def test_a_contender_that_changes_the_logits_is_noticed(monkeypatch):
    class Liar(bench.Around):
        def on_output(self, site, out):
            return out * 2

    monkeypatch.setattr(bench, "CONTENDERS", {"untouched": lambda: (), "liar": lambda: (Liar(),)})
    with pytest.raises(AssertionError, match="liar changes the logits"):
        bench.measure(64, 1, 32, 8, rounds=1, steps=1)


def test_a_no_op_costs_less_than_three_percent_of_a_step():
    records = {r["contender"]: r["over_untouched"] for r in json.loads(RESULTS.read_text())["records"]}
    assert set(records) == set(bench.CONTENDERS)
    for name in ("on step", "around attention", "around attention, one layer"):
        assert records[name] < 1.03, name
