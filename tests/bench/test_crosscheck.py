"""CrossCheckGPT: simulated systems of known error rates, limits, SelfCheckGPT as a case and by its authors' code."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from attnlib.bench.evaluate import Unreadable
from attnlib.bench.exams import crosscheck as cc
from attnlib.bench.judge import Judge

FIXTURE = Path(__file__).parents[1] / "fixtures" / "crosscheckgpt.safetensors"
RATES = {f"m{i}": r for i, r in enumerate(np.linspace(0.05, 0.6, 8).tolist())}
CLONES = {"good1": 0.1, "good2": 0.15, "good3": 0.2, "bad1": 0.5, "bad2": 0.5, "bad3": 0.5, "bad4": 0.5, "bad5": 0.5}


def ranked(world, **settings):
    return cc.explicit(world.responses, world.passages, cc.same_claim).rank(**settings)


def recorded():
    with safe_open(FIXTURE, "np") as f:
        held = {k: json.loads(f.metadata()[k]) for k in ("answers", "facts", "samples", "said")}
        return held, f.get_tensor("scores"), f.get_tensor("post")


def test_independent_errors_are_ranked_and_shared_ones_less():
    found = {}
    for shared in (0.0, 0.5, 1.0):
        values = []
        for seed in range(3):
            world = cc.simulate(RATES, queries=25, shared=shared, seed=seed)
            values.append(ranked(world).correlation(world.errors, draws=20).value)
        found[shared] = np.mean(values)
    assert found[0.0] > 0.95 and found[0.0] > found[0.5] + 0.1 > found[1.0] + 0.2, found


def test_five_systems_are_enough_and_the_interval_covers():
    world = cc.simulate({f"m{i}": 0.1 * i for i in range(1, 6)}, queries=40, seed=4)
    found = ranked(world).correlation(world.errors)
    assert found.value > 0.95 and found.low <= found.value <= found.high
    assert ranked(world).correlation(world.errors, "pearson").value > 0.9
    low, high = ranked(world).interval("m1")
    assert low < ranked(world).scores["m1"] < high


def test_identical_systems_have_one_score_of_nothing():
    text = ["The sky is blue. Grass is green."] * 3
    same = {m: text for m in "abc"}
    found = cc.explicit(same, {m: [[t] for t in text] for m in same}, lambda s, p: float(s not in p))
    assert found.rank().scores == dict.fromkeys("abc", 0.0) and found.pairs == 2  # each pair once
    assert math.isnan(found.rank().correlation({"a": 1, "b": 2, "c": 3}).value)


def test_self_evidence_alone_is_selfcheck():
    world = cc.simulate({"a": 0.5}, queries=6, stable=0.3, samples=4, seed=1)
    with pytest.raises(ValueError, match="no evidence on 'a'.*include_self=True is SelfCheck"):
        ranked(world)
    found = ranked(world, include_self=True)
    for q, text in enumerate(world.responses["a"]):
        own = cc.selfcheck(text, world.passages["a"][q], cc.same_claim)
        by_hand = [
            np.mean([0.0 if s in cc.sentences(p) else 1.0 for p in world.passages["a"][q]]) for s in cc.sentences(text)
        ]
        np.testing.assert_allclose(own, by_hand, atol=1e-12)
        assert found.table[0, q] == pytest.approx(np.mean(own), abs=1e-12)


def test_selfcheck_equals_the_authors_on_the_same_verdicts():
    held, scores, post = recorded()
    assert [cc.read_support(a, "authors") for a in held["answers"]] == post.tolist()

    def judge(sentence, passage):
        return cc.read_support(held["said"][f"{sentence}|{passage}"], "authors")

    np.testing.assert_allclose(cc.selfcheck(held["facts"], held["samples"], judge), scores, atol=1e-12)

    def strict(sentence, passage):  # "Nothing", "yesterday" and "Maybe" are no verdicts, which count 0.5
        try:
            return cc.read_support(held["said"][f"{sentence}|{passage}"])
        except Unreadable:
            return None

    ours = cc.selfcheck(held["facts"], held["samples"], strict)
    assert not np.allclose(ours, scores) and np.abs(np.array(ours) - scores).max() < 0.5


def test_one_hot_weights_on_an_oracle_give_the_true_error_rate():
    world = cc.simulate({**RATES, "oracle": 0.0}, queries=12, seed=2)
    weights = {m: float(m == "oracle") for m in world.responses}
    found = ranked(world, weights=weights)
    for m in RATES:
        assert found.scores[m] == pytest.approx(world.errors[m], abs=1e-12)
    by_answer = {m: [float(np.mean(["true" not in s for s in cc.sentences(t)])) for t in texts]
                 for m, texts in world.responses.items()}  # fmt: skip
    assert found.by_answer(by_answer, "pearson") > 0.99 and math.isnan(found.scores["oracle"])


def test_order_of_systems_and_seeds():
    world = cc.simulate(RATES, queries=6, seed=3)
    again = cc.simulate(dict(reversed(RATES.items())), queries=6, seed=3)
    assert again.responses == world.responses
    one, two = ranked(world), ranked(again)
    assert one.order == two.order and one.scores == pytest.approx(two.scores)
    few = [cc.explicit(world.responses, world.passages, cc.same_claim, most=1, seed=s).rank().scores for s in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_empty_answers_have_no_score_and_tell_coverage():
    answers = {"a": ["", "X is 1."], "b": ["X is 1.", "X is 1."], "c": ["", " \n"]}
    passages = {m: [["X is 1."]] * 2 for m in answers}
    found = cc.explicit(answers, passages, lambda s, p: float(s not in p)).rank()
    assert np.isnan(found.table[0, 0]) and found.table[0, 1] == 0
    assert found.coverage == {"a": 0.5, "b": 1.0, "c": 0.0}
    assert math.isnan(found.scores["c"]) and found.order[-1] == "c"
    assert math.isnan(sum(found.scores[m] for m in "ac"))


def test_no_verdict_counts_half_or_nothing():
    answers = {"a": ["One. Two."], "b": ["Three."]}
    verdicts = {"One.": None, "Two.": 1.0, "Three.": None}
    evidence = cc.explicit(answers, {"a": [["x"]], "b": [["y", "z"]]}, lambda s, p: verdicts[s])
    assert evidence.rank().scores == {"a": 0.75, "b": 0.5}
    dropped = evidence.rank(na="drop")
    assert dropped.scores["a"] == 1.0 and math.isnan(dropped.scores["b"])
    assert evidence.undecided == pytest.approx(2 / 3)  # of 3 samples and 3 sentences


def test_unequal_numbers_of_samples_weigh_sources_alike():
    evidence = cc.explicit(
        {"a": ["One."], "b": ["Two."], "c": ["Two."]}, {"b": [["x"]], "c": [["y", "z", "w"]]},
        lambda s, p: {"x": 1.0, "y": 0.0, "z": 0.0, "w": 1.0}[p],
    )  # fmt: skip
    assert evidence.rank().scores["a"] == pytest.approx((1 + 1 / 3) / 2)


def test_weights_by_confidence():
    """Who contradicts itself is trusted less; with unstable inventors that helps where most invent."""
    rates = {"a": 0.05, "b": 0.1, "c": 0.15, **{f"w{i}": 0.7 + 0.04 * i for i in range(5)}}
    world = cc.simulate(rates, queries=20, stable=0.2, seed=5)
    found = {w: ranked(world, weights=w, temperature=0.1) for w in ("uniform", "self", "iterated")}
    for w in ("self", "iterated"):
        trust = dict(zip(found[w].systems, found[w].weights, strict=True))
        assert min(trust[m] for m in "abc") > max(trust[m] for m in rates if m not in "abc")
        assert sum(trust.values()) == pytest.approx(1)
        gap = {k: np.mean([abs(found[k].scores[m] - world.errors[m]) for m in "abc"]) for k in (w, "uniform")}
        assert gap[w] < 0.5 * gap["uniform"]  # nearer to the true share of errors
    flat = ranked(world, weights="self", temperature=1e6)
    assert flat.scores == pytest.approx(found["uniform"].scores, abs=1e-4)


def test_families_that_repeat_each_other():
    """Five clones that invent together look better than three independent ones, until their own words do not count."""
    families = {m: "bad" if m.startswith("bad") else m for m in CLONES}
    world = cc.simulate(CLONES, queries=25, shared=0.95, families=families, seed=0)
    fooled, mended = ranked(world), ranked(world, families=families)
    assert fooled.scores["good1"] > fooled.scores["bad1"] and mended.scores["good1"] < mended.scores["bad1"]
    assert mended.correlation(world.errors).value > fooled.correlation(world.errors).value
    left = cc.explicit(world.responses, world.passages, cc.same_claim).leave_family_out(families)
    assert set(left) == {"bad", "good1", "good2", "good3"} and left["bad"].order[:3] == ("good1", "good2", "good3")
    assert left["good1"].scores["bad1"] < left["bad"].scores["bad1"]


def test_implicit_asks_the_systems_themselves():
    world = cc.simulate(RATES, queries=10, seed=6)

    def system(m):
        return lambda sentence, q: cc.same_claim(sentence, world.responses[m][q])

    evidence = cc.implicit(world.responses, {m: system(m) for m in RATES}, list(range(10)))
    found = evidence.rank()
    own = {m: [[t] for t in texts] for m, texts in world.responses.items()}
    assert found.scores == pytest.approx(cc.explicit(world.responses, own, cc.same_claim).rank().scores)
    assert found.correlation(world.errors).value > 0.9
    soft = cc.implicit({"a": ["One."], "b": [""]}, {"x": lambda s, q: 0.3}, ["q"])
    assert soft.rank().scores["a"] == pytest.approx(0.3) and math.isnan(soft.rank().scores["b"])


def test_a_text_judge_is_asked_once_and_its_failures_counted(tmp_path):
    def call(prompts):
        return ["hm" if "Two." in p else "Yes." if "one" in p else "No." for p in prompts]

    judge = cc.Support(Judge(call, "j", cc.read_support, keep=tmp_path / "said.jsonl"))
    answers = {"a": ["One. Two."], "b": ["Three."]}
    evidence = cc.explicit(answers, {"a": [["only one"]], "b": [["nothing\nhere"]]}, judge)
    assert judge.judge.calls == evidence.pairs == 6 and judge.unreadable == 2
    assert evidence.rank().scores == {"a": 0.75, "b": 0.0}
    assert judge("Two.", "x") is None and judge("Three.", "one") == 0.0
    for bad in (None, len):
        with pytest.raises((ValueError, TypeError), match="judge must be"):
            cc.Support(bad)
    with pytest.raises(ValueError, match=r"template must hold \{"):
        cc.Support(judge.judge, "{context}")


def test_measures_of_consistency():
    def shared(a, b):
        return len({*a.lower().split()} & {*b.lower().split()}) / len({*a.lower().split()} | {*b.lower().split()})

    verdict = cc.unlike(shared)
    assert verdict("A dog runs.", "It rains. A dog runs.") == 0 and verdict("A dog", "") is None
    assert 0 < verdict("A dog sleeps.", "It rains. A dog runs.") < 1
    assert cc.contradiction(0.0, 0.0) is None and cc.contradiction(1.0, 0.0) == 1.0
    assert cc.sentences("U.S. Grant won. He (Mr. X) e.g. 3 of 4. 5 came") == [
        "U.S. Grant won.",
        "He (Mr. X) e.g. 3 of 4.",
        "5 came",
    ]
    assert cc.sentences("1. One thing\n2) two?! Three...\n\n---") == ["One thing", "two?!", "Three..."]


TWO = {"a": ["X."], "b": ["Y."]}
PASSAGES = {"a": [["X."]], "b": [["Y."]]}


@pytest.mark.parametrize("change,error,word", [
    (dict(judge=None), ValueError, "judge must be given.*none by default"), (dict(judge=1), TypeError, "be a callable"),
    (dict(responses={}), ValueError, "responses is empty"), (dict(passages={}), ValueError, "passages is empty"),
    (dict(responses={"a": "X."}), TypeError, r"responses\['a'\] must be a text per query"),
    (dict(responses={"a": ["X."], "b": []}), ValueError, "same queries"),
    (dict(responses={"a": [], "b": []}), ValueError, "one at least"),
    (dict(passages={"a": [["X."]], "b": []}), ValueError, r"passages\['b'\] must hold samples"),
    (dict(passages={"a": ["X."]}), ValueError, r"passages\['a'\]"),
    (dict(passages={"a": [[]]}), ValueError, "one at least"),
    (dict(judge=lambda s, p: 1.5), ValueError, "a verdict must be"), (dict(most=0), ValueError, "most"),
])  # fmt: skip
def test_bad_evidence(change, error, word):
    with pytest.raises(error, match=word):
        cc.explicit(**{"responses": TWO, "passages": PASSAGES, "judge": lambda s, p: 0.0, "most": 1, **change})


@pytest.mark.parametrize("change,error,word", [
    (dict(weights="loud"), ValueError, "weights="), (dict(weights={"a": 1.0}), ValueError, r"lacks \['b'\]"),
    (dict(weights={"a": -1.0, "b": 1.0}), ValueError, r"weights\['a'\]"), (dict(na=2.0), ValueError, "na"),
    (dict(na="keep"), ValueError, "na="), (dict(temperature=0), ValueError, "temperature"),
    (dict(families={"a": "f"}), ValueError, r"lacks \['b'\]"),
    (dict(weights={"a": 0.0, "b": 0.0}), ValueError, "not be 0 throughout"),
    (dict(families={"a": "f", "b": "f"}), ValueError, "no evidence on 'a'"),
    (dict(without=["c"]), ValueError, "without"), (dict(without=["a", "b"]), ValueError, "no source is left"),
    (dict(include_self=1), TypeError, "include_self"),
])  # fmt: skip
def test_bad_rankings(change, error, word):
    evidence = cc.explicit(TWO, PASSAGES, lambda s, p: 0.0)
    with pytest.raises(error, match=word):
        evidence.rank(**change)
    with pytest.raises(ValueError, match="three systems"):
        evidence.rank().correlation({"a": 1.0})
    with pytest.raises(ValueError, match="two at least"):
        evidence.leave_family_out({"a": "f", "b": "f"})
    with pytest.raises(ValueError, match="systems is empty"):
        cc.implicit(TWO, {}, ["q"])
    with pytest.raises(ValueError, match="as many as answers"):
        cc.implicit(TWO, {"a": cc.same_claim}, [])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="rates is empty"):
        cc.simulate({})
    with pytest.raises(TypeError, match="samples must be a sequence"):
        cc.selfcheck("a is b.", "a is b.", cc.same_claim)
    with pytest.raises(ValueError, match=r"reference must hold every system; it lacks \['y'\]"):
        cc.Ranking(("x", "y"), np.zeros((2, 1))).by_answer({"x": [1.0]})
