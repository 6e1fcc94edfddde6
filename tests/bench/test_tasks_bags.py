"""Lines of bags, survival, gaze, events and annotators, small; their pages hold what was measured."""

import json
import re
from pathlib import Path

import pytest
import torch

from attnlib.bench.data.bags import digit_bags, tissue_bags
from attnlib.bench.data.patients import Patients, excess, load, patches
from attnlib.bench.studies.tasks import bags, survival

ROOT = Path(__file__).parents[2]


def on_page(page, name):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end {name} -->", text, re.S).group(1)


def held(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"tasks-{name}-cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("line", "page"), [(bags, "tasks-bags"), (survival, "tasks-bags")])
def test_tables_are_of_the_results(line, page):
    name = line.__name__.rpartition(".")[2]
    assert on_page(page, name) == line.table(held(name))
    assert (ROOT / "docs" / "tasks" / f"{name}.png").stat().st_size < 60_000


def test_bags(tmp_path):
    given = dict(steps=2, seeds=(0, 1), bags=4, tested=4, keep=tmp_path / "kept")
    found = bags.measure(**given, pictures=tmp_path)
    assert set(found["worlds"]) == {"digits", "tissue"} and len(list(tmp_path.glob("tasks-bags-cpu.*"))) == 2
    for part in found["worlds"].values():
        assert [r["name"] for r in part["rows"]] == ["ABMIL", "ACMIL"]
        assert all(0 <= r[k]["mean"] <= 100 for r in part["rows"] for k in ("top ten", "instances", "bags"))
    assert bags.measure(**given)["worlds"] == found["worlds"] and json.dumps(found)
    assert len(bags.table(found).splitlines()) == 6


def test_what_attention_is_worth():
    made = digit_bags(4, torch.Generator().manual_seed(0), size=20, positives=(2, 4))
    logits = torch.stack([torch.zeros(4), made.target.float()], 1)
    right = made.truth.float() + 1e-6
    best = bags.scored(right / right.sum(1, keepdim=True), logits, made)
    assert best["instances"] == best["bags"] == 100 and best["on positives"] > 99.9 and best["top ten"] > 99.9
    even = bags.scored(torch.full((4, 20), 0.05), 0 * logits, made)
    assert even["instances"] == even["bags"] == 50 and even["top ten"] == pytest.approx(50)


@pytest.mark.parametrize("make", [digit_bags, tissue_bags])
def test_training_and_testing_share_no_instance(make):
    one, other = (make(4, torch.Generator().manual_seed(0), test=test) for test in (False, True))
    assert torch.equal(one.truth, other.truth) and not torch.equal(one.bags, other.bags)
    assert bool((one.truth.any(1) == one.target.bool()).all())


def test_bags_name_what_cannot_be():
    with pytest.raises(ValueError, match=r"positives must be two numbers from 1 to 10.*\(3, 12\)"):
        digit_bags(2, torch.Generator(), size=10, positives=(3, 12))
    with pytest.raises(ValueError, match="strength"):
        tissue_bags(2, torch.Generator(), strength=2.0)


def test_survival(tmp_path):
    told = []
    given = dict(steps=1, seeds=(0, 1), parts=2, count=4, source="generated", keep=tmp_path / "kept")
    found = survival.measure(told.append, **given, pictures=tmp_path)
    assert set(found["parts"]) == {"noise", "telling"} and found["source"] == "generated" and "generated" in told[0]
    for part in found["parts"].values():
        assert [r["name"] for r in part["rows"]] == list(survival.NAMES)
        assert all(0 <= r["c-index"]["mean"] <= 100 for r in part["rows"])
    assert len(list(tmp_path.glob("tasks-survival-cpu.*"))) == 2 and json.dumps(found)
    assert survival.measure(**given)["parts"] == found["parts"] and len(survival.table(found).splitlines()) == 8


def test_cox_finds_what_risks_were_made_of():
    known = load("generated")
    w = survival.cox(torch.cat([known.genes[:, :8], known.clinical], 1), known.time, known.event, 0.1)
    assert set(w.abs().topk(4).indices.tolist()) == {0, 1, 2, 8} and bool((w[[0, 1, 2, 8]] > 0).all())
    # At the optimum of one coefficient the likelihood has no slope; a larger ridge makes it smaller.
    one, other = (survival.cox(known.genes[:, :1], known.time, known.event, r) for r in (1e-3, 1.0))
    assert 0 < float(other) < float(one)


def test_folds_part_patients_and_spread_events():
    event = (torch.arange(41) < 12).float()
    parts = survival.folds(event, 4, seed=1)
    assert sorted(torch.cat(parts).tolist()) == list(range(41)) and {int(event[p].sum()) for p in parts} == {3}


def test_patches_show_the_outcome_where_they_are_to():
    known = load("generated")
    silent, telling = (patches(known, 40, shown, seed=1) for shown in (0.0, 3.0))
    residual = excess(known.time, known.event)
    assert float(residual.mean()) == pytest.approx(0, abs=1e-5)  # martingale residuals add up to nothing
    marked = telling[..., 0] > 2
    says = (telling[..., 1] * marked).sum(1) / marked.sum(1).clamp(min=1)
    assert float(torch.corrcoef(torch.stack([says, residual]))[0, 1]) > 0.4
    assert abs(float(torch.corrcoef(torch.stack([silent[..., 1].mean(1), residual]))[0, 1])) < 0.25


def test_patients_come_from_where_they_are_said_to(monkeypatch):
    from attnlib.bench.data import patients

    assert isinstance(load("generated"), Patients) and len(load("generated").time) == 198
    with pytest.raises(ValueError, match="GSE7390"):
        load("TCGA")
    monkeypatch.setattr(patients, "_file", lambda: None)
    assert patients.sources() == ["generated"]
    with pytest.raises(ImportError, match="scikit-survival"):
        load("GSE7390")


def test_kaplan_meier_counts_who_is_still_there():
    at, left = survival.kaplan_meier(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert at.tolist() == [0, 1, 2, 3] and left.tolist() == pytest.approx([1, 0.75, 0.5, 0])
