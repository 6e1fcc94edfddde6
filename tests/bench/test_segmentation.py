"""Studies of dense prediction, and the scenes they are made on."""

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.data.masks import CLASSES, mean_iou, shape_scenes
from attnlib.bench.studies import distortion, segmentation


def drawn(*args, seed=0, **settings):
    return shape_scenes(*args, generator=torch.Generator().manual_seed(seed), **settings)


def test_scenes_are_those_of_their_number():
    images, labels = drawn(3, (24, 40))
    again, same = drawn(3, (24, 40))
    assert images.shape == (3, 3, 24, 40) and torch.equal(images, again) and torch.equal(labels, same)
    assert not torch.equal(labels, drawn(3, (24, 40), seed=1)[1])
    assert set(drawn(64)[1].unique().tolist()) == set(range(len(CLASSES)))
    assert not drawn(2, objects=0)[1].any()


def test_a_panorama_stretches_rows_towards_the_poles():
    """The share of a row that small shapes cover grows like one over the cosine of its latitude."""
    settings = dict(objects=6, radius=(2.0, 3.0), noise=0.0)
    flat, round_ = (drawn(400, (32, 64), panorama=p, **settings)[1] > 0 for p in (False, True))

    def share(covered, rows):
        return float(covered[:, rows].float().mean())

    middle, poles = slice(12, 20), [3, 4, 5, 26, 27, 28]
    assert abs(share(round_, middle) / share(flat, middle) - 1) < 0.15
    assert 1.8 < share(round_, poles) / share(flat, poles) < 3.2  # 1 / cos of 61 degrees is 2.1, of 72 it is 3.2


def test_small_shapes_at_the_equator_are_flat():
    for seed in range(5):
        flat, round_ = (
            drawn(1, (64, 128), objects=1, radius=(4.0, 4.001), noise=0.0, panorama=p, seed=seed) for p in (False, True)
        )
        rows = flat[1][0].any(1).nonzero()
        if 24 < rows.float().mean() < 40 and 10 < flat[1][0].any(0).nonzero().float().mean() < 118:
            assert float((flat[1] != round_[1]).float().sum() / flat[1].gt(0).sum()) < 0.15


def test_a_panorama_goes_all_around():
    """What leaves on the right comes in on the left, unlike in a flat scene."""
    labels = drawn(200, (16, 32), objects=1, radius=(3.0, 3.1), panorama=True)[1] > 0
    split = labels[:, :, 0].any(1) & labels[:, :, -1].any(1)
    assert split.any()


def test_mean_iou():
    a = torch.tensor([[0, 0, 1, 1]])
    assert mean_iou(a, a) == 100
    assert mean_iou(torch.tensor([[0, 1, 1, 1]]), a) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(count=0), "count"), (dict(count=1, size=(0, 4)), "size"), (dict(count=1, noise=-1.0), "noise"),
     (dict(count=1, tint=2.0), "tint")],
)  # fmt: skip
def test_bad_scenes(settings, message):
    with pytest.raises(ValueError, match=message):
        shape_scenes(**settings)


def test_the_studies_run(tmp_path, monkeypatch):
    assert {"segmentation", "distortion"} <= set(suites())
    monkeypatch.setattr(segmentation, "costs", lambda makes: dict.fromkeys(makes, 1.0))
    found = segmentation.measure(pictures=tmp_path, steps=2, batch=2, seeds=(0, 1), tested=4)
    for baseline, makes in segmentation.CONTESTANTS.values():
        rows = next(c["rows"] for c in found["comparisons"].values() if c["baseline"] == baseline)
        assert [r["name"] for r in rows] == list(makes) and all(r["against"]["n"] == 2 for r in rows)
    found = distortion.measure(pictures=tmp_path, steps=2, more=2, batch=2, seeds=(0, 1), tested=4)
    assert [r["name"] for r in found["rows"]] == list(distortion.CONTESTANTS)
    assert {p.name for p in tmp_path.iterdir()} == {"segmentation-cpu.svg", "distortion-cpu.svg"}


def test_sure_labels_leave_out_what_is_not_sure():
    torch.manual_seed(0)
    model = distortion.build().eval()
    images = distortion.draw(2, True, torch.Generator().manual_seed(0))[0]
    assert (distortion.sure_labels(model, images, 1.0) == model.ignore_index).all()
    assert (distortion.sure_labels(model, images, 0.0) == model.predict(images)).all()
