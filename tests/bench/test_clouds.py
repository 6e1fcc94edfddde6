"""The study of clouds, as small as it goes, and its surfaces."""

import math

import torch

from attnlib.bench.studies import clouds


def test_surfaces_lie_in_the_cube_and_differ():
    made = clouds.surfaces(40, 50, torch.Generator().manual_seed(0))
    assert made.shape == (40, 50, 3) and float(made.abs().max()) <= 0.9 + 1e-6
    again = clouds.surfaces(40, 50, torch.Generator().manual_seed(0))
    assert torch.equal(made, again)
    # A surface is no ball: its points lie on something thin in one place at least, so that neighbours are near.
    assert float(torch.cdist(made, made).masked_fill(torch.eye(50).bool(), math.inf).amin(2).mean()) < 0.3


def test_exact_distance_by_hand():
    x = torch.tensor([[[0.0, 0, 0], [1, 0, 0]]])
    y = torch.tensor([[[1.0, 0, 0], [0, 0, 2]]])
    assert clouds.wasserstein(x, y) == math.sqrt(4 / 2)
    assert clouds.wasserstein(x, x.flip(1)) == 0.0


def test_the_study_runs_and_the_map_learns_apart(tmp_path):
    found = clouds.measure(
        steps=2, batch=3, points=6, latent=4, directions=2, tested=3, seeds=(0, 1),
        losses=("random directions", "efficient, kappa 1", "efficient, one direction"),
    )  # fmt: skip
    assert [row["name"] for row in found["rows"]][0] == "random directions"
    assert all({"wasserstein", "chamfer"} <= set(row) for row in found["rows"])
    model = clouds._Trained("efficient, kappa 1", 6, 2, 4, 0)
    before = [p.clone() for p in model.held[0].map.parameters()]
    model.loss(clouds.surfaces(3, 6)).backward()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.held[0].map.parameters(), strict=True))
    assert not any(name.startswith("held") for name, _ in model.named_parameters())
