"""Worlds for multimodal models: numbered, the same every time, and what they tell is in the picture."""

import numpy as np
import pytest
import torch

from attnlib.bench.worlds import camouflage, forms, geometry, numbered, screens

MAKERS = {
    "hidden": camouflage.make_hidden, "drawing": geometry.make_drawing, "screen": screens.make_screen,
    "form": forms.make_form,
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_and_parts_make_the_picture(name):
    make = MAKERS[name]
    a, b = make(3, "dev"), make(3, "dev")
    assert torch.equal(a.image, b.image) and a.image.dtype == torch.float32
    assert 0 <= float(a.image.min()) and float(a.image.max()) <= 1
    others = [make(4, "dev"), make(3, "test"), make(3, "train")]
    assert not any(torch.equal(a.image, other.image) for other in others)
    with pytest.raises(ValueError, match="number"):
        make(-1)
    with pytest.raises(ValueError, match="part="):
        make(0, "valid")


def test_draws_do_not_depend_on_the_machine():
    """Fixed by the algorithm of numpy's generator, not by this run."""
    assert numbered.generator("canvas", 3, "test").integers(0, 1000, 4).tolist() == [708, 376, 251, 354]


def test_letters_differ_and_fit():
    drawn = [numbered.lettering(sign) for sign in numbered.SIGNS]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    image = np.zeros((3, 12, 20), dtype=np.float32)
    assert numbered.put(image, "ab", 1, 2, (1, 1, 1), 2) == (2, 1, 16, 11)
    assert image[:, :, :2].sum() == image[:, 11:].sum() == 0 and image.sum() > 0
    with pytest.raises(ValueError, match="does not fit"):
        numbered.put(image, "abc", 1, 2, (1, 1, 1), 2)
    with pytest.raises(ValueError, match="text must be of"):
        numbered.lettering("é")


# ---- camouflage


def test_inside_and_outside_share_colours_brightness_and_spread():
    means, spreads = [], []
    for number in range(40):
        made = camouflage.make_hidden(number)
        inside, outside = made.image[:, made.mask], made.image[:, ~made.mask]
        means.append(float((inside.mean(1) - outside.mean(1)).abs().max()))
        spreads.append(float((inside.std(1) / outside.std(1)).mean()))
        left, top, right, bottom = made.box
        assert bool(made.mask[top:bottom, left:right].any(0).all()) and int(made.mask.sum()) == int(
            made.mask[top:bottom, left:right].sum()
        )
    assert np.mean(means) < 0.03 and 0.95 < np.mean(spreads) < 1.05


def test_the_direction_tells_and_without_turn_and_cut_nothing_does():
    def direction(image, mask):
        grey = image.mean(0)
        dy, dx = grey.diff(dim=0)[:, :-1][mask[1:, 1:]], grey.diff(dim=1)[:-1][mask[1:, 1:]]
        return 0.5 * float(torch.atan2(2 * (dx * dy).mean(), (dx * dx - dy * dy).mean()))

    turned = 0
    for number in range(60):
        made = camouflage.make_hidden(number, turn=np.pi / 4, noise=0.0)
        if made.texture != "weave":
            gap = (direction(made.image, made.mask) - direction(made.image, ~made.mask)) % np.pi
            turned += abs(gap - np.pi / 4) < 0.45
    assert turned >= 25
    a, b = (camouflage.make_hidden(1, turn=0.0, cut=cut, noise=0.0) for cut in (False, True))
    outside = torch.equal(a.image[:, ~a.mask], b.image[:, ~a.mask])
    assert outside and not torch.equal(a.image, b.image)


# ---- geometry


def test_junctions_are_on_ink_and_of_every_kind():
    kinds = {}
    for number in range(40):
        made = geometry.make_drawing(number)
        away = torch.nn.functional.max_pool2d(made.boundary[None].float(), 3, 1, 1)[0]
        for j in made.junctions:
            kinds[j.kind] = kinds.get(j.kind, 0) + 1
            assert away[int(j.y), int(j.x)] == 1
            assert float(made.heat(j.kind)[int(j.y), int(j.x)]) > 0.75
        corners = sum(len(p.corners) for p in made.polygons)
        assert corners == sum(j.kind == "L" for j in made.junctions)
        assert {p.name for p in made.polygons} <= set(geometry.SHAPES)
        ink = made.image.mean(0)
        assert float(ink[made.boundary].mean()) < 0.45 < 0.75 < float(ink[~away.bool()].median())
    assert min(kinds.values()) >= 10 and set(kinds) == set(geometry.JUNCTIONS)


def test_crossings_follow_from_the_lines():
    """Counted anew, from signs of areas."""

    def sign(a, b, c):
        return np.sign((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))

    for number in range(40):
        made = geometry.make_drawing(number, "test")
        count = 0
        for i, a in enumerate(made.lines):
            for b in made.lines[:i]:
                p, q, r, s = a[:2], a[2:], b[:2], b[2:]
                gaps = [min(np.hypot(e[0] - f[0], e[1] - f[1]) for f in (r, s)) for e in (p, q)]
                if min(gaps) > 1e-6 and sign(p, q, r) != sign(p, q, s) and sign(r, s, p) != sign(r, s, q):
                    count += 1
        met = [j for j in made.junctions if j.kind != "L"]
        begun = sum(j.kind == "T" for j in met)  # rounding decides whether a line that ends on another crosses it
        assert len(met) - begun <= count <= len(met)


def test_bad_heat():
    with pytest.raises(ValueError, match="kind must be"):
        geometry.make_drawing(0).heat("Y")


# ---- screens and forms


def test_widgets_lie_apart_on_the_screen_and_can_be_told_by_their_words():
    kinds, dark = set(), 0
    for number in range(30):
        made = screens.make_screen(number)
        dark += made.dark
        height, width = made.image.shape[1:]
        covered = np.zeros((height, width), dtype=int)
        for w in made.widgets:
            left, top, right, bottom = w.box
            assert 0 <= left < right <= width and 0 <= top < bottom <= height
            covered[top:bottom, left:right] += 1
            kinds.add(w.kind)
        assert covered.max() == 1
        asked = screens.tasks(made)
        assert len({t.text for t in asked}) == len(asked)
        assert all(made.at(*t.centre) is t.target for t in asked)
        assert made.at(width - 1, height - 1) is None or covered[-1, -1]
        brightness = float(made.image[:, 19:].median())
        assert (brightness < 0.5) == made.dark
    assert kinds == set(screens.KINDS) and 5 < dark < 25


def test_ticks_show():
    for number in range(20):
        for w in screens.make_screen(number).widgets:
            if w.kind == "tick":
                left, top, right, bottom = w.box
                made = screens.make_screen(number)
                middle, edge = (float(made.image[0, top + 7, left + k]) for k in (7, 2))
                assert (abs(middle - edge) > 0.3) == w.on


def test_forms_hold_what_they_say():
    empty = filled = 0
    for number in range(20):
        made = forms.make_form(number)
        asked = forms.questions(made)
        assert len({q.text for q in asked}) == len(asked) == len(made.entries)
        for entry, q in zip(made.entries, asked, strict=True):
            left, top, right, bottom = entry.box
            blue = made.image[2] - made.image[0]
            written = bool((blue[top + 1 : bottom - 1, left + 1 : right - 1] > 0.3).any())
            assert written == (entry.value not in ("", "no"))
            empty += entry.value == ""
            filled += written
            assert q.answer == (entry.value or forms.EMPTY)
            assert entry.name_box[2] <= left and bottom <= forms.HEIGHT and right <= forms.WIDTH
    assert empty > 5 and filled > 30
