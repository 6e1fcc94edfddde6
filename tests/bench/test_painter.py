import pytest
import torch
import torch.nn.functional as F

from attnlib.bench.worlds import painter
from attnlib.bench.worlds.painter import (
    BACKGROUNDS,
    COLOURS,
    CREATURE,
    GEOMETRIC,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Prompt,
    Want,
)  # fmt: skip

NAMES = list(COLOURS)


@pytest.fixture(scope="module")
def scenes():
    return painter.sample(600, "train")


@pytest.fixture(scope="module")
def painting(scenes):
    return painter.paint(scenes[:96])


def test_a_scene_is_the_same_whatever_it_is_painted_beside(scenes, painting):
    alone = painter.sample([5, 70, 3], "train")
    assert all(torch.equal(v, getattr(scenes, k)[[5, 70, 3]]) for k, v in vars(alone).items())
    torch.testing.assert_close(painter.paint(alone).images, painting.images[[5, 70, 3]], rtol=0, atol=1e-6)
    other = painter.sample([5, 70, 3], "dev")
    assert not torch.equal(other.x, alone.x) and not torch.equal(painter.sample([5, 70, 3], "test").x, other.x)


def test_parts_share_neither_individuals_nor_held_out_pairings(scenes):
    assert set(scenes.count.tolist()) == {1, 2, 3}
    here = scenes.present
    pairs = {
        (NAMES[c], SHAPES[s]) for c, s in zip(scenes.colour[here].tolist(), scenes.shape[here].tolist(), strict=True)
    }
    assert not pairs & set(HELD_OUT) and len(HELD_OUT) == 8 == len({c for c, _ in HELD_OUT})
    assert {s for _, s in pairs} == set(SHAPES)
    assert scenes.subject.max() < painter.TRAIN_SUBJECTS
    test = painter.sample(600, "test")
    assert set(test.subject[test.present & (test.shape == CREATURE)].tolist()) <= set(range(200, 240))
    both = zip(test.colour.flatten().tolist(), test.shape.flatten().tolist(), strict=True)
    free = {(NAMES[c], SHAPES[s]) for c, s in both}
    assert set(HELD_OUT) <= free
    looks = [tuple(v for k, v in painter.subject(n).items() if k != "form") for n in range(painter.SUBJECTS)]
    assert len(set(looks)) == painter.SUBJECTS


def test_plain_scenes_are_large_geometric_things_on_two_backgrounds():
    found = painter.sample(200, plain=True)
    there = found.present
    assert int(found.count.max()) == 2 and set(found.background.tolist()) == {0, 1}
    assert (found.shape[there] < painter.CREATURE).all() and not found.texture.any() and (found.size == 1).all()
    asked = painter.write([painter.Want("red", "star", "small", "striped")], background="tiles")
    one = painter.sample(1, plain=True, wants=[asked])
    assert int(one.size[0, 0]) == 0 and int(one.texture[0, 0]) == 1 and int(one.background) == 3


def test_masks_boxes_depth_and_normals_tell_what_was_painted(scenes, painting):
    some, empty = scenes[:96], painter.paint(scenes[:96].change(count=torch.zeros(96, dtype=torch.long)))
    bare = painting.masks.sum(1) == 0
    assert torch.equal(painting.images.movedim(1, -1)[bare], empty.images.movedim(1, -1)[bare])
    assert painting.masks.sum(1).max() <= 1 + 1e-6 and not painting.masks[~some.present].any()
    near = painting.masks.amax(1) > 0.6
    assert (painting.depth[near] < 0.95).all() and (painting.depth[bare] > 0.95).all()
    torch.testing.assert_close(painting.normals.norm(dim=1), torch.ones(96, 64, 64))
    flat = painting.normals[:, 2][F.max_pool2d((~bare).float()[:, None], 5, 1, 2)[:, 0] == 0]
    assert flat.min() > 0.99 and painting.normals[:, 2][near].min() < 0.9
    for i, j in some.present.nonzero().tolist():
        ys, xs = (painting.masks[i, j] > 0.5).nonzero(as_tuple=True)
        box = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        if (painting.masks[i].sum(0) - painting.masks[i, j]).max() == 0 or some.count[i] == 1:
            assert torch.equal(box, painting.boxes[i, j])
        middle = (box[:2] + box[2:]) / 2 - torch.stack([some.x[i, j], some.y[i, j]])
        assert middle.abs().max() < 8 and ((box[2:] - box[:2]).max() > 16) == bool(some.size[i, j])
        if some.shape[i, j] < CREATURE and some.texture[i, j] == 0:
            seen = painting.images[i][:, painting.masks[i, j] > 0.95].mean(1)
            true = torch.tensor(list(COLOURS.values()))
            assert (true - seen).square().sum(1).argmin() == some.colour[i, j]


def test_captions_are_true_and_a_third_leaves_something_out(scenes):
    said = painter.captions(scenes)
    for i, prompt in enumerate(said):
        assert len(prompt.wants) == scenes.count[i] and all(w.colour and w.shape for w in prompt.wants)
        assert sorted(w.colour for w in prompt.wants) == sorted(NAMES[c] for c in scenes.colour[i, : scenes.count[i]])
        assert prompt.background in (None, BACKGROUNDS[scenes.background[i]])
        for want in prompt.wants:
            if want.place:
                at = [float(v) for v in (scenes.x[i, 0], scenes.y[i, 0])]
                assert [0 if v < 23 else 2 if v > 41 else 1 for v in at] == list(PLACES[want.place])
    related = [p.relation for p in said if p.relation]
    assert set(related) == set(RELATIONS)
    assert any(p.text.startswith("two ") for p in said) and any(p.text.startswith("three ") for p in said)
    less = painter.captions(scenes, omit=1 / 3)
    share = sum(any(w.colour is None or w.shape is None for w in p.wants) for p in less) / len(less)
    assert 0.27 < share < 0.40
    assert [p.text for p in less] != [p.text for p in painter.captions(scenes, omit=1 / 3, epoch=1)]


def test_prompts_are_painted_as_they_ask():
    prompts = [
        painter.write([Want("red", "star", "large", "striped", "at the top left")], background="slate"),
        painter.write([Want("blue", "heart"), Want("green", "ring", "small")], "above"),
        painter.write([Want("pink", "seven")] * 3, counted=True),
        Prompt("", (Want(subject=217), Want("cyan", "creature"))),
    ]
    made = painter.sample([1, 2, 3, 4], "test", wants=prompts)
    assert made.count.tolist() == [1, 2, 3, 2] and made.background[0] == BACKGROUNDS.index("slate")
    assert prompts[2].text == "three pink sevens" and (made.shape[2] == SHAPES.index("seven")).all()
    assert (made.colour[2] == NAMES.index("pink")).all()
    assert made.x[0, 0] < 23 and made.y[0, 0] < 23 and made.y[1, 0] < made.y[1, 1] - 10
    assert [int(made.size[0, 0]), int(made.texture[0, 0]), int(made.size[1, 1])] == [
        SIZES.index("large"), TEXTURES.index("striped"), SIZES.index("small")
    ]  # fmt: skip
    assert made.subject[3, 0] == 217 and painter.subject(int(made.subject[3, 1]))["body"] == "cyan"
    again = painter.portraits([217, 217], [0, 1])
    assert again.images.shape == (2, 3, 64, 64) and not torch.equal(again.images[0], again.images[1])


def test_flow_of_clips_is_exact():
    images, flow, seen = painter.clip(painter.sample(12, "dev"), frames=3, part="dev")
    assert images.shape == (12, 3, 3, 64, 64) and flow.shape == (12, 2, 2, 64, 64) and seen.float().mean() > 0.9
    line = torch.arange(64.0)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"))
    to = (grid + flow[:, 0]).movedim(1, -1)
    back = F.grid_sample(images[:, 1], (to + 0.5) * 2 / 64 - 1, align_corners=False, padding_mode="border")
    inner = F.avg_pool2d(seen[:, :1].float(), 5, 1, 2)[:, 0] == 1
    still = (images[:, 1] - images[:, 0]).abs().mean(1)[inner].mean()
    assert (back - images[:, 0]).abs().mean(1)[inner].mean() < 0.6 * still


def test_what_cannot_be_painted_or_said_is_named():
    with pytest.raises(ValueError, match="part"):
        painter.sample(3, "validation")
    with pytest.raises(ValueError, match="one prompt per scene, 2, got 1"):
        painter.sample(2, wants=[Prompt("")])
    with pytest.raises(ValueError, match="colour"):
        painter.write([Want("reddish", "star")])
    with pytest.raises(ValueError, match="is of two things, got 1"):
        painter.write([Want("red", "star")], "above")
    with pytest.raises(ValueError, match="1 to 3"):
        painter.write([Want()] * 4)
    with pytest.raises(ValueError, match="below 240"):
        painter.subject(240)
    with pytest.raises(TypeError, match=r"wants\[0\] must be a Prompt"):
        painter.sample(1, wants=[Want("red")])
    some = painter.sample(2)
    with pytest.raises(ValueError, match="part='tests'"):
        painter.paint(some, "tests")
    with pytest.raises(ValueError, match="numbers must hold one per scene, 2, got 1"):
        painter.captions(some, numbers=[1])
    with pytest.raises(ValueError, match="subjects must be .* at most 239, got 240"):
        painter.portraits([240])
    with pytest.raises(ValueError, match="at least one number"):
        painter.portraits([])
    assert len(GEOMETRIC) == 8
