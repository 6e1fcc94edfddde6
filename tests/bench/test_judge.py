import pytest
import torch

from attnlib.bench.worlds import judge as judging
from attnlib.bench.worlds import painter
from attnlib.bench.worlds.judge import NOTHING, Found, Judge, compare
from attnlib.bench.worlds.painter import Prompt, Want, write


def thing(shape, colour, x=32.0, y=32.0, size="small", texture="plain"):
    return Found((x - 7, y - 7, x + 7, y + 7), shape, colour, size, texture, 0.9, torch.zeros(64))


def test_verdicts_tell_swapped_missing_doubled_and_unrecognisable_things_apart():
    asked = write([Want("red", "star"), Want("blue", "ring", "small")])
    star, ring = thing("star", "red"), thing("ring", "blue")
    assert compare([ring, star], asked).right
    swapped = compare([thing("star", "blue"), thing("ring", "red")], asked)
    assert (swapped.present, swapped.bound, swapped.counted, swapped.things) == (True, False, True, 0.0)
    missing = compare([star], asked)
    assert (missing.present, missing.bound, missing.counted, missing.things) == (False, False, False, 0.5)
    doubled = compare([star, ring, ring], asked)
    assert doubled.bound and not doubled.counted and not doubled.right
    smeared = compare([star, thing(NOTHING, "blue")], asked)
    assert not smeared.recognisable and not smeared.present and smeared.counted
    assert not compare([], asked).recognisable
    two = write([Want("red", "star")] * 2, counted=True)
    assert not compare([star], two).present and compare([star, thing("star", "red", 50)], two).right
    assert not compare([ring, thing("ring", "blue", size="large")], write([Want("blue", "ring", "large")] * 2)).bound
    open_shape = write([Want("red"), Want("blue", "ring")])
    assert compare([star, ring], open_shape).right and not compare([ring], open_shape).present


def test_places_and_relations_are_judged_by_boxes():
    left, right = thing("star", "red", 14), thing("ring", "blue", 46)
    asked = [Want("red", "star"), Want("blue", "ring")]
    assert compare([right, left], write(asked, "left of")).right
    wrong = compare([right, left], write(asked, "above"))
    assert wrong.bound and wrong.counted and not wrong.placed and not wrong.right
    assert compare([left], write([Want("red", "star", place="on the left")])).placed
    assert not compare([left], write([Want("red", "star", place="in the middle")])).placed
    twins = [thing("star", "red", 14), thing("star", "red", 46)]
    assert compare(twins, write([Want("red", "star")] * 2, "right of")).placed
    many = [thing("star", "red", x) for x in (8, 20, 32, 44, 56)] + [ring := thing("ring", "blue", 60, 60)]
    assert compare(many, write([Want("blue", "ring")])).bound and ring.recognisable


def test_a_judge_learns_and_reads_pictures_of_any_size():
    torch.manual_seed(0)
    judge = Judge(width=16, depth=1)
    g = torch.Generator().manual_seed(0)
    given = judging.batch(torch.arange(48), g)
    assert given[3].any() and not given[3][~given[1].present].any() and given[0].min() >= 0
    optimizer = torch.optim.Adam(judge.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        value = judging.loss(judge, given)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    assert losses[-1] < 0.6 * losses[0] and all(p.grad is not None for p in judge.parameters())
    found = judge.eval().look(torch.rand(2, 3, 96, 64), threshold=0.0, limit=5)
    assert [len(f) for f in found] == [5, 5]
    assert all(f.embedding.norm() == pytest.approx(1) for f in found[0])
    assert judge.embeddings(given[0][:3]).shape == (3, 64)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\], got -1"):
        judge.look(torch.rand(1, 3, 64, 64) * 2 - 1.001)
    with pytest.raises(ValueError, match="multiples of 4 from 64"):
        judge.look(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="one per picture, 2, got 1"):
        judge.judge(torch.rand(2, 3, 64, 64), [Prompt("")])


def test_planted_failures_are_in_the_pictures():
    scenes = painter.sample(60, "test")
    two = scenes[(scenes.count == 2) & (scenes.shape[:, :2] < painter.CREATURE).all(1)]
    two = two[two.colour[:, 0] != two.colour[:, 1]]
    plain = painter.paint(two, "test").images
    for make in (judging._swapped, judging._without, judging._smeared):
        images, prompts = make(two, "test")
        assert ((images - plain).abs().amax((1, 2, 3)) > 0.2).all()
        assert [len(p.wants) for p in prompts] == [2] * len(two)
    three = scenes[scenes.count == 3]
    images, prompts = judging._doubled(three, "test")
    assert len(images) == len(prompts) and all(len(p.wants) == 2 for p in prompts)
    found = judging.examine(Judge(width=16, depth=1).eval(), count=12)
    assert set(judging.BARS) <= set(found) and found["missing"]["mean"] == 1.0  # it sees nothing yet
    with pytest.raises(TypeError, match="prompt must be a Prompt"):
        compare([], "a red star")
    with pytest.raises(FileNotFoundError, match="examples/diffusion/judge.py"):
        judging.load("tests")
