"""Bars of the small multimodal model: the questions are fair, and shares are right by hand."""

from collections import Counter

import pytest

pytest.importorskip("sklearn")
from attnlib.bench.data import scenes
from attnlib.bench.data.scenes import Item
from attnlib.bench.studies import multimodal_bars as bars


@pytest.fixture(scope="module")
def items():
    return bars.clear_items(60)


def test_questions_are_about_clear_things_and_true(items):
    assert {item.question.kind for item in items} == set(bars.BARS)
    for item in items:
        scene, q = item.scene, item.question
        assert q in scenes.questions(scene, q.kind)
        clear = {t.name: t for t in scene.things if t.contrast >= bars.CLEAR}
        if q.kind in ("position", "digit"):
            assert q.about in clear
        if q.kind == "content":
            assert q.about in {t.place for t in clear.values()}
        if q.kind in ("colour", "count"):
            assert all(name in clear for name in scene.names if name.endswith(q.about))


def test_names_tell_nothing_about_presence(items):
    counts: dict[str, list[int]] = {}
    for item in items:
        if item.question.kind == "presence":
            counts.setdefault(item.question.about, [0, 0])[item.question.answer == "yes"] += 1
    total = [sum(row[k] for row in counts.values()) for k in (0, 1)]
    assert total[1] >= 58 and total[0] >= total[1] - 2  # the last names may find no scene without them
    assert sum(abs(a - b) for a, b in counts.values()) <= 2


def test_broken_pairs_are_broken():
    found = bars.broken_items(10)
    assert len(found) == 20
    for lists, asked in zip(found[::2], found[1::2], strict=True):
        assert lists.scene is asked.scene and lists.question.kind == "list" and asked.question.answer == "no"
        first = next(a for a, b in scenes.PAIRS if b == asked.question.about)
        assert any(t.name == first and t.contrast >= bars.CLEAR for t in asked.scene.things)


def test_shares_by_hand():
    thing = scenes.Thing
    things = (thing("red circle", 0, 0.9, (0, 0), 0), thing("green cross", 3, 0.2, (0, 0), 0))
    scene = scenes.Scene(things, scenes.make_scene(0).image)
    asked = [scenes.questions(scene, "list")[0], scenes.presence(scene, "blue square")]
    shares = bars._Shares([Item(scene, q) for q in asked], ["red circle , blue square", "yes"])
    assert {k: v[0].tolist() for k, v in shares.sums.items()} == {
        "list": [1, 1], "list: named and there": [1, 2], "second listed": [1, 1], "presence": [0, 1],
        "presence: no": [0, 1], "second affirmed": [1, 1],
    }  # fmt: skip


def test_what_is_known_without_a_picture():
    tell = bars.known(60)
    scene = scenes.make_scene(0, "test")
    counts: dict[str, Counter[str]] = {}
    for item in bars.clear_items(60, 40_000_000, "train"):
        if item.question.kind == "count":
            counts.setdefault(item.question.about, Counter())[item.question.answer] += 1
    asked = scenes.questions(scene, "count")
    assert asked and all(tell(q) == counts[q.about].most_common(1)[0][0] for q in asked)
    assert tell(scenes.questions(scene, "content")[0]).startswith("it is ")


def test_bad_input():
    with pytest.raises(ValueError, match="count"):
        bars.clear_items(0)
    with pytest.raises(ValueError, match="count"):
        bars.measure(1)


@pytest.mark.skipif(not (scenes.weights_folder() / "config.json").is_file(), reason="not a checkout")
def test_the_trained_model_is_measured():
    pytest.importorskip("transformers")
    found = bars.measure(4, first=0, priors=20)
    assert {*bars.BARS, "second of a broken pair listed"} <= set(found["bars"])
    for name, entry in found["bars"].items():
        value, bar = entry["value"], entry["bar"]
        if "known" in entry:
            assert entry["holds"] == (entry["beyond"] <= bar) and entry["beyond"] == pytest.approx(
                value - entry["known"], abs=2e-4
            )
        else:
            assert entry["holds"] == (bar[0] <= value <= bar[1] if isinstance(bar, list) else value >= bar), name
    assert found["bars"]["presence"]["value"] > 0.8 > found["bars"]["without the picture: content"]["value"]
