"""The study of masked pretraining, as small as it goes."""

from attnlib.bench.studies import pretraining


def test_the_study_runs(tmp_path):
    found = pretraining.measure(pictures=tmp_path, steps=2, labels=(10, 20), batch=4, seeds=(0, 1))
    assert (tmp_path / "pretraining-cpu.svg").exists() and set(found["labels"]) == {"10", "20"}
    for held in found["labels"].values():
        assert [row["name"] for row in held["rows"]] == list(pretraining.CONTESTANTS)
        assert all(set(row["against"]) == {pretraining.BASELINE, pretraining.SCRATCH} for row in held["rows"])
        assert held["rows"][0]["against"][pretraining.BASELINE]["mean"] == 0
    assert set(found["cosine at the end"]) == {"untrained", "student"}
