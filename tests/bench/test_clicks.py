"""The study of clicks, as small as it goes."""

import torch

from attnlib.bench.studies import clicks


def test_scenes():
    images, targets = clicks.scenes(6, torch.Generator().manual_seed(0))
    assert images.shape == (6, 3, 64, 64) and targets.shape == (6, 64, 64)
    for image, target in zip(images, targets, strict=True):
        wanted = image[:, target == 1]
        assert int(target.sum()) >= 60 and float(wanted.std(1).max()) < 0.1  # one colour, and noise


def test_without_the_image_nothing_is_seen_of_it():
    torch.manual_seed(0)
    model = clicks.build(clicks.BLIND).eval()
    label = torch.full((1, 64, 64), 2)
    with torch.no_grad():
        a, b = (model(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(i)), label) for i in (0, 1))
    assert a.equal(b)


def test_the_study_runs(tmp_path):
    found = clicks.measure(pictures=tmp_path, steps=1, batch=2, seeds=(0, 1), count=2)
    assert [r["name"] for r in found["rows"]] == [clicks.FULL, clicks.BLIND, clicks.FIRST]
    assert all(1 <= r["noc_80"]["mean"] <= clicks.MOST for r in found["rows"])
    assert (tmp_path / "clicks-cpu.svg").exists()
