"""The benchmark of modules that hand on what they gave, and what its committed figures have to hold."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from attnlib.bench import NEEDS_HF, suites  # noqa: E402
from attnlib.bench.speed import steps as bench  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "steps-cpu.json"


def test_half_of_the_modules_run():
    said = []
    result = bench.measure(64, 2, 4, 4, rounds=1, progress=said.append)
    assert [r["executed"] for r in result["records"]] == [1.0, 0.5, 0.5] * 2
    assert all(r["seconds"] > 0 and r["times as fast"] > 0 for r in result["records"]) and said
    assert "steps" in suites() and "steps" in NEEDS_HF
    table = bench.half(10, 12).table()
    assert table.sum() == 60 and bool(table[0].all())


def test_half_of_the_modules_take_two_thirds_of_the_time():
    """But for inherited resolutions: half of the inner ones, while the costly outer one always runs."""
    records = {r["contender"]: r for r in json.loads(RESULTS.read_text())["records"]}
    for name in ("DiT, HarmoniCa", "DiT, inherited halves of blocks", "U-Net, inherited layers"):
        assert records[name]["executed"] == 0.5 and records[name]["times as fast"] >= 1.5, name
    assert records["U-Net, inherited resolutions"]["times as fast"] > 1
