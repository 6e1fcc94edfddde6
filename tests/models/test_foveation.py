"""Foveated first stages: matching, stress tests by the authors' arithmetic, and what training starts from."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity
from torch import nn

from attnlib.grids import log_polar_windows
from attnlib.models.perception.foveation import (
    HIGH_PASS,
    RECIPES,
    crossing,
    cue_conflict,
    foveated_blur,
    generalisation,
    match_strength,
    occlude,
    shared_start,
    similarity,
    spatial_frequency,
    uniform_blur,
)
from attnlib.models.perception.metamers import FoveatedTransfer, encoder


def pictures(count=2, side=64, seed=0):
    """Smooth random images, float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, side, side, generator=g, dtype=torch.float64)
    x = uniform_blur(x, 1.5) * 3 + 0.2 * x
    return (0.5 + 0.15 * x).clamp(0, 1)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_blur_is_that_of_scipy(sigma):
    x = pictures(1)
    want = gaussian_filter(x[0, 0].numpy(), sigma, mode="nearest", radius=math.ceil(2 * sigma))
    np.testing.assert_allclose(uniform_blur(x, sigma)[0, 0].numpy(), want, atol=1e-12)


def test_similarity_is_that_of_skimage():
    a, b = pictures(2), uniform_blur(pictures(2), 1.0)
    for i in range(2):
        want = structural_similarity(
            a[i].numpy(), b[i].numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert float(similarity(a, b)[i]) == pytest.approx(want, abs=1e-9)


def test_foveated_blur_keeps_the_fovea_and_blurs_more_outside():
    windows = log_polar_windows((64, 64), 0.6, fovea=8)
    x = pictures()
    assert torch.equal(foveated_blur(x, windows, 0), x) or torch.allclose(foveated_blur(x, windows, 0), x)
    off = (foveated_blur(x, windows, 1.0) - x).abs().mean((0, 1))
    away = torch.hypot(*torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij"))
    assert off[away < 5].max() == 0
    assert off[(away > 10) & (away < 14)].mean() < off[(away > 22) & (away < 30)].mean()


def test_three_stages_lose_equally_much():
    torch.manual_seed(0)
    transfer = FoveatedTransfer(encoder(4, pools=1), lambda f: up(f), "blend").double()
    mix = torch.randn(3, 8, dtype=torch.float64) / 2

    def up(f):  # any decoder: colours of features
        return nn.functional.interpolate(torch.einsum("oc,bchw->bohw", mix, f), scale_factor=2) + 0.5

    transfer.decoder = up
    x, fine = pictures(), log_polar_windows((64, 64), 0.6, fovea=8)
    coarse = log_polar_windows((64, 64), 0.6, fovea=8, reduce=2)
    with torch.no_grad():
        reference = transfer.reference(x)
        texture = transfer(x, coarse, generator=torch.Generator().manual_seed(0))
        target = float(similarity(reference, texture).mean())
        blurs = {"foveated": lambda t, s: foveated_blur(t, fine, s), "uniform": uniform_blur}
        for blur in blurs.values():
            strength = match_strength(blur, reference, target)
            assert abs(float(similarity(reference, blur(reference, strength)).mean()) - target) < 0.005
            assert strength > 0
        with pytest.raises(ValueError, match="highest=0.001 leaves"):
            match_strength(uniform_blur, reference, 0.3, highest=0.001)


@pytest.mark.parametrize("side", [64, 256])
def test_occlusions_are_the_authors_areas(side):
    x = torch.rand(1, 3, side, side)
    for level in range(17):
        hidden = {k: occlude(x, k, level) for k in ("scotoma", "glaucoma", "left2right", "top2bottom")}
        half = math.ceil(math.sqrt(level * side * side / 16) / 2)
        assert hidden["scotoma"][1] == pytest.approx((2 * half / side) ** 2)
        left = math.ceil(math.sqrt(side * side - level * side * side / 16) / 2)
        assert hidden["glaucoma"][1] == pytest.approx(1 - (2 * left / side) ** 2)
        assert hidden["left2right"][1] == hidden["top2bottom"][1] == level / 16
        other = occlude(x, "glaucoma", 16 - level)
        covered = (hidden["scotoma"][0] != x).any(1) ^ (other[0] != x).any(1)
        assert covered.all()  # complementary
        for image, share in hidden.values():
            grey = (image == 128 / 255).all(1)
            assert float(grey.float().mean()) == pytest.approx(share)
            if level in (0, 16):
                assert share == level / 16 and (level == 16 or torch.equal(image, x))


def test_low_and_high_pass_make_the_image():
    x = pictures()
    for sigma in HIGH_PASS[1:]:
        torch.testing.assert_close(spatial_frequency(x, "low", sigma) + spatial_frequency(x, "high", sigma), x)
    assert torch.equal(spatial_frequency(x, "high", math.inf), x) and torch.equal(spatial_frequency(x, "low", 0), x)
    moved = spatial_frequency(x, "high", 1.0, mean=torch.tensor([0.3, 0.4, 0.5]))
    torch.testing.assert_close(moved.mean((2, 3)), torch.tensor([[0.3, 0.4, 0.5]] * 2, dtype=x.dtype))


def test_cue_conflicts():
    a, b = torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64)
    for share in (0, 0.25, 0.5, 1):
        square, true = cue_conflict(a, b, share)
        assert float(square.mean()) == pytest.approx(true) and abs(true - share) < 0.05
        soft, weight = cue_conflict(a, b, share, "soft")
        assert float(soft.mean()) == pytest.approx(weight, abs=1e-6)
    assert torch.equal(cue_conflict(a, b, 1)[0], a) and torch.equal(cue_conflict(a, b, 0)[0], b)
    soft, _ = cue_conflict(a, b, 0.25, "soft")
    assert soft[0, 0, 32, 32] == 1 and soft[0, 0, 0, 0] == 0 and 0 < float(soft[0, 0, 32, 50]) < 1


def test_networks_start_equal():
    started = shared_start(lambda: nn.Linear(12, 3), ["a", "b"], seed=3)
    x = torch.randn(5, 12)
    assert torch.equal(started["a"](x), started["b"](x)) and started["a"].weight is not started["b"].weight
    again = shared_start(lambda: nn.Linear(12, 3), ["a"], seed=3)
    assert torch.equal(again["a"].weight, started["b"].weight)


def test_the_authors_schedules():
    assert [RECIPES["alexnet"].lr_at(e) for e in (0, 29, 30, 59, 60, 119)] == [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]
    assert [RECIPES["resnet18"].lr_at(e) for e in (15, 16, 31, 32)] == [0.05, 0.0125, 0.0125, 0.003125]


def test_generalisation_is_a_table():
    class Bright(nn.Module):
        def forward(self, x):
            return torch.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5], 1)

    x = torch.cat([torch.full((2, 3, 4, 4), 0.2), torch.full((2, 3, 4, 4), 0.9)])
    labels = torch.tensor([0, 0, 1, 1])
    found = generalisation({"n": Bright()}, {"same": lambda t: t, "inverse": lambda t: 1 - t}, x, labels)
    assert found == {("n", "same"): 1.0, ("n", "inverse"): 0.0}


def test_bad_input():
    x, windows = pictures(), log_polar_windows((64, 64), 0.8, fovea=8)
    with pytest.raises(ValueError, match=r"windows lie on a grid of \(64, 64\), images on \(32, 32\)"):
        foveated_blur(x[..., :32, :32], windows, 1)
    with pytest.raises(ValueError, match="level must be"):
        occlude(x, "scotoma", 17)
    with pytest.raises(ValueError, match="kind="):
        occlude(x, "cataract", 1)
    with pytest.raises(ValueError, match="sigma"):
        uniform_blur(x, -1)
    with pytest.raises(ValueError, match="they must agree"):
        cue_conflict(x, x[:1], 0.5)
    with pytest.raises(ValueError, match="do not cross"):
        crossing([0.0, 1.0], [0.1, 0.2], [0.9, 0.9])
    with pytest.raises(ValueError, match="smaller than the window"):
        similarity(x[..., :8], x[..., :8])
