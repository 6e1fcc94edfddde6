"""Small studies: what they share, and the worlds they look at."""

import json

import pytest
import torch
from torch import nn

from attnlib.bench import suites
from attnlib.bench.data import worlds
from attnlib.bench.small import fit, picture, sheet, study


def test_fit_learns_and_repeats_itself():
    def make():
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        truth = torch.tensor([1.0, -2.0, 0.5, 3.0])

        def batch(generator):
            x = torch.randn(32, 4, generator=generator)
            return x, x @ truth

        return fit(model, batch, lambda m, b: (m(b[0])[:, 0] - b[1]).square().mean(), 200, lr=0.1, weight_decay=0.0)

    first = make()
    assert first[-1] < 1e-3 < first[0] and first == make()


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(FloatingPointError, match="nan at step 1 of 5"):
        fit(nn.Linear(1, 1), lambda g: torch.ones(1, 1), lambda m, x: m(x).sum() * float("nan"), 5)


def test_a_study_goes_on_where_it_stopped(tmp_path):
    calls = []

    def run(name, seed):
        calls.append((name, seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"accuracy": {"a": 1.0, "b": 2.0}[name] + seed}

    keep = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        study(["a", "b"], run, "accuracy", "a", seeds=(0, 1), keep=keep)
    assert len(keep.read_text().splitlines()) == 2
    found = study(["a", "b"], run, "accuracy", "a", seeds=(0, 1), keep=keep)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("a", 1), ("b", 1)]
    rows = {r["name"]: r for r in found["rows"]}
    assert rows["b"]["against"] == {"mean": 1.0, "half": 0.0, "n": 2} and rows["a"]["accuracy"]["mean"] == 1.5
    assert json.loads(json.dumps(found)) == found
    study(["a", "b"], run, "accuracy", "a", seeds=(0, 1), keep=keep, key="other")
    assert len(calls) == 9  # runs of other settings are others
    with pytest.raises(ValueError, match="metric='b' is not among"):
        study(["a"], lambda name, seed: {"accuracy": 1.0}, "b")
    with pytest.raises(ValueError, match="at least one each"):
        study(["a"], run, "accuracy", seeds=())
    with pytest.raises(ValueError, match="baseline='c'"):
        study(["a"], run, "accuracy", "c")


def test_a_picture_stands_alone(tmp_path):
    path = tmp_path / "p.svg"
    picture(path, {"ours": [(1, 2.0, 0.1), (2, 3.0, None)], "theirs": [(1, 1.0, 0.1)]}, "size", "score", "t", log="x")
    text = path.read_text()
    assert text.startswith("<?xml") and "ours" in text and "theirs" in text
    first = text
    picture(path, {"ours": [(1, 2.0, 0.1), (2, 3.0, None)], "theirs": [(1, 1.0, 0.1)]}, "size", "score", "t", log="x")
    assert path.read_text() == first
    picture(path, {"ours": [("a", 2.0, 0.1), ("b", 3.0, 0.2)]}, "size", "score", "t")


def test_a_sheet_shows_grey_and_coloured_pictures_in_few_colours(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rows = {"grey": torch.rand(2, 1, 8, 8), "coloured": torch.rand(1, 3, 8, 8)}
    sheet(tmp_path / "all.png", rows, ["one", "two"])
    sheet(tmp_path / "few.png", rows, ["one", "two"], colours=16)
    with image.open(tmp_path / "all.png") as whole, image.open(tmp_path / "few.png") as few:
        assert whole.size == few.size and len(few.convert("RGB").getcolors()) <= 16
        assert len(whole.convert("RGB").getcolors(1 << 16)) > 64
    with pytest.raises(ValueError, match="colours"):
        sheet(tmp_path / "none.png", rows, colours=0)


def test_the_worlds():
    def drawn(world, **settings):
        return world(6, generator=torch.Generator().manual_seed(3), **settings)

    for world, shape in (
        (worlds.cluttered_digits, (6, 1, 32, 32)), (worlds.texture_crops, (6, 1, 32, 32)),
        (worlds.moving_digits, (6, 8, 32, 32, 1)),
    ):  # fmt: skip
        images, labels = drawn(world)
        again, same = drawn(world)
        assert images.shape == shape and torch.equal(images, again) and torch.equal(labels, same)
        assert not torch.equal(images, drawn(world, part="test")[0])
        with pytest.raises(ValueError, match="part='all'"):
            drawn(world, part="all")
    video = drawn(worlds.moving_digits, frames=30, side=20)[0]
    mass = video.sum((2, 3, 4))
    assert torch.allclose(mass, mass[:, :1].expand_as(mass), rtol=1e-5)  # the digit never leaves


def test_studies_are_suites():
    assert "multimodal" in suites() and "language" not in suites()
