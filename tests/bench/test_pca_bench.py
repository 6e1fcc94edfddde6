"""PCA-Bench: the six-line parser, the scores by hand and by the authors' code, errors located, the action by letter."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from attnlib.bench.data.files import DataError
from attnlib.bench.evaluate import Unreadable
from attnlib.bench.exams import pca
from attnlib.bench.exams.pca import Instance, Scores, parse_scores, score
from attnlib.bench.stats import mean_interval

FIXTURE = Path(__file__).parents[1] / "fixtures" / "pca-bench.safetensors"
WHAT = ("action", "perception", "cognition")


def reply(scores, evidence="evidence"):
    return "\n".join(f"{w} {evidence}: because: so\n{w} score: {s}" for w, s in zip(WHAT, scores, strict=True))


def number(prompt):
    return int(prompt.split("<<<\n")[1].split("\n")[0])


@pytest.fixture(scope="module")
def cases():
    return pca.own_instances(120)


def recorded():
    with safe_open(FIXTURE, "np") as f:
        return json.loads(f.metadata()["texts"]), f.get_tensor("scores"), f.get_tensor("averages")


def test_well_formed_replies_as_the_authors_read_them():
    texts, scores, averages = recorded()
    found = [parse_scores(t) for t in texts]
    assert [tuple(f) for f in found] == [tuple(row) for row in scores]
    cases = [Instance(str(i), f"q{i}", ("a", "b"), 0, ("k",), "r", "d") for i in range(len(texts))]
    report = score(
        cases,
        ["x"] * len(texts),
        pca.make_judge(lambda p: [texts[int(q.split("Question: q")[1].split()[0])] for q in p], "t"),
    )
    shares = [report.summary(m).share for m in (*WHAT, "genuine")]
    np.testing.assert_allclose(shares, averages, atol=1e-12)


@pytest.mark.parametrize("text", [
    reply((1, 0, 1)).upper(), reply((1, 0, 1)).replace("\n", "\n\n"), reply((1, 0, 1), "assessment evidence"),
    reply(("1.0", "0", "1")),
])  # fmt: skip
def test_parser_takes_six_lines_in_any_case(text):
    assert parse_scores(text) == Scores(1, 0, 1)


@pytest.mark.parametrize("text", [
    "", "1\n0\n1", "Sure!\n" + reply((1, 0, 1)), reply((1, 0, 1)) + "\nDone.", reply((1, 0, 2)), reply((1, 0, 0.5)),
    reply((1, 0, "1 or 0")), reply((1, 0, "")), reply((1, 0, "1;import os")), reply((True, 0, 1)), reply((1, 0, -1)),
    "\n".join(reply((1, 0, 1)).split("\n")[2:] + reply((1, 0, 1)).split("\n")[:2]), reply((1, 0, 1)).replace(":", ""),
    "\n".join(reply((1, 0, 1)).split("\n")[:5]), reply((1, 0, 1)).replace("perception", "vision"),
])  # fmt: skip
def test_parser_rejects_anything_else(text):
    with pytest.raises(Unreadable):
        parse_scores(text)


def test_a_line_more_would_shift_the_scores_of_a_reader_by_position():
    shifted = "Here are the scores:\n" + reply((1, 1, 1)).replace("because: so", "0")
    lines = shifted.split("\n")
    assert [float(lines[i].split(":")[-1]) for i in (1, 3, 5)] == [0, 0, 0]  # read, and wrong, without an error
    with pytest.raises(Unreadable):
        parse_scores(shifted)


def test_hand_computed_table_and_order(cases):
    every = list(itertools.product((0, 1), repeat=3))
    some = cases[:8]
    judge = pca.make_judge(
        lambda prompts: [reply(every[int(p.split("<<<\n")[1].split("\n")[0])]) for p in prompts], "hand"
    )
    report = score(some, [str(i) for i in range(8)], judge)
    assert [report.summary(m).share for m in (*WHAT, "genuine")] == [0.5, 0.5, 0.5, 0.125]
    assert report.errors == {"perception": 2, "cognition": 1, "action": 1}
    assert report.error_shares == {"perception": 0.5, "cognition": 0.25, "action": 0.25}
    turned = score(some[::-1], {c.id: str(i) for i, c in enumerate(some)}, judge)
    for m in (*WHAT, "genuine"):
        assert turned.summary(m) == report.summary(m)
    assert turned.errors == report.errors
    assert set(report.by_domain()) == {"Grid"} and report.by_domain()["Grid"].genuine.share == 0.125
    kept = json.loads(json.dumps(report.to_dict()))
    assert kept["judge"] == ["hand"] and len(kept["reviews"]) == 8 and kept["genuine"]["coverage"] == 1


def test_genuine_is_bounded_and_equals_action_when_the_rest_is_right(cases):
    rng = np.random.default_rng(0)
    for p in (0.2, 0.5, 0.9):
        drawn = (rng.random((60, 3)) < p).astype(int)
        judge = pca.make_judge(
            lambda prompts, drawn=drawn: [reply(drawn[int(q.split("<<<\n")[1].split("\n")[0])]) for q in prompts],
            f"j{p}",
        )
        report = score(cases[:60], [str(i) for i in range(60)], judge)
        assert report.genuine.share <= min(report.summary(m).share for m in WHAT)
    judge = pca.make_judge(lambda prompts: [reply((int("(A)" in q.split("<<<")[1]), 1, 1)) for q in prompts], "pc")
    report = score(cases[:60], [f"({'AB'[i % 3 == 0]})" for i in range(60)], judge)
    assert report.genuine == report.action and report.perception.share == report.cognition.share == 1


@pytest.mark.parametrize("step", pca.STEPS)
def test_planted_errors_are_located(cases, step):
    rng = np.random.default_rng(1)
    fails = rng.random(len(cases)) < 0.4
    said = [
        pca.oracle(c, seen=not (f and step == "perception"), reasoned=not (f and step != "action"), acted=not f)
        for c, f in zip(cases, fails, strict=True)
    ]
    report = score(cases, said, pca.rule_judge(cases))
    assert report.errors == {s: int(fails.sum()) * (s == step) for s in pca.STEPS}
    assert report.action.share == pytest.approx(1 - fails.mean()) and report.genuine == report.action


def test_keyword_baseline_follows_the_judge(cases):
    """A judge that knows the truth, on answers that see half of the time and say it in other words at times."""
    rng = np.random.default_rng(2)
    saw = rng.random(len(cases)) < 0.5
    said = [
        pca.oracle(c, seen=bool(s)).replace("cell", "square" if rng.random() < 0.2 else "cell")
        for c, s in zip(cases, saw, strict=True)
    ]
    keyword = [pca.keyword_perception(c, a) for c, a in zip(cases, said, strict=True)]
    assert np.corrcoef(keyword, saw)[0, 1] > 0.6
    case = Instance("x", "q", ("a", "b"), 0, ("Red  Ball", "nothing else"), "r")
    assert pca.keyword_perception(case, "there is a red ball!") and not pca.keyword_perception(case, "a red balloon")


def test_action_by_letter_needs_no_judge(cases):
    said = {c.id: pca.oracle(c, acted=i % 4 > 0) if i % 5 else "I cannot say." for i, c in enumerate(cases)}
    found = pca.action_scores(cases, said)
    assert found.unreadable == 24 and found.mean("right") == pytest.approx(
        sum(i % 4 > 0 for i in range(120) if i % 5) / 96
    )
    assert all(item.options and item.image is not None for item in pca.items(cases))


def test_own_instances_are_true(cases):
    """By the scene: the step goes along the longer way, towards the thing, and every letter is right as often."""
    assert pca.own_instances(3, seed=2) == pca.own_instances(3, seed=2) != pca.own_instances(3, seed=3)
    for case in cases:
        start, goal = (case.question.split("in cell ")[1][:2], case.key_concept[1][-2:])
        down, right = ord(goal[0]) - ord(start[0]), int(goal[1]) - int(start[1])
        move = case.actions[case.answer_index].split()[1]
        assert {"down": down, "up": -down, "right": right, "left": -right}[move] == max(abs(down), abs(right)) > 0
    share = mean_interval([float(c.answer_index == 0) for c in cases])
    assert share.low < 0.25 < share.high


def test_unreadable_judgements_are_apart(cases):
    said = [pca.oracle(c) for c in cases]
    report = score(cases, said, pca.rule_judge(cases, slips=0.7))
    assert 0.5 < report.genuine.coverage < 0.8 and report.genuine.share == 1  # three tries: 1 - 0.7 ** 3 = 0.66
    strict = score(cases, said, pca.rule_judge(cases, slips=0.7), unreadable="wrong")
    assert strict.genuine.share == pytest.approx(report.genuine.coverage)
    none = score(cases[:4], said[:4], pca.rule_judge(cases, slips=1.0))
    assert math.isnan(none.genuine.share) and none.genuine.unreadable == 1
    assert all(math.isnan(v) for v in none.error_shares.values())


def test_files_of_the_release(tmp_path):
    row = {"question": "q", "actions": ["a", "b"], "answer_index": 1, "reason": "r", "key_concept": ["k"],
           "domain": "Domestic Robot", "version": "1.0"}  # fmt: skip
    (tmp_path / "meta.json").write_text(json.dumps([row, {**row, "index": 7, "image": "x.jpg"}]))
    found = pca.load_instances(tmp_path / "meta.json")
    assert [c.id for c in found] == ["0", "7"] and found[1].action == "(B) b" and found[1].image == "x.jpg"
    (tmp_path / "out.json").write_text('[{"index": 7, "model_output": "B"}, {"index": 0, "model_output": "A"}]')
    said = pca.read_outputs(tmp_path / "out.json")
    assert pca.action_scores(found, said).mean("right") == 0.5  # by index, not by place
    for change, word in ((dict(answer_index=2), "answer_index"), (dict(actions=["a", "A"]), "differ"),
                         (dict(key_concept="k"), "must be a list")):  # fmt: skip
        (tmp_path / "bad.json").write_text(json.dumps([{**row, **change}]))
        with pytest.raises(DataError, match=word):
            pca.load_instances(tmp_path / "bad.json")
    (tmp_path / "bare.json").write_text(json.dumps([{**row, "key_concept": ["", "k"]}, {**row, "key_concept": []}]))
    bare = pca.load_instances(tmp_path / "bare.json")  # the release has such
    assert [c.key_concept for c in bare] == [("k",), ()] and not pca.keyword_perception(bare[1], "anything")
    with pytest.raises(ValueError, match="no empty text"):
        Instance("x", "q", ("a", "b"), 0, ("", "k"), "r")
    (tmp_path / "twice.json").write_text('[{"index": 7, "model_output": "B"}, {"index": 7, "model_output": "A"}]')
    with pytest.raises(DataError, match="more than once"):
        pca.read_outputs(tmp_path / "twice.json")
    with pytest.raises(DataError, match="nothing is downloaded"):
        pca.load_instances(tmp_path / "none.json")


@pytest.mark.parametrize("change,error,word", [
    (dict(judge=None), ValueError, "judge must be given"), (dict(judge=len), TypeError, "judge must be a Judge"),
    (dict(answers=["x"]), ValueError, "one text per instance, 2, got 1"), (dict(answers="xy"), TypeError, "answers"),
    (dict(answers={"test-0": "x"}), ValueError, "answers lacks"), (dict(answers=[1, 2]), TypeError, "must be str"),
    (dict(cases=[]), ValueError, "cases is empty"), (dict(unreadable="right"), ValueError, "unreadable"),
])  # fmt: skip
def test_bad_input(cases, change, error, word):
    given = {"cases": cases[:2], "answers": ["x", "y"], "judge": pca.rule_judge(cases), **change}
    with pytest.raises(error, match=word):
        score(**given)
    with pytest.raises(ValueError, match="ids of their own"):
        score([cases[0]] * 2, ["x", "y"], pca.rule_judge(cases))


def test_rules_know_their_own_cases():
    cases = pca.own_instances(2)
    with pytest.raises(ValueError, match="the rules know their own cases only"):
        pca.score(pca.own_instances(2, seed=1), ["x", "y"], pca.rule_judge(cases))
    with pytest.raises(TypeError, match="answer must be str"):
        pca.keyword_perception(cases[0], None)
