"""Bags under X-rays: numbered, light only gets less where things lie over each other, and boxes hold their things."""

import pytest
import torch

from attnlib.bench.worlds.overlays import KINDS, make_bag


def test_numbers_and_parts_make_the_picture():
    a = make_bag(3, "dev")
    assert torch.equal(a.image, make_bag(3, "dev").image) and 0 <= float(a.image.min()) <= float(a.image.max()) <= 1
    assert not any(torch.equal(a.image, make_bag(*key).image) for key in ((4, "dev"), (3, "test"), (3, "train")))
    with pytest.raises(ValueError, match="part="):
        make_bag(0, "valid")
    with pytest.raises(ValueError, match="clutter must"):
        make_bag(0, clutter=-1)


def test_boxes_hold_what_is_looked_for_and_other_things_only_take_light():
    kinds, covered = set(), []
    for number in range(12):
        alone, bag = make_bag(number, clutter=0, noise=0.0), make_bag(number, noise=0.0)
        assert torch.equal(alone.boxes, bag.boxes) and torch.equal(alone.labels, bag.labels)
        assert not alone.covered.any() and bool((bag.image <= alone.image + 1e-6).all())
        inside = torch.zeros(48, 48, dtype=torch.bool)
        for x1, y1, x2, y2 in alone.boxes.int().tolist():
            dark = alone.image[0, y1:y2, x1:x2] < 1
            assert dark[0].any() and dark[-1].any() and dark[:, 0].any() and dark[:, -1].any()
            inside[y1:y2, x1:x2] = True
        assert bool((alone.image[:, ~inside] == 1).all())
        kinds |= set(bag.labels.tolist())
        covered += bag.covered.tolist()
        mine, others = alone.image[0] < 1, bag.image[0] < alone.image[0] - 1e-6
        for share, (x1, y1, x2, y2) in zip(bag.covered.tolist(), bag.boxes.int().tolist(), strict=True):
            own = torch.zeros_like(mine)
            own[y1:y2, x1:x2] = mine[y1:y2, x1:x2]
            assert share == pytest.approx(float(others[own].float().mean()), abs=1e-6)
    assert kinds == set(range(len(KINDS))) and min(covered) < 0.3 and max(covered) > 0.7
