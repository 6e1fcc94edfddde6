"""The study of a DiMR against a DiT of equal size, small."""

import json

import pytest
import torch

pytest.importorskip("diffusers")

from attnlib.bench import suites  # noqa: E402
from attnlib.bench.small import operations, parameters  # noqa: E402
from attnlib.bench.studies.diffusion import resolutions  # noqa: E402


def test_sizes_are_equal():
    made = {name: resolutions.build(name).eval() for name in resolutions.NAMES}
    size = {name: parameters(model) for name, model in made.items()}
    assert size["DiMR"] == pytest.approx(size["DiT"], rel=0.05)
    one = (torch.zeros(1, 4, 16, 16), torch.tensor([5]), torch.tensor([1]))
    work = {name: operations(lambda model=model: model(*one)) for name, model in made.items()}
    assert work["DiT, deeper"] == pytest.approx(work["DiMR"], rel=0.1) and work["DiT"] < work["DiMR"]
    assert "diffusion-resolutions" in suites()


def test_noise_of_a_known_share():
    z, noise = torch.zeros(2, 4, 3, 3), torch.ones(2, 4, 3, 3)
    a = resolutions.alphas()
    got = resolutions.noised(z, torch.tensor([0, 999]), noise)
    assert torch.allclose(got[:, 0, 0, 0].double(), (1 - a[[0, 999]]).sqrt(), atol=1e-6) and a[0] > 0.99 > 0.01 > a[-1]


def test_it_runs_small(untrained_generators, tmp_path):
    told = []
    found = resolutions.measure(
        told.append, tmp_path / "kept.jsonl", tmp_path, seeds=(0, 1), steps=1, batch=2, drawn=4, tested=3, width=16,
        depth=2, folder=untrained_generators,
    )  # fmt: skip
    assert [r["name"] for r in found["rows"]] == list(resolutions.NAMES) and len(told) == 6
    for row in found["rows"]:
        assert row["noise missed"]["n"] == 2 and 0.2 < row["noise missed"]["mean"] < 5
    assert found["sizes"]["DiMR"]["parameters"] > 0
    assert (tmp_path / "diffusion-resolutions-cpu.svg").exists()
    json.dumps(found)
