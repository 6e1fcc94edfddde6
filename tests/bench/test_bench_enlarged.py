"""The benchmark of HiDiffusion's times, and what its committed figures have to hold."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from attnlib.bench import NEEDS_HF, suites  # noqa: E402
from attnlib.bench.speed import enlarged as bench  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "enlarged-cpu.json"


def test_phases_count_as_often_as_they_come():
    result = bench.measure(((4, (0.4, 0.2)),), rounds=1, side=8, width=8)
    (row,) = result["records"]
    assert row["steps"] == {"conv and pool": 10, "conv": 10, "windows": 30} and row["latents"] == 16
    parts = sum(count / row["times_as_fast"][name] for name, count in row["steps"].items())
    assert row["sampling_times_as_fast"] == pytest.approx(50 / parts)
    assert "enlarged" in suites() and "enlarged" in NEEDS_HF


def test_larger_images_take_less_time():
    four, sixteen = json.loads(RESULTS.read_text())["records"]
    assert four["pixels"] == 4 and four["sampling_times_as_fast"] >= 1.3
    assert sixteen["pixels"] == 16 and sixteen["sampling_times_as_fast"] >= 1.5
