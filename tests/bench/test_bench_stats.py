import math

import numpy as np
import pytest

from attnlib.bench import stats


def test_interval_agrees_with_students_table():
    # n = 5: t(0.975, 4) = 2.776; standard deviation of 1..5 is sqrt(2.5).
    found = stats.mean_interval([1, 2, 3, 4, 5])
    assert found.mean == 3 and found.n == 5
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5) / math.sqrt(5), rel=1e-5)
    # n = 2: t(0.975, 1) = 12.706.
    assert stats.mean_interval([0, 2]).half == pytest.approx(12.7062, rel=1e-4)


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = sum(
        found.low <= 7.0 <= found.high for found in (stats.mean_interval(rng.normal(7, 2, 3), 0.8) for _ in range(2000))
    )
    assert hits / 2000 == pytest.approx(0.8, abs=0.03)


def test_one_seed_has_no_interval():
    assert stats.mean_interval([4.2]) == (4.2, None, 1)


def test_paired_difference_is_over_shared_seeds():
    found = stats.paired_interval({0: 5.0, 1: 6.0, 7: 100.0}, {0: 1.0, 1: 2.0, 2: -50.0})
    assert found == (4.0, 0.0, 2)
    assert stats.paired_interval({0: 1.0}, {1: 1.0}) is None


@pytest.mark.parametrize("values,confidence,word", [([], 0.95, "values"), ([1.0], 1.0, "confidence=1.0")])
def test_bad_intervals_are_refused(values, confidence, word):
    with pytest.raises(ValueError, match=word):
        stats.mean_interval(values, confidence)


def test_exponent_ignores_the_overhead_of_small_sizes():
    sizes = [16, 64, 1024, 2048, 4096]
    costs = [5.0, 5.0, *(1e-6 * n**2 for n in sizes[2:])]
    assert stats.growth_exponent(sizes, costs) == pytest.approx(2.0)
    assert stats.growth_exponent([64], [1.0]) is None


def test_fit_recovers_a_quadratic():
    sizes = [64, 256, 1024, 4096]
    fit = stats.fit_curve(sizes, [3e-4 + 2e-6 * n + 5e-9 * n * n for n in sizes])
    assert fit == pytest.approx((3e-4, 2e-6, 5e-9), rel=1e-6)
    with pytest.raises(ValueError, match="two sizes"):
        stats.fit_curve([1], [1.0])


def test_efficiency_length_is_where_curves_cross():
    plain = stats.CostCurve(1.0, 0.0, 1e-6)
    assert stats.efficiency_length(stats.CostCurve(1.0, 2e-3, 0.0), plain) == pytest.approx(2000)
    assert stats.efficiency_length(stats.CostCurve(0.5, 0.0, 5e-7), plain) == 0.0
    assert stats.efficiency_length(stats.CostCurve(2.0, 0.0, 2e-6), plain) == math.inf
    # Cheaper at first, dearer in the end: it does not stay cheaper.
    assert stats.efficiency_length(stats.CostCurve(0.0, 0.0, 2e-6), plain) == math.inf
    assert stats.efficiency_length(plain, plain) == math.inf


def test_z_scores_point_up_when_better():
    lower = stats.z_scores({"good": 1.0, "bad": 3.0, "mid": 2.0}, higher_is_better=False)
    assert lower["good"] == -lower["bad"] == pytest.approx(math.sqrt(1.5)) and lower["mid"] == 0.0
    assert stats.z_scores({"a": 1.0, "b": 1.0}, True) == {"a": 0.0, "b": 0.0}
