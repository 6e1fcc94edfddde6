"""Reference labels, the simulated user and how many clicks it takes."""

import json

import pytest
import torch
from safetensors import safe_open

from attnlib.models.dense.clicks import (
    BACKGROUND,
    FOREGROUND,
    MAYBE_BACKGROUND,
    MAYBE_FOREGROUND,
    UNKNOWN,
    Click,
    Interaction,
    clicked,
    interact,
    next_click,
    number_of_clicks,
    overlap,
    predicted,
    region_around,
    squared_depth,
    unknown,
)
from attnlib.models.dense.interformer import normalized_focal_loss
from tests.parity import HERE


@pytest.fixture(scope="module")
def recorded():
    with safe_open(HERE / "interformer-clicks.safetensors", "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])  # noqa: SIM118


def mask(*box, size=(12, 14)):
    out = torch.zeros(size, dtype=torch.bool)
    top, bottom, left, right = box
    out[top:bottom, left:right] = True
    return out


def test_the_authors_labels(recorded):
    """Clicks of both kinds at once, over each other, with and without a likely ring; predictions by turns with them."""
    tensors, cases = recorded
    for name, case in cases.items():
        label = unknown((24, 28))
        for i, points in enumerate(case["clicks"]):
            clicks = [Click(y, x, mode == "positive") for y, x, mode in points]
            label = clicked(label, clicks, case["radius"], case["outer"])
            assert label.equal(tensors[f"{name}/clicked/{i}"].long()), (name, i)
            label = predicted(label, tensors[f"{name}/prediction/{i}"])
            assert label.equal(tensors[f"{name}/predicted/{i}"].long()), (name, i)


def test_the_authors_user(recorded):
    """Theirs draws among the deepest pixels; ours is one of them, and of the same kind."""
    tensors, cases = recorded
    for name, case in cases.items():
        made = []
        for i, (y, x, mode) in enumerate(case["next"]):
            made += [Click(a, b, kind == "positive") for a, b, kind in case["clicks"][i]]
            prediction = tensors[f"{name}/prediction/{i}"].long()
            ours = next_click(prediction, tensors["target"], made)
            assert ours.positive == (mode == "positive")
            wrong = (prediction == 1) != (tensors["target"] == 1)
            wrong &= tensors["target"].bool() if ours.positive else ~tensors["target"].bool()
            for click in made:
                wrong[click.y, click.x] = False
            depth = squared_depth(wrong)
            assert depth[ours.y, ours.x] == depth[y, x] == depth.max()


def test_the_authors_loss(recorded):
    tensors, _ = recorded
    logits = tensors["focal/logits"].clone().requires_grad_()
    loss = normalized_focal_loss(logits, tensors["focal/target"])
    torch.testing.assert_close(loss.detach(), tensors["focal/loss"].mean())
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], tensors["focal/grad"])


def test_what_overwrites_what():
    nothing = unknown((12, 14))
    assert (nothing == UNKNOWN).all()
    held = clicked(nothing, [Click(3, 3, True)], radius=1)
    assert int((held == FOREGROUND).sum()) == 5 and int((held == UNKNOWN).sum()) == 12 * 14 - 5
    told = predicted(held, torch.zeros(12, 14))
    assert (told[held == FOREGROUND] == FOREGROUND).all() and (told[held == UNKNOWN] == MAYBE_BACKGROUND).all()
    # what opposes something likely makes it unknown first
    again = predicted(told, torch.ones(12, 14))
    assert (again[held == UNKNOWN] == UNKNOWN).all()
    assert (predicted(again, torch.ones(12, 14))[held == UNKNOWN] == MAYBE_FOREGROUND).all()
    # later clicks overwrite what is certain
    assert clicked(held, [Click(3, 3, False)], radius=1)[3, 3] == BACKGROUND
    # where rings of both kinds lie over each other nothing is known
    both = clicked(nothing, [Click(5, 4, True), Click(5, 8, False)], radius=0, outer=2)
    assert both[5, 6] == UNKNOWN and both[5, 5] == MAYBE_FOREGROUND and both[5, 7] == MAYBE_BACKGROUND


@pytest.mark.parametrize("size", [(1, 1), (5, 9), (20, 3)])
def test_depth_is_the_distance_to_the_nearest_pixel_outside(size):
    g = torch.Generator().manual_seed(sum(size))
    for share in (0.1, 0.5, 1.0):
        inside = torch.rand(size, generator=g) <= share
        out = torch.nn.functional.pad(~inside, (1, 1, 1, 1), value=True).nonzero().float() - 1
        at = torch.cartesian_prod(*(torch.arange(n) for n in size)).float().view(-1, 2)
        expected = torch.cdist(at, out).square().min(1).values.round().view(size)
        assert squared_depth(inside).equal(torch.where(inside, expected, 0).int())


def test_the_next_click():
    target, nothing = mask(2, 9, 3, 10), mask(0, 0, 0, 0)
    assert next_click(nothing, target) == Click(5, 6, True)
    assert next_click(target | mask(2, 9, 10, 14), target).positive is False
    assert next_click(target, target) is None
    assert next_click(nothing, target, [Click(5, 6, True)])[:2] != (5, 6)
    g = torch.Generator().manual_seed(0)
    drawn = {next_click(nothing, target, shrink=1.7, generator=g)[:2] for _ in range(60)}
    deep = squared_depth(target)
    assert len(drawn) > 3 and all(deep[p].sqrt() > 4 / 1.7 for p in drawn)
    assert min(int(deep[next_click(nothing, target, shrink=None, generator=g)[:2]]) for _ in range(60)) == 1


def test_noc():
    assert number_of_clicks([0.2, 0.9, 0.85, 0.95], 0.9) == 2
    assert number_of_clicks([0.2, 0.5], 0.9) == 2 and number_of_clicks([0.2, 0.5], 0.9, most=20) == 20
    assert number_of_clicks([0.2, 0.95], 0.9, most=1) == 1
    assert Interaction([0.1, 0.88], []).number_of_clicks(0.85) == 2


def test_a_user_and_a_predictor_that_believes_it():
    """What is certain or likely foreground is predicted: every click adds its disk and takes nothing away."""
    target = mask(2, 9, 3, 10)
    seen = []

    def predict(label):
        seen.append(label)
        return (label == FOREGROUND) & target | (label == MAYBE_FOREGROUND)

    done = interact(predict, target, most=12, radius=1)
    assert all(b >= a for a, b in zip(done.overlaps, done.overlaps[1:], strict=False))
    assert (
        done.overlaps[0] == pytest.approx(5 / 49) and len(done.overlaps) == 12 and all(c.positive for c in done.clicks)
    )
    first = next(i for i, v in enumerate(done.overlaps, 1) if v >= 0.5)
    assert done.number_of_clicks(0.5) == first
    short = interact(predict, target, most=12, radius=1, stop_at=0.5)
    assert len(short.overlaps) == first and short.overlaps == done.overlaps[:first]
    perfect = interact(lambda label: target, target, most=4)
    assert perfect.overlaps == [1.0] * 4 and len(perfect.clicks) == 1


def test_a_box_around_what_is_known():
    size = (128, 160)
    label = clicked(unknown(size), [Click(70, 60, True)], radius=3)
    assert region_around(mask(0, 0, 0, 0, size=size), label, expand=1.0) == (32, 64, 64, 96)
    assert region_around(mask(10, 50, 20, 100, size=size), label) == (0, 0, 128, 96)
    assert region_around(mask(0, 0, 0, 0, size=size), label, expand=1.0, least=100) == (0, 0, 128, 128)
    assert region_around(mask(0, 0, 0, 0, size=size), unknown(size)) == (0, 0, 160, 128)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clicked(unknown((4, 6)), [(4, 0, True)]), "y=4, x=0 lies outside the image of 4 x 6 pixels"),
        (lambda: clicked(unknown((4, 6)), [(0, -1, True)]), "lies outside"),
        (lambda: clicked(unknown((4, 6)), [(0, 1)]), r"must be \(y, x, positive\)"),
        (lambda: clicked(unknown((4, 6)), [(0, 1, 2)]), "positive of a click"),
        (lambda: clicked(torch.zeros(4, 6), []), "label must be"),
        (lambda: clicked(torch.full((4, 6), 5), []), "possible: 0 to 4"),
        (lambda: clicked(unknown((4, 6)), [], radius=-1), "radius"),
        (lambda: predicted(unknown((4, 6)), torch.zeros(4, 5)), "prediction must be a mask"),
        (lambda: next_click(torch.zeros(4, 6), torch.zeros(4, 5)), "prediction has shape"),
        (lambda: next_click(torch.zeros(4, 6), torch.ones(4, 6), shrink=0.5), "shrink"),
        (lambda: next_click(torch.zeros(4, 6), torch.ones(4, 6), [Click(9, 0, True)]), "lies outside"),
        (lambda: interact(lambda label: label, torch.zeros(4, 6)), "with some foreground"),
        (lambda: interact(lambda label: label, torch.ones(4, 6), most=0), "most"),
        (lambda: overlap(torch.zeros(4, 6), torch.zeros(4, 6)), "no foreground"),
        (lambda: unknown((0, 4)), "size"),
        (lambda: number_of_clicks([0.5], 1.5), "threshold"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
