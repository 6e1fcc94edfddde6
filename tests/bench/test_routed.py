"""The study of what patterns keep, as small as it goes."""

import pytest
import torch

from attnlib.bench.studies import routed


def test_patterns_have_the_density_they_say():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, routed.HEADS, routed.TOKENS**2, 4)
    recall = {}
    for name, pattern in routed.PATTERNS.items():
        for density in routed.DENSITIES:
            assert float(pattern(q, k, density).density) == pytest.approx(density), name
        recall[name] = float(routed.block_recall(q, k, pattern(q, k, 1 / 8)).mean())
    assert max(recall, key=recall.get) == "largest pairs, the most there is"
    assert recall[routed.RANDOM] == pytest.approx(1 / 8, abs=0.01)


def test_nearest_keys_are_near():
    q = torch.zeros(1, 1, routed.TOKENS**2, 1)
    plan, at = routed.PATTERNS["nearest keys"](q, q, 1 / 16), routed._places()
    assert int((at[:, None] - at[plan.index[0, 0]]).abs().max()) <= 6


def test_the_study_runs(tmp_path):
    found = routed.measure(
        pictures=tmp_path, steps=1, fitting_steps=1, batch=2, seeds=(0, 1), tested=8, shown=1
    )  # fmt: skip
    assert [r["name"] for r in found["rows"]] == list(routed.NAMES) and (tmp_path / "routed-cpu.svg").exists()
    for row in found["rows"]:
        values = [row[f"recall at {routed.said(d)}"]["mean"] for d in routed.DENSITIES]
        assert values == sorted(values) and row["against"]["n"] == 2
