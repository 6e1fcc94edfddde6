"""The study of teaching, as small as it goes."""

import json

from attnlib.bench import suites
from attnlib.bench.studies import teaching


def test_a_small_run_of_teaching(tmp_path):
    found = teaching.measure(pictures=tmp_path, teaching=1, steps=1, batch=4, labelled=(20,), seeds=(0,))
    held = found["labelled"]["20"]
    assert [row["name"] for row in held["rows"]] == [
        teaching.LABELS, teaching.LOGITS, teaching.FEATURES, teaching.OURS
    ]  # fmt: skip
    parts = {run["name"]: {k for k in run if k.startswith("loss: ")} for run in held["runs"]}
    assert not parts[teaching.LABELS] and parts[teaching.LOGITS] == {"loss: task", "loss: logits"}
    assert parts[teaching.OURS] > parts[teaching.LOGITS] and (tmp_path / "teaching-cpu.svg").exists()
    assert "teaching" in suites()
    json.dumps(found)
