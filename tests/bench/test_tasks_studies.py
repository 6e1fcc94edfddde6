"""The lines of the suite of tasks, small: every contestant runs, goes on where it stopped, and is drawn."""

import json

import pytest

from attnlib.bench.studies.tasks import actions, lanes, retrieval


def test_retrieval(tmp_path):
    given = dict(steps=2, seeds=(0, 1), tested=24, keep=tmp_path / "kept", pictures=tmp_path)
    found = retrieval.measure(**given)
    assert set(found["parts"]) == set(retrieval.QUESTIONS) and (tmp_path / "tasks-retrieval-cpu.svg").exists()
    for question, part in found["parts"].items():
        assert [r["name"] for r in part["rows"]] == list(retrieval.QUESTIONS[question][1])
        assert all(0 <= r["recall"]["mean"] <= 100 for r in part["rows"])
    assert retrieval.measure(**given)["parts"] == found["parts"]
    json.dumps(found)
    with pytest.raises(KeyError):
        retrieval.measure(questions=["three things"])


@pytest.mark.parametrize(("line", "metric"), [(actions, "map"), (lanes, "hidden")])
def test_actions_and_lanes(line, metric, tmp_path):
    steps = 2 if line is actions else (1, 2)
    found = line.measure(steps=steps, seeds=(0, 1), tested=4, pictures=tmp_path, keep=tmp_path / "kept")
    for part in [found] if line is actions else found["steps"].values():
        assert [r["name"] for r in part["rows"]] == list(line.NAMES)
        assert all(0 <= r[metric]["mean"] <= 100 for r in part["rows"])
    assert list(tmp_path.glob("*.svg")) and json.dumps(found)
