"""Canvases: small things on large pictures, and choices that are true of them."""

import pytest
import torch

pytest.importorskip("sklearn")
from attnlib.bench.data import scenes
from attnlib.bench.worlds import canvas


def test_numbers_and_parts_make_the_canvas():
    a, b = canvas.make_canvas(3, "dev"), canvas.make_canvas(3, "dev")
    assert torch.equal(a.image, b.image) and a.things == b.things and a.image.dtype == torch.float32
    others = [canvas.make_canvas(4, "dev"), canvas.make_canvas(3, "test"), canvas.make_canvas(3, "train")]
    assert not any(torch.equal(a.image, other.image) for other in others)


def test_things_of_a_canvas_are_small_and_where_it_says():
    for number in range(6):
        made = canvas.make_canvas(number, "test")
        assert len({t.name for t in made.things}) == len({t.cell for t in made.things}) == 8
        for thing in made.things:
            left, top, right, bottom = thing.box
            low, high = ((4, 8), (8, 8)) if thing.name.startswith("digit") else ((9, 9), (14, 14))
            assert low[0] <= right - left <= high[0] and low[1] <= bottom - top <= high[1]
            inside = made.image[:, top:bottom, left:right]
            assert float((inside - scenes.BACKGROUND).abs().amax(0).gt(0.4).float().mean()) > 0.2
        outside = torch.ones(512, 512, dtype=torch.bool)
        for thing in made.things:
            outside[thing.cell[1] : thing.cell[3], thing.cell[0] : thing.cell[2]] = False
        assert float((made.image[:, outside] - scenes.BACKGROUND).abs().max()) < 0.6  # noise alone


def test_choices_of_a_canvas_are_true_and_every_kind_comes():
    kinds = set()
    for number in range(8):
        made = canvas.make_canvas(number, "test")
        places = {t.name: ((t.cell[0] + t.cell[2]) / 2, (t.cell[1] + t.cell[3]) / 2) for t in made.things}
        for choice in canvas.choices(made):
            kinds.add(choice.kind)
            assert choice.task == ("cross" if choice.kind == "relation" else "single")
            words = choice.text.split()
            if choice.kind == "presence":
                assert (choice.answer == "yes") == (" ".join(words[3:5]) in places)
            elif choice.kind == "colour":
                assert f"{choice.answer} {words[4]}" in places
            elif choice.kind == "digit":
                assert f"digit {choice.answer}" in places
            elif choice.kind == "quarter":
                x, y = places[choice.about[0].name]
                assert choice.answer == f"{'top' if y < 256 else 'bottom'} {'left' if x < 256 else 'right'}"
            else:
                (ax, ay), (bx, by) = (places[t.name] for t in choice.about)
                truth = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
                assert truth[choice.answer]
    assert kinds == set(canvas.KINDS)


def test_options_turn_in_a_circle():
    choice = canvas.choices(canvas.make_canvas(0), "quarter")[0]
    turned = [choice.turned(k) for k in range(5)]
    assert {t.answer for t in turned} == {choice.answer} and turned[4] == choice
    assert sorted(t.right for t in turned[:4]) == [0, 1, 2, 3]


def test_bad_canvases():
    for kwargs, match in (({"side": 100}, "multiple of 64"), ({"count": 21}, "at most 20"), ({"count": 0}, "count")):
        with pytest.raises(ValueError, match=match):
            canvas.make_canvas(0, **kwargs)
    made = canvas.make_canvas(0)
    with pytest.raises(ValueError, match="absent"):
        canvas.choices(made, absent=made.things[0].name)
    with pytest.raises(ValueError, match="kind="):
        canvas.choices(made, "shape")
