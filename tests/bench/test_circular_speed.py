"""The measurement of circular windows, as small as it goes."""

from attnlib.bench.speed import circular


def test_the_measurement_runs_and_both_compute_the_same():
    found = circular.measure(images=((6, 0), (6, 3)), radius=2, heads=1, head_dim=4, rounds=1)
    for row, tokens in zip(found["records"], (36, 39), strict=True):
        assert row["error"] < 1e-4 and row["side"] ** 2 + row["text"] == tokens
        for what in ("forward", "training"):
            assert row[what][circular.MASKED]["times_as_fast"] == 1.0
            assert all(r["seconds"] >= 0 for r in row[what].values())
    # 9 pixels of a circle of radius 2 in the interior: the four at distance 2 are outside.
    plain, beside = (row["density"] for row in found["records"])
    assert 0.1 < plain < 9 / 36 and beside > plain
