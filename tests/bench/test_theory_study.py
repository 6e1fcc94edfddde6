"""The study of theories, as small as it goes."""

import json

from attnlib.bench.studies import theory
from attnlib.theory import AttentionSVM


def test_every_experiment_has_claims_and_an_outside_with_the_same_ones():
    for make, broken in theory.EXPERIMENTS.values():
        inside = make()
        outside = inside.outside()
        assert inside.name and broken and inside.predict()
        assert list(inside.predict()) == list(outside.predict())
        assert inside.setting() != outside.setting()


def test_the_study_goes_on_from_its_file_and_draws(tmp_path, monkeypatch):
    small = AttentionSVM(steps=3, n=2, tokens=3, dim=4)
    monkeypatch.setitem(theory.EXPERIMENTS, "small", (lambda: small, "Adam"))
    said = []
    for _ in range(2):
        found = theory.measure(said.append, tmp_path / "kept.jsonl", tmp_path, names=["small"])
    assert len(said) == 6  # three seeds inside, three outside, once
    json.dumps(found, allow_nan=False)
    assert len(found["rows"]) == 2 * len(small.predict()) and found["runs"]["small"][0]["rows"]
    assert (tmp_path / "theory-cpu.svg").stat().st_size > 1000
