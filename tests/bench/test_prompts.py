"""Prompts of four parts, kinds of errors, ratings and where an answer looks."""

import numpy as np
import pytest
import torch

from attnlib.bench.exams import prompts
from attnlib.bench.exams.prompts import Prompt, Rating, Source, attention_shares, classify_error
from attnlib.bench.stats import wilson

GROUPS = {"prices": ["a pen", "a book"], "dates": ["the fair"]}


def test_interval_of_the_papers_rate():
    assert np.round(wilson(126, 4000), 4).tolist() == [0.0265, 0.0374]
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and 0 < wilson(0, 5)[1] < 1


def test_parts_stand_in_their_order():
    prompt = Prompt("An expert.", GROUPS, "Answer briefly.", [Source("pen: 2", "list of May")], {"dates": "Days only."})
    built = prompt.build()
    assert built == prompt.build() and list(built) == ["prices", "dates"]
    at = [built["dates"].index(p) for p in ("# Persona", "# Intelligence", "# External context", "# Group: dates")]
    assert at == sorted(at) and "[list of May] pen: 2" in built["dates"] and "Days only.\n1. the fair" in built["dates"]
    said = "\n".join(built.values())
    assert all(said.count(item) == 1 for items in GROUPS.values() for item in items)  # every item once
    assert "External" not in Prompt("An expert.", GROUPS).build()["prices"]


@pytest.mark.parametrize(
    "change,error,word",
    [
        (dict(persona=" "), ValueError, "persona"),
        (dict(groups={}), ValueError, "at least one group"),
        (dict(groups={"prices": []}), ValueError, r"groups\['prices'\] is an empty group"),
        (dict(groups={"prices": "a pen"}), TypeError, "a sequence of items"),
        (dict(groups={"a": ["x"], "b": ["x"]}), ValueError, r"every item once.*\['x'\]"),
        (dict(notes={"other": "x"}), ValueError, "do not exist.*other"),
        (dict(external=[Source("text", "")]), ValueError, "provenance"),
    ],
)
def test_bad_prompts(change, error, word):
    with pytest.raises(error, match=word):
        Prompt(**{"persona": "An expert.", "groups": GROUPS, **change})


def test_kinds_of_errors():
    def right(text):
        return text == "right"

    def kind(model, **tests):
        return classify_error(model, right, "unclear", "clear", **tests)

    assert kind(lambda p, i: "right" if p == "clear" else "wrong") == "misdirection"
    assert kind(lambda p, i: "wrong") == "hallucination"
    assert kind(lambda p, i: "right") is None
    assert kind(lambda p, i: "right" if p == "clear" and i >= 2 else "wrong") == "misdirection"  # 2 of 20 is tau
    assert kind(lambda p, i: "right" if p == "clear" and i >= 3 else "wrong") == "hallucination"
    assert kind(lambda p, i: "I cannot", refused=lambda t: "cannot" in t) == "refusal"
    assert kind(lambda p, i: "{", form=lambda t: t.isalpha()) == "format"
    assert kind(lambda p, i: "wrong", form=lambda t: t.isalpha()) == "hallucination"
    for bad in (dict(n=0), dict(tau=1.0)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            kind(lambda p, i: "right", **bad)


def test_ratings():
    rng = np.random.default_rng(0)
    kinds = [None, *prompts.ERRORS]
    one = [Rating(str(i), "a", "1", kinds[rng.integers(5)]) for i in range(3000)]
    same = [Rating(r.item, "b", "1", r.error) for r in one]
    other = [Rating(r.item, "c", "1", kinds[rng.integers(5)]) for r in one]
    ratings = [*one, *same, *other]
    assert prompts.agreement(ratings, ("a", "b")) == 1 and abs(prompts.agreement(ratings, ("a", "c"))) < 0.05
    told = prompts.report([Rating(str(i), "a", "1", "misdirection" if i < 126 else None) for i in range(4000)], "a")
    assert told["any"]["share"] == told["misdirection"]["share"] == 0.0315 and told["format"]["errors"] == 0
    assert np.round(told["any"]["interval"], 4).tolist() == [0.0265, 0.0374]
    with pytest.raises(ValueError, match="one guideline"):
        prompts.agreement([one[0], Rating("0", "b", "2")], ("a", "b"))
    with pytest.raises(ValueError, match="no item that both"):
        prompts.agreement(one, ("a", "z"))
    with pytest.raises(ValueError, match="rated nothing"):
        prompts.report(one, "z")
    with pytest.raises(ValueError, match="more than once"):
        prompts.report([one[0], one[0]], "a")
    with pytest.raises(ValueError, match="error"):
        Rating("1", "a", "1", "lie")
    with pytest.raises(ValueError, match="guideline must be given"):
        Rating("1", "a", "")


def test_attention_shares_with_and_without_sinks():
    torch.manual_seed(0)
    mask = torch.ones(9, 9).tril() == 0
    weights = [torch.randn(2, 3, 9, 9).masked_fill(mask, -torch.inf).softmax(-1) for _ in range(2)]
    spans = {"instruction": range(1, 4), "distractor": range(4, 9), "first": [0]}
    found = attention_shares(weights, slice(6, None), spans, sinks=None)
    assert sum(found.values()) == pytest.approx(1)
    for name, columns in spans.items():  # by the equation
        loop = [
            float(w[b, h, r, list(columns)].sum())
            for w in weights
            for b in range(2)
            for h in range(3)
            for r in (6, 7, 8)
        ]
        assert found[name] == pytest.approx(np.mean(loop), abs=1e-6)
    without = attention_shares(weights, [6, 7, 8], spans)
    assert without["first"] == 0 and sum(without.values()) == pytest.approx(1)
    sink = [torch.full((1, 1, 3, 3), 0.05).index_fill(-1, torch.tensor([0]), 0.9)]
    assert attention_shares(sink, [2], {"s": [1]}, sinks=0)["s"] == pytest.approx(0.05)
    assert attention_shares(sink, [2], {"s": [1]})["s"] == pytest.approx(0.5)
    for change, word in (
        (dict(spans={"a": [1], "b": [1]}), "overlap"), (dict(spans={"a": [9]}), "lie in 0..8"),
        (dict(rows=[]), "no row"),
        (dict(weights=[]), "at least one layer"), (dict(weights=[weights[0], None]), "without a map"),
        (dict(rows=[0]), "leaves rows"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            attention_shares(**{"weights": weights, "rows": [6], "spans": spans, **change})


def test_two_prompts():
    told = prompts.compare_prompts((30, 12), (200, 200))
    assert told["p"] == pytest.approx(0.00475, abs=1e-3) and told["prompts"][0]["share"] == 0.15
    assert prompts.compare_prompts((5, 5), (50, 50))["p"] == 1
