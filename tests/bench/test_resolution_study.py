"""The study of resolution on denoisers that are hardly trained."""

import pytest
import torch

from attnlib.bench.data import files
from attnlib.bench.studies import resolution


def test_the_study_runs(monkeypatch, tmp_path):
    images = [torch.randint(256, (80, 90, 3), generator=torch.Generator().manual_seed(i)).byte() for i in range(3)]
    monkeypatch.setattr(resolution, "photos", lambda: files.Dataset(images[:2], images[2:], "noise", "the last", "0"))
    call = dict(
        keep=tmp_path / "kept.jsonl", pictures=tmp_path, steps=2, batch=2, side=8, held=2, samples=2, sampling=2,
        seeds=(0, 1),
    )  # fmt: skip
    found = resolution.measure(**call)
    rows = {row["name"]: row for row in found["rows"]}
    assert set(rows) == set(resolution.CONTESTANTS) and (tmp_path / "resolution-cpu.svg").exists()
    for row in rows.values():
        assert row["loss, twice over once"]["mean"] == pytest.approx(
            sum(r["loss at 16"] / r["loss at 8"] for r in found["runs"] if r["name"] == row["name"]) / 2
        )
        assert row["distance at 16"]["mean"] > 0
    assert resolution.measure(**call)["rows"] == found["rows"]  # from the file


def test_denoisers_know_what_an_exact_one_knows():
    """Of white images the best denoiser is a factor, which a network that gives zero has."""
    model = resolution.Denoiser(None)
    torch.nn.init.zeros_(model.out.weight)
    torch.nn.init.zeros_(model.out.bias)
    x, sigma = torch.randn(2, 6, 6, 1), torch.tensor([0.5, 1.0])
    factor = resolution.SIGMA**2 / (resolution.SIGMA**2 + sigma**2)
    torch.testing.assert_close(model(x, sigma), x * factor.view(-1, 1, 1, 1))
    clean = torch.randn(200, 8, 8, 1) * resolution.SIGMA
    loss = resolution.loss_at(model, clean, torch.full((200,), 0.7), torch.randn(200, 8, 8, 1))
    assert loss.item() == pytest.approx(1.0, abs=0.03)
    drawn = resolution.sample(model, 40, 8, 40, torch.Generator().manual_seed(0), most=20.0)
    assert float(drawn.std()) == pytest.approx(resolution.SIGMA, rel=0.03)


def test_patches_tell_images_apart_by_the_right_amount():
    torch.manual_seed(0)
    rough = torch.randn(8, 24, 24, 1)
    assert resolution.distance(rough, torch.randn(8, 24, 24, 1)) < 0.1
    # Projections of white patches are normal, so half as rough is half of the mean absolute value away.
    assert resolution.distance(rough, rough / 2) == pytest.approx(0.5 * (2 / torch.pi) ** 0.5, rel=0.05)
