"""Power laws with a floor: what made the numbers is found again, and how sure that is."""

import numpy as np
import pytest

from attnlib.bench.stats import fit_power_law

SIZES = [4.0, 16.0, 64.0, 256.0, 1024.0]


@pytest.mark.parametrize(("floor", "scale", "exponent"), [(0.5, 2.0, 0.3), (0.0, 1.0, 1.2), (3.0, 0.2, 0.05)])
def test_an_exact_law_is_found(floor, scale, exponent):
    law = fit_power_law(SIZES, [floor + scale * n**-exponent for n in SIZES])
    assert law.exponent == pytest.approx(exponent, rel=0.02, abs=1e-3) and law.rms < 1e-4
    assert law(64.0) == pytest.approx(floor + scale * 64**-exponent, rel=1e-3)
    known = fit_power_law(SIZES, [floor + scale * n**-exponent for n in SIZES], floor=floor)
    assert known.exponent == pytest.approx(exponent, rel=1e-3) and known.floor == floor


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    sizes = np.geomspace(4, 1024, 12)
    inside = 0
    for _ in range(60):
        law = fit_power_law(sizes, 1 + 2 * sizes**-0.5 + 0.02 * rng.standard_normal(12))
        inside += abs(law.exponent - 0.5) <= law.half
    assert 50 <= inside <= 60


def test_flat_numbers_have_no_exponent_to_speak_of():
    law = fit_power_law(SIZES, [2.0, 2.01, 1.99, 2.0, 2.0])
    assert law.rms < 0.01
    assert fit_power_law(SIZES, [1.87, 1.74, 1.69, 1.87, 1.96]).half is None  # falls, and rises again
    assert fit_power_law(SIZES[:3], [3.0, 2.0, 1.5]).half is None


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        (SIZES[:2], [1.0, 2.0], "needs as many points"),
        (SIZES, [1.0, 2.0], "needs as many points"),
        ([0.0, 1.0, 2.0], [1.0, 1.0, 1.0], "positive"),
        ([1.0, 2.0, 3.0], [1.0, float("nan"), 1.0], "finite"),
    ],
)
def test_bad_input(sizes, values, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(sizes, values)
