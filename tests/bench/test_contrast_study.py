"""The study of low contrast, small."""

import torch

from attnlib.bench import suites
from attnlib.bench.studies import contrast


def test_faint_pictures_are_grey_and_of_one_range():
    g = torch.Generator().manual_seed(0)
    images, labels = contrast.scenes(4, g)
    x = contrast.faint(images, g)
    assert x.shape == images.shape and labels.shape == (4, 32, 32)
    assert torch.equal(x[:, 0], x[:, 2])
    torch.testing.assert_close(x[:, 0].std((1, 2)), torch.ones(4))
    clean = images.mean(1)
    for a, b in zip(x[:, 0], clean, strict=True):  # the scene is still there
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.6


def test_it_runs_small(tmp_path):
    small = dict(teacher_steps=2, taught_steps=2, steps=2, batch=4, labelled=4, tested=4, seeds=(0, 1))
    result = contrast.measure(pictures=tmp_path, keep=tmp_path / "kept.jsonl", **small)
    assert [row["name"] for row in result["rows"]] == list(contrast.NAMES) and result["baseline"] == contrast.BASELINE
    taught = [row["name"] for row in result["rows"] if "taught to" in row]
    assert taught == ["features", "maps of the last layer", "maps of the hybrid layer"]
    assert (tmp_path / "contrast-cpu.svg").exists() and "contrast" in suites()
