"""The benchmark of references: the contenders read the same images, and the committed figures hold what is said."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

from attnlib.bench import NEEDS_HF, suites  # noqa: E402
from attnlib.bench.speed.references import measure  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "references-cpu.json"


@pytest.mark.filterwarnings("ignore")
def test_every_contender_is_measured():
    assert "references" in suites() and "references" in NEEDS_HF
    found = measure(repeats=1, channels=(8,), head_dim=4, text_width=8, latent=8)
    assert set(found["seconds"]) == {"none", "diffusers", "diffusers, masks", "mip-adapter"}
    assert all(ratio["ratio"] > 0 for ratio in found["mip-adapter to"].values())


def test_two_weighted_images_cost_at_most_a_quarter_more():
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert found["settings"]["latent"] == 32
    assert max(found["mip-adapter to"][name]["ratio"] for name in ("diffusers", "diffusers, masks")) <= 1.25
