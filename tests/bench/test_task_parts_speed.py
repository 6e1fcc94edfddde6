"""The measurement of parts of task models, as small as it goes; and the page says what the files hold."""

import json
import re
from pathlib import Path

import pytest

from attnlib.bench.speed import race, task_parts

SIZES = {
    "position attention": dict(side=24, dim=16), "late interaction": dict(pairs=128, tokens=(24, 16), dim=8),
    "patch attention": dict(count=2, side=8, dim=4), "codes of places": dict(count=2, objects=6, dim=24),
}  # fmt: skip
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PAGE = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.mark.parametrize("name", task_parts.CONTESTS)
def test_both_ways_give_the_same_and_are_timed(name):
    found = task_parts.record(name, 1, **SIZES[name])
    kinds = ["forward"] if name == "codes of places" else ["forward", "training"]
    assert [k for k in ("forward", "training") if k in found] == kinds
    for what in kinds:
        assert found[what]["times_as_fast"] > 0 and all(b > 0 for b in found[what]["peak_bytes"].values())
        if name in ("position attention", "late interaction"):
            assert found[what]["share_of_memory"] < 1


def test_what_differs_is_refused(monkeypatch):
    def wrong(**sizes):
        contest = task_parts.position(**sizes)
        return contest._replace(plain=lambda x: contest.plain(x) + 1)

    monkeypatch.setitem(task_parts.CONTESTS, "position attention", wrong)
    with pytest.raises(AssertionError, match="both ways differ"):
        task_parts.record("position attention", 1, side=4, dim=8)


def on_page(name):
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end {name} -->", PAGE.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return found[1]


def test_the_page_holds_the_tables_of_the_files():
    for name, line in (("task-parts", task_parts), ("tasks-authors", race)):
        held = json.loads((RESULTS / f"{name}-cpu.json").read_text(encoding="utf-8"))
        assert on_page(name) == line.table(held)


def test_means_of_a_race_are_geometric():
    row = {"forward": {"speedup": 4.0}}
    found = {"results": {"b": row, "a": {"forward": {"speedup": 1.0}, "both": {"speedup": 0.5}}}}
    lines = race.table(found).splitlines()[2:]
    assert lines == ["| a | 1.00 | 0.50 |", "| b | 4.00 |  |", "| geometric mean | 2.00 | 0.50 |"]
