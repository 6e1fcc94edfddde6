"""The study of leaving early, small."""

import json

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.studies import exits
from attnlib.models.exits import exit_costs


def test_the_wider_cnn_costs_what_latents_cost():
    x = torch.zeros(1, 1, exits.SIDE, exits.SIDE)
    ours, wide = (exit_costs(exits.build(name).eval(), x)[-1] for name in (exits.OURS, exits.WIDE))
    assert wide == pytest.approx(ours, rel=0.05) and "exits" in suites()


def test_noise_is_graded():
    x, labels = exits.graded(40, "test", torch.Generator().manual_seed(0))
    assert x.shape == (40, 1, exits.SIDE, exits.SIDE) and labels.shape == (40,)
    spread = [float(x[i::4].std()) for i in range(4)]
    assert spread == sorted(spread) and x[::4].min() >= 0


def test_linear_exits_stop_where_they_are_asked_to():
    model = exits.build(exits.BASELINE).eval()
    x, _ = exits.graded(3, "test", torch.Generator().manual_seed(0))
    all_of_them = model.exits(x)
    for k in range(4):
        found = model.predict(x, [float("inf")] * k + [float("-inf")] * (3 - k))
        assert found.exit.tolist() == [k] * 3
        torch.testing.assert_close(found.y, all_of_them[k])


def test_it_runs_small(tmp_path):
    found = exits.measure(
        pictures=tmp_path, keep=tmp_path / "kept.jsonl", steps=1, batch=4, seeds=(0, 1), drawn=12, tested=8, repeats=1
    )
    assert [r["name"] for r in found["rows"]] == [exits.BASELINE, exits.WIDE, exits.ALONE, exits.OURS]
    for row in found["rows"]:
        if row["name"] != exits.ALONE:
            assert all(row[f"spent at {b} M"]["mean"] <= row["exit 4, M"]["mean"] + 1e-9 for b in found["budgets"])
            assert row["ms, early, one"]["mean"] > 0
    assert (tmp_path / "exits-cpu.svg").exists()
    json.dumps(found)
