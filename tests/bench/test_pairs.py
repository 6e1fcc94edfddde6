"""The measurement of single pairs runs and says where ratios cross 1."""

from attnlib.bench.speed.pairs import crossing, measure


def test_it_measures_every_density_and_says_where_pairs_stop_paying():
    found = measure(48, (0.1, 0.5), 1, 8, rounds=1)
    assert [r["keep_rate"] for r in found["records"]] == [0.1, 0.5]
    assert set(found["faster_below"]) == {"forward, dense", "forward, masked", "both, dense", "both, masked"}
    assert all(r["forward_pairs_over_dense"] > 0 for r in found["records"])


def test_crossings():
    assert crossing([0.1, 0.2], [0.5, 0.9]) is None and crossing([0.1, 0.2], [1.5, 2.0]) == 0.0
    assert crossing([0.1, 0.2, 0.3], [0.5, 0.9, 1.1]) == 0.25
