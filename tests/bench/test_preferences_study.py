"""The line on preferences, small: what is revised, that every contestant reads what pairs hold, and going on."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from attnlib.bench.data import scenes  # noqa: E402
from attnlib.bench.studies.multimodal_models import _lists, preferences  # noqa: E402
from attnlib.convert import preference  # noqa: E402


def scene(*things):
    made = [scenes.Thing(name, cell, contrast, (0, 0), 0) for cell, (name, contrast) in enumerate(things)]
    return scenes.Scene(tuple(made), torch.zeros(3, 64, 64))


def revised(said, picture):
    return " ".join(s.revised.strip() for s in preferences.revise(said, picture) if s.revised)


def test_revisions_are_minimal_and_follow_what_can_be_seen():
    picture = scene(("red circle", 0.9), ("digit 4", 0.8), ("blue square", 0.02), ("green cross", 0.2))
    assert _lists.visible(picture) == ["red circle", "digit 4", "green cross"]
    assert revised("red circle , digit 4", picture) == "red circle , digit 4"
    # The second of the pair cannot be seen; a digit that was misread gives way to the right one.
    assert revised("red circle , blue square , digit 7", picture) == "red circle , digit 4"
    assert revised("blue square , red circle , red circle", picture) == "red circle , digit 4"
    assert revised("digit 4 , green cross", picture) == "red circle , digit 4 , green cross"
    assert revised("yellow triangle", scene(("red circle", 0.2))) == ""
    scores = [s.score for s in preferences.revise("red circle , blue square", picture)]
    assert scores == [4, 1, 1]


def test_every_contestant_reads_what_its_pairs_hold():
    pairs = preferences._pairs(0, 3)
    for how in preferences.CONTESTANTS.values():
        assert how.rate in preferences.RATES and len(preference.to_pairs(pairs[how.pairs], how.recipe)[0]) == 3
    for own, again in zip(pairs["own"], pairs["refilled"], strict=True):
        assert list(own.responses["chosen"]) == list(again.responses["chosen"])
        assert len(again.responses["rejected"]) == len(own.responses["chosen"])
        assert list(again.responses["rejected"]) != list(own.responses["chosen"])


def test_the_line_runs_and_goes_on(tmp_path):
    given = dict(scenes=3, steps=4, count=3, names=("DPO", "OPA-DPO without captions"), keep=tmp_path / "kept.jsonl")
    found = preferences.measure(pictures=tmp_path, **given)
    assert (tmp_path / "multimodal-models-preferences-cpu.svg").exists() and json.dumps(found)
    told = []
    again = preferences.measure(progress=told.append, **given)
    rows = {row["name"]: row for row in found["rows"]}
    assert not told and again["rows"] == found["rows"] and list(rows) == ["plain", *given["names"]]
    assert rows["plain"]["invented"]["difference"] == 0
    assert {"recall", "Brier", "too sure", "yes to absent seconds"} <= set(rows["DPO"])
    with pytest.raises(ValueError, match=r"rates must hold that of 'DPO', got \['SFT'\]"):
        preferences.measure(names=("DPO",), rates={"SFT": 1e-3})
    with pytest.raises(ValueError, match="seeds must hold at least one"):
        preferences.measure(seeds=())


def test_rates_are_chosen_beside_the_plain_model(tmp_path):
    given = dict(tried=(1e-3,), names=("SFT",), scenes=2, steps=1, count=3, keep=tmp_path / "kept.jsonl")
    found = preferences.choose_rates(**given)
    assert [(r["name"], r["rate"]) for r in found["rows"]] == [("plain", 0.0), ("SFT", 1e-3)]
    assert found["rates"] == {"SFT": 1e-3} and preferences.choose_rates(**given) == found
