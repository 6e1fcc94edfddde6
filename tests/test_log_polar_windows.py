import math

import pytest
import torch

from attnlib.grids import log_polar_windows

#: Windows that NeuroFovea's README and table give for 512 pixels and 26 degrees, the fovea included.
TABLE = {0.25: 377, 0.3: 301, 0.4: 187, 0.5: 126, 0.6: 103, 0.7: 91}


@pytest.mark.parametrize("scale", TABLE)
def test_numbers_of_windows_are_within_a_tenth_of_the_table(scale):
    side = 512 if scale < 0.4 else 256
    found = len(log_polar_windows((side, side), scale, reduce=side // 64).weights)
    assert abs(found / TABLE[scale] - 1) < 0.1


@pytest.mark.parametrize(
    "grid, settings",
    [
        ((96, 96), dict(scale=0.5)),
        ((96, 160), dict(scale=0.6, fixation=(20, 150), fovea=6)),
        ((97, 61), dict(scale=0.8, fixation=(0, 0), fovea=5)),
        ((128, 96), dict(scale=0.5, overlap=1.0, aspect=1.0, fovea=8, reduce=4)),
        ((64, 64), dict(scale=0.5, fovea=25)),
    ],
)
def test_weights_sum_to_one_for_any_size_and_fixation(grid, settings):
    weights, area, ring = log_polar_windows(grid, **settings)
    reduce = settings.get("reduce", 1)
    assert weights.shape[1:] == (grid[0] // reduce, grid[1] // reduce) and len(area) == len(ring) == len(weights)
    assert weights.min() >= 0 and (weights.sum(0) - 1).abs().max() < 1e-6
    assert ((weights > 1e-3).flatten(1).sum(1) >= 2).all() and int((ring == 0).sum()) == 1


def oracle(grid, scale, fixation, fovea, aspect, overlap, ring, wedge):
    """One whole window, cell by cell, as the paper writes it."""

    def bump(x):
        t = overlap
        if (-1 - t) / 2 < x <= (t - 1) / 2:
            return math.cos(math.pi / 2 * ((x - (t - 1) / 2) / t)) ** 2
        if (t - 1) / 2 < x <= (1 - t) / 2:
            return 1.0
        if (1 - t) / 2 < x <= (1 + t) / 2:
            return 1 - math.cos(math.pi / 2 * ((x - (1 + t) / 2) / t)) ** 2
        return 0.0

    around = round(2 * math.pi * aspect / scale)
    apart = 2 * math.log((scale + math.sqrt(scale**2 + 4)) / 2)
    out = torch.zeros(grid, dtype=torch.float64)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = i - fixation[0], j - fixation[1]
            radius, angle = math.hypot(y, x), math.atan2(y, x)
            if radius == 0:
                continue
            turn = angle / (2 * math.pi / around) - wedge
            turn -= around * round(turn / around)
            out[i, j] = bump((math.log(radius) - math.log(fovea)) / apart - ring - 0.5) * bump(turn)
    return out


def test_a_window_in_the_middle_is_that_of_the_paper():
    settings = dict(scale=0.6, fixation=(23.0, 20.5), fovea=4.0, aspect=2.0, overlap=0.5)
    windows = log_polar_windows((48, 48), **settings)
    inner = [i for i, r in enumerate(windows.ring.tolist()) if r == 2]
    want = torch.stack([oracle((48, 48), **settings, ring=1, wedge=w) for w in range(21)])
    assert len(inner) == 21
    torch.testing.assert_close(windows.weights[inner].double(), want, atol=1e-6, rtol=0)


def test_width_grows_with_eccentricity_as_the_scale_says():
    windows = log_polar_windows((400, 400), 0.4, fovea=20)
    row = windows.weights[:, 200, 200:]  # along the positive axis, where wedge 0 is whole
    widths, middles = [], []
    for ring in range(1, 5):
        inside = (row[windows.ring == ring].sum(0) > 0.5).nonzero()[:, 0]
        widths.append(len(inside))
        middles.append(float(inside.double().mean()) + 0.5)
    assert all(abs(w / m - 0.4) < 0.05 for w, m in zip(widths, middles, strict=True))


def test_moving_the_fixation_moves_the_windows():
    left, right = (log_polar_windows((96, 120), 0.6, (48, c), fovea=8).weights[0] for c in (40, 60))
    torch.testing.assert_close(left[:, :100], right[:, 20:])


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(fixation=(70, 3)), r"fixation=\(70, 3\) lies outside the grid \(64, 64\)"),
        (dict(fixation=(3, -1)), "lies outside"),
        (dict(fixation=(float("nan"), 3)), "row of the fixation"),
        (dict(scale=0.1), "fewer than two of the"),
        (dict(scale=0), "scale must be"),
        (dict(scale=1.9, aspect=0.5), "at least 3"),
        (dict(fovea=0), "fovea must be"),
        (dict(overlap=0), "overlap must be"),
        (dict(reduce=5), "reduce=5 does not divide"),
    ],
)
def test_bad_input(settings, says):
    with pytest.raises(ValueError, match=says):
        log_polar_windows((64, 64), **{"scale": 0.5, **settings})
    with pytest.raises(ValueError, match="grid"):
        log_polar_windows((64,), 0.5)
