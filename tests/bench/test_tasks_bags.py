"""Lines of bags, survival, gaze, events and annotators, small; their pages hold what was measured."""

import json
import re
from pathlib import Path

import pytest
import torch

from attnlib.bench.data.bags import digit_bags, tissue_bags
from attnlib.bench.studies.tasks import bags

ROOT = Path(__file__).parents[2]


def on_page(page, name):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- end {name} -->", text, re.S).group(1)


def held(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"tasks-{name}-cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("line", "page"), [(bags, "tasks-bags")])
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
