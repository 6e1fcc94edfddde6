"""The line on judges, small: planted blindness is told apart, conflicts fall under tuning."""

import json

import pytest

from attnlib.bench.studies.multimodal_models import judges


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    settings = dict(seeds=(0,), scenes=160, per_kind=30, systems=5, queries=6, cases=8, steps=2, tuned=2, count=50)
    keep = folder / "kept.jsonl"
    found = judges.measure(keep=keep, pictures=folder, **settings)
    return found, judges.measure(keep=keep, **settings), folder


def rows(found, what):
    return {r["name"]: {k: v["mean"] for k, v in r.items() if isinstance(v, dict)} for r in found[what]["rows"]}


def test_the_line_runs_and_goes_on(small):
    found, again, folder = small
    assert (folder / "multimodal-models-judges-cpu.svg").exists() and json.dumps(found)
    assert {k: v for k, v in again.items() if k != "machine"} == {k: v for k, v in found.items() if k != "machine"}


def test_planted_things_are_found(small):
    found = small[0]
    emma = rows(found, "emma")
    for name, kind in (("colour-blind", "attribute"), ("place-blind", "location"), ("count-blind", "count")):
        assert emma[name][f"agnosia, {kind}"] > emma["sees all"][f"agnosia, {kind}"] + 0.05
    assert emma["place-blind"]["agnosia, attribute"] == emma["sees all"]["agnosia, attribute"]
    ranks = rows(found, "crosscheck")
    assert ranks["crosscheck, shared 0"]["spearman"] > 0.8 > ranks["crosscheck, shared 1"]["spearman"]
    assert rows(found, "clones")["own family out"]["clones behind"] == 1
    assert all(r["located"] == 1 for r in rows(found, "pca").values())


def test_tuning_mends_conflicts_and_costs_no_accuracy():
    """Toy documents, a reader of two heads that disagree; data of the connector are among what it is tuned on."""
    before, after = (judges.conflicts(name, 0, 240, 60, 400) for name in ("before", "with connector"))
    assert after["consistency"] > before["consistency"] + 0.05
    assert after["cognition"] >= before["cognition"] and after["perception"] >= before["perception"]
