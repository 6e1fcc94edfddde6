"""The study of features used again at equal executed work, small."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

from attnlib.bench import suites  # noqa: E402
from attnlib.bench.studies.diffusion import caching  # noqa: E402
from attnlib.cache import Router  # noqa: E402


def test_half_of_a_table():
    torch.manual_seed(0)
    router = Router(6, 5)
    table = caching.half(router)
    assert table.sum() == 15 and table[0].all()
    scores = router.scores()[1:]
    assert scores[table[1:]].min() >= scores[~table[1:]].max()
    other = caching.at_random(6, 5)
    assert other.sum() == 15 and torch.equal(other, caching.at_random(6, 5)) and not torch.equal(other, table)


@pytest.mark.parametrize("generator", ["unet", "dit"])
def test_contestants_do_equal_work(untrained_generators, diffusion_figures, tmp_path, generator):
    told = []
    found = caching.measure(
        told.append, tmp_path / "kept.jsonl", tmp_path, generator=generator, count=1, near=1,
        folder=untrained_generators, settings={"num_inference_steps": 4}, training={"epochs": 1}, batch=2,
    )  # fmt: skip
    json.dumps(found)
    assert "| full (100 %) | " in diffusion_figures.caching_table(found)
    shares = {row["name"]: row["executed"] for row in found["rows"]}
    assert shares.pop("full") == 1.0 and 0.5 < shares.pop("attention broadcast") < 1
    assert 0.5 <= shares.pop("TaylorSeer") <= 0.75
    assert set(shares.values()) == {0.5} and len(shares) == (5 if generator == "unet" else 4)
    assert all("near" in row and "against" in row for row in found["rows"] if row["name"] != "full")
    assert len(found["router"]["per step"]) == 4 and found["router"]["per step"][0] == 1.0
    assert (tmp_path / "diffusion-caching-cpu.png").exists() and "diffusion-caching" in suites()
