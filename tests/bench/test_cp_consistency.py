"""C&P consistency: stubs, the table of cases, matching, the builder of three tasks, boxes with units."""

import numpy as np
import pytest

from attnlib.bench.evaluate import Unreadable, evaluate
from attnlib.bench.exams import consistency as cp
from attnlib.bench.exams.consistency import Box, Sample, match

WORDS = [c * 6 for c in "abcdefghijklmnopqrstuvwxyz"]  # unlike each other


def documents(count, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        texts = rng.permutation(WORDS)[:5].tolist()
        read = [(t, Box(10, 20 * j, 90, 20 * j + 15, "pixels")) for j, t in enumerate(texts)]
        rows.append((f"d{i}", f"Which word is on line {i % 5}?", texts[i % 5], read))
    return cp.extractive(rows).samples


@pytest.fixture(scope="module")
def samples():
    return documents(300)


def test_a_stub_that_copies_is_consistent_and_one_that_guesses_is_not(samples):
    rng = np.random.default_rng(1)
    read = {s.id: s.answer if rng.random() < 0.6 else str(rng.choice(WORDS)) for s in samples}
    copied = cp.compare(samples, read, read)
    assert copied.consistency == 1.0 and 0.55 < copied.perception == copied.cognition < 0.7
    guessed = {s.id: str(rng.choice(WORDS)) for s in samples}
    report = cp.compare(samples, guessed, {s.id: s.answer for s in samples})
    assert report.consistency < 0.08 and report.perception == 1.0
    gap = copied.against(report, "consistency")
    assert gap.low > 0.9 and gap.n == 300 and copied.interval("consistency")[0] > 0.98


def test_cases_sum_up(samples):
    rng = np.random.default_rng(2)
    said, read = ({s.id: s.answer if rng.random() < 0.5 else str(rng.choice(WORDS)) for s in samples} for _ in "ab")
    for mode in ("equal", "contained"):
        report = cp.compare(samples, said, read, mode)
        assert sum(report.cells.values()) == len(samples) == sum(report.named().values())
        assert report.consistency == sum(n for c, n in report.cells.items() if c[0]) / len(samples)
        assert report.cognition == sum(n for c, n in report.cells.items() if c[1]) / len(samples)
    by_hand = [(match(said[s.id], read[s.id]), said[s.id] == s.answer, read[s.id] == s.answer) for s in samples]
    strict = cp.compare(samples, said, read, right=lambda text, truth: text == truth)
    assert list(strict.cases.values()) == by_hand and strict.to_dict()["n"] == 300
    assert all(
        strict.named()[k] > 0 for k in ("consistent and right", "conflict, cognition right", "conflict, both wrong")
    )


@pytest.mark.parametrize("a,b,equal,contained", [
    ("Total", "TOTAL", True, True), ("new york", "New-York", True, True), ("New York", "NewYork", True, True),
    ("1,250", "1250", True, True), ("1 250", "1,250", True, True), ("1'250'000", "1,250,000", True, True),
    ("$1,250.50", "1250.50", True, True), ("12.5", "125", False, False), ("1.25", "1,25", False, False),
    ("-5", "5", False, False), ("-5", "\u22125", True, True), ("a-5", "a5", True, True), ("50 %", "50", True, True),
    ("12", "The number 12.", False, True), ("12", "125", False, False), ("12", "a 1 2", False, True),
    ("a cat", "a catalogue", False, False), ("the cat", "I see the cat!", False, True),
    ("I see the cat", "the cat", False, False),
    ("", "", False, False), ("", "x", False, False), ("x", "", False, False), (" .,!", "x", False, False),
    ("!", "!", False, False), ("\ufb01ne", "FINE", True, True), ("caf\u00e9", "cafe\u0301", True, True),
    ("Stra\u00dfe", "STRASSE", True, True),
    ("2019-2020", "2019 2020", True, True),
])  # fmt: skip
def test_match(a, b, equal, contained):
    assert match(a, b) is equal is match(b, a) and match(a, b, "contained") is contained


def test_likeness_is_anls():
    assert cp.likeness("kitten", "sitting") == pytest.approx(1 - 3 / 7) and cp.likeness("ab", "xy") == 0.0
    assert (
        cp.likeness("", "x") == 0.0 and cp.likeness("kitten", "sitting", 0.6) == 0.0 and cp.likeness("A.", "a") == 1.0
    )


def test_only_answers_in_one_box_are_asked():
    box = Box(0, 0, 1, 1, "unit")
    rows = [
        ("a", "q", "12", [("No. 12", box), ("112", box)]), ("b", "q", "13", [("12", box)]),
        ("c", "q", "x", [("x", box), ("X!", box)]), ("d", "q", "y", []),
    ]  # fmt: skip
    found = cp.extractive(rows)
    assert [s.id for s in found.samples] == ["a"] and (found.nowhere, found.several) == (2, 1)
    assert found.samples[0].others == ("112",) and not cp.extractive(rows, "equal").samples


def test_silence_is_not_consistent(samples):
    some = samples[:4]
    report = cp.compare(
        some, dict.fromkeys((s.id for s in some), ""), dict.fromkeys((s.id for s in some), " ."), "contained"
    )
    assert report.consistency == 0 and report.silent == 8


def test_a_model_is_asked_through_evaluate(samples):
    some = samples[:6]
    truth = {s.id: s for s in some}

    def model(prompts, items):
        assert all("pixels" in p or "Answer with words" in p for p in prompts)
        return [truth[i.id].answer for i in items]

    said, read = (
        {a.item.id: a.text for a in evaluate(cp.queries(some, w), model, lambda t, i: t).answers}
        for w in ("answer", "read")
    )
    assert cp.compare(some, said, read).named()["consistent and right"] == 6


def test_boxes_tell_their_units():
    box = Box(100, 50, 200, 150, "pixels")
    assert (
        box.to("unit", (400, 200)).corners == (0.25, 0.25, 0.5, 0.75)
        and str(box.to("thousand", (400, 200))) == "[250, 250, 500, 750]"
    )
    assert box.to("unit", (400, 200)).to("pixels", (400, 200)) == box and box.iou(box) == 1.0
    assert (
        box.iou(Box(150, 50, 250, 150, "pixels")) == pytest.approx(1 / 3)
        and box.iou(Box(300, 0, 400, 10, "pixels")) == 0
    )
    for bad, word in (
        ((5, 0, 5, 4, "pixels"), "right > left"), ((0, 4, 4, 3, "pixels"), "bottom > top"),
        ((0, 0, 2, 1, "unit"), "right"), ((0, 0, 1, 1, "cm"), "units"), ((-1, 0, 1, 1, "pixels"), "left"),
        ((0, 0, float("nan"), 1, "pixels"), "right"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Box(*bad)
    with pytest.raises(TypeError, match="units"):
        Box(0, 0, 1, 1)
    with pytest.raises(ValueError, match="size must be given"):
        box.to("unit")
    with pytest.raises(ValueError, match="same units"):
        box.iou(box.to("unit", (400, 200)))


def test_task_consistency(samples):
    some = samples[:4]
    found = cp.verified({"a": "Yes.", "b": "no", "c": "hm", "d": "yes"})
    assert (found.share, found.coverage) == (0.5, 0.75)
    boxes = {
        some[0].id: str(some[0].box),
        some[1].id: "[0, 0, 5, 5]",
        some[2].id: "somewhere",
        some[3].id: "[5, 5, 1, 1]",
    }
    place = cp.grounded(some, boxes)
    assert (place.share, place.coverage) == (0.25, 0.5)
    units = {s.id: str(s.box.to("thousand", (100, 100))) for s in some}
    assert cp.grounded(some, units, units="thousand", size=(100, 100)).share == 1.0
    for bad in ("[1, 2, 3]", "__import__('os')", "[1, 2, 3, NaN]", "[9, 2, 3, 4]"):
        with pytest.raises(Unreadable):
            cp.read_box(bad, "pixels")
    with pytest.raises(ValueError, match="no answers"):
        cp.verified({})
    with pytest.raises(ValueError, match="boxes lacks"):
        cp.grounded(some, {})


@pytest.mark.parametrize("tasks", [("perceptual",), ("connector", "cognitive"), tuple(cp.TASKS)])
def test_builder_gives_exactly_what_is_asked(samples, tasks):
    made = cp.records(samples[:20], tasks, "thousand", (100, 100))
    wanted = [kind for t in tasks for kind in cp.TASKS[t]]
    for s in samples[:20]:
        own = [r for r in made if r.sample == s.id]
        assert [r.kind for r in own] == wanted
        assert {r.answer for r in own} == {s.answer} and {r.box for r in own} == {s.box.to("thousand", (100, 100))}
        for r in own:
            if r.kind == "connect":
                assert (
                    cp.linked(r.target) == [s.answer] * 2 and r.target.count("<link>") == r.target.count("</link>") == 2
                )
                assert str(r.box) in r.prompt and str(r.box) in r.target
            elif r.kind == "verify":
                assert (r.target == "yes") == match(r.prompt.split('"')[1], s.answer)
            else:
                assert r.target == (str(r.box) if r.kind == "locate" else s.answer) and cp.linked(r.target) == []
    said = [r.target for r in made if r.kind == "verify"]
    assert said.count("yes") == said.count("no")


def test_links_that_do_not_close():
    for text in ("<link>a", "a</link>", "<link><link>a</link></link>", "</link>a<link>"):
        with pytest.raises(Unreadable):
            cp.linked(text)


@pytest.mark.parametrize("change,error,word", [
    (dict(samples=[]), ValueError, "one at least"), (dict(mode="near"), ValueError, "mode"),
    (dict(cognition={}), ValueError, "cognition lacks 2 of 2"), (dict(perception="x"), TypeError, "perception"),
    (dict(cognition={"d0": 1, "d1": "x"}), TypeError, r"cognition\['d0'\] must be a text"),
])  # fmt: skip
def test_bad_input(samples, change, error, word):
    texts = {"d0": "x", "d1": "x"}
    with pytest.raises(error, match=word):
        cp.compare(**{"samples": samples[:2], "cognition": texts, "perception": texts, **change})
    with pytest.raises(ValueError, match="different ids"):
        cp.compare([samples[0]] * 2, texts, texts)
    with pytest.raises(ValueError, match="answer of sample 'x' must hold a word"):
        Sample("x", "q", "...", samples[0].box)
    with pytest.raises(TypeError, match="box must be a Box"):
        Sample("x", "q", "a", (0, 0, 1, 1))
    with pytest.raises(ValueError, match="two different tokens"):
        cp.records(samples[:2], link=("<l>", "<l>"))
    with pytest.raises(ValueError, match="holds a link token"):
        cp.records([Sample("x", "q", "a <link> b", samples[0].box, ("c",))])
    with pytest.raises(ValueError, match="others of sample 'y'"):
        cp.records([samples[0], Sample("y", "q", "a", samples[0].box)])
    with pytest.raises(ValueError, match="tasks"):
        cp.records(samples[:2], ("smell",))
    with pytest.raises(ValueError, match=r"prompts\['read'\] holds \{place\}"):
        cp.queries(samples[:2], "read", {"read": "What stands at {place}?"})
    with pytest.raises(ValueError, match="prompts must hold a wording for 'locate', it has"):
        cp.records(samples[:2], prompts={"read": "What stands at {box}?"})


@pytest.mark.parametrize("call,error,word", [
    (lambda b: b.iou((0, 0, 1, 1)), TypeError, r"other must be Box, got \(0, 0, 1, 1\)"),
    (lambda b: b.to("pixels", (0, 4)), ValueError, r"size\[0\] must be .*above 0, got 0"),
    (lambda b: b.to("pixels", (4,)), ValueError, "size must be the width and height"),
    (lambda b: b.to("pixels", 5), TypeError, "size"),
    (lambda b: b.to("pixels", ("a", 4)), TypeError, r"size\[0\] must be .*got 'a'"),
])  # fmt: skip
def test_bad_boxes(call, error, word):
    with pytest.raises(error, match=word):
        call(cp.Box(0, 0, 1, 1, "unit"))
