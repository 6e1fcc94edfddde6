import json

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.studies.diffusion import series
from attnlib.bench.worlds.judge import Found

pytest.importorskip("diffusers")


def thing(shape, colour, score=1.0):
    return Found((0, 0, 9, 9), shape, colour, "large", "plain", score, torch.zeros(64))


class Says:
    """A judge that finds what it is told."""

    def __init__(self, looks, right=False):
        self.looks, self.right = looks, right

    def look(self, images):
        return self.looks[: len(images)]

    def judge(self, images, prompts):
        return [type("Verdict", (), {"right": self.right})() for _ in prompts]


def test_subjects_are_held_against_the_reference():
    (asked,) = series.series(1)
    one, two = (want.shape for want in asked[0].wants)
    assert len({p.relation for p in asked}) == len(asked) == 3 and {p.background for p in asked} <= {"paper", "slate"}
    assert series.series(3) == series.series(3) and series.series(2)[1] != series.series(2, "dev")[1]
    looks = [
        [thing(one, "red"), thing(two, "blue"), thing(one, "green", 0.5)],
        [thing(one, "red"), thing(two, "red")],
        [thing(one, "blue")],
    ]
    found = series.compare(Says(looks, True), torch.zeros(3, 3, 64, 64), asked)
    assert found == {"same": 0.25, "swapped": 0.5, "present": 0.75, "followed": 1.0}
    for reference in ([thing(one, "red")], [thing(one, "red"), thing(two, "red")]):
        assert series.compare(Says([reference, *looks[1:]]), torch.zeros(3, 3, 64, 64), asked) is None


def test_every_contestant_draws_the_same_series(untrained_generators, diffusion_figures, tmp_path, monkeypatch):
    (asked,) = series.series(1)
    shapes = [want.shape for want in asked[0].wants]
    everywhere = [thing(shapes[0], "red"), thing(shapes[1], "blue")]
    monkeypatch.setattr(series, "load", lambda folder: Says([everywhere] * 3))
    names = ["plain", "IR"]
    assert set(names) < set(series.CONTESTANTS) and "diffusion-series" in suites()
    given = dict(names=names, count=1, folder=untrained_generators, settings={"num_inference_steps": 2},
                 keep=tmp_path / "kept")  # fmt: skip
    told = []
    found = series.measure(told.append, pictures=tmp_path, **given)
    json.dumps(found)
    assert diffusion_figures.series_table(found).startswith("1 of 1 series")
    assert [row["name"] for row in found["rows"]] == names and found["used"] == len(told) == 1
    assert all(row["same"]["mean"] == 1.0 for row in found["rows"]) and "against" not in found["rows"][0]
    assert (tmp_path / "diffusion-series-cpu.png").exists()
    before = (tmp_path / "kept").read_text()
    again = series.measure(**given)
    assert (tmp_path / "kept").read_text() == before and again["rows"] == found["rows"]
    monkeypatch.setattr(series, "load", lambda folder: Says([[]] * 3))
    with pytest.raises(RuntimeError, match="no reference shows"):
        series.measure(**{**given, "keep": None})
