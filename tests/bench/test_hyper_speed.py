"""The benchmark of HyperAttention: what it gives is whole, and exact where nothing is estimated."""

from attnlib.bench import suites
from attnlib.bench.speed.hyper import measure


def test_short_sequences_are_exact_and_planted_ones_near():
    assert "hyper" in suites()
    exact = measure(64, 1, 8, 8, 8, 64, rounds=1)["records"]
    assert all(r["error"] < 1e-5 and r["error_of_random_tokens"] < 1e-5 and r["seconds"] > 0 for r in exact)
    records = measure(256, 1, 16, 32, 32, 64, rounds=1)["records"]
    assert [r["contender"] for r in records][0] == "causal, sdpa" and records[0]["speedup"] == 1
    assert all(0 < r["error"] < 0.8 for r in records[1:])
