"""The measurement of segments, as small as it goes."""

import torch

from attnlib.bench.speed import segments


def test_the_measurement_runs_and_both_compute_the_same():
    found = segments.measure(count=6, heads=2, head_dim=4, rounds=1)
    assert [r["spread"] for r in found["records"]] == list(segments.SPREADS)
    for row in found["records"]:
        for what in ("forward", "training"):
            assert row[what]["padded windows"]["times_as_fast"] == 1.0
            assert all(r["seconds"] >= 0 and r["peak_bytes"] > 0 for r in row[what].values())


def test_padded_windows_take_more_memory_the_more_sizes_differ():
    torch.manual_seed(0)
    row = segments.record("skewed, 4 / u up to 1000", 40, 2, 8, 1)
    assert row["longest"] > 4 * row["tokens"] / row["segments"]
    assert row["training"]["scatter"]["peak_bytes"] < row["training"]["padded windows"]["peak_bytes"]
