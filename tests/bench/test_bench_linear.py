import math

from attnlib.bench.speed import linear


def test_measure_records_every_contender(monkeypatch):
    monkeypatch.setattr(linear, "LONGEST_QUADRATIC", 32)
    seen = []
    result = linear.measure(sizes=(16, 32, 64), heads=2, head_dim=4, rounds=2, clock="cpu", progress=seen.append)
    records = {r["contender"]: r for r in result["records"]}
    assert len(records) == 6 and result["settings"]["heads"] == 2
    assert records["masked product, decay per head"]["sizes"] == [16, 32]
    for record in records.values():
        n = len(record["sizes"])
        assert all(len(record[key]) == n for key in ("forward_seconds", "both_over_sdpa", "peak_bytes"))
        assert min(record["forward_seconds"] + record["both_seconds"]) > 0
        assert all(math.isfinite(record[key]) for key in ("forward_exponent", "both_exponent", "memory_exponent"))
    assert records["sdpa"]["forward_over_sdpa"] == [1.0] * 3
    assert len(seen) == 3 * 2 * (6 + 6 + 5)
