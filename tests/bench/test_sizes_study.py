import json

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.studies.diffusion import sizes

pytest.importorskip("diffusers")


def test_everyone_draws_at_the_size_that_is_asked_for(untrained_generators, diffusion_figures, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "STRENGTH", 1.0)
    told, drawn = [], []
    monkeypatch.setattr(sizes, "smaller", lambda images: drawn.append(images.shape[-2:]) or images[..., :64, :64])
    found = sizes.measure(
        told.append, tmp_path / "kept", tmp_path, factors=(1.5,), kinds=("one",), count=1,
        folder=untrained_generators, settings={"num_inference_steps": 3},
    )  # fmt: skip
    json.dumps(found)
    assert "One thing on 1.5 times the pixels a side" in diffusion_figures.sizes_table(found)
    rows = found["factors"]["1.5"]["one"]["rows"]
    assert [r["name"] for r in rows][:2] == ["plain", "drawn small, enlarged"] and len(rows) == len(told) == 6
    assert set(drawn) == {torch.Size([96, 96])} and (tmp_path / "diffusion-sizes-cpu.png").exists()
    assert "diffusion-sizes" in suites()
    again = sizes.measure(
        told.append, tmp_path / "kept", factors=(1.5,), kinds=("one",), count=1, folder=untrained_generators,
        settings={"num_inference_steps": 3},
    )  # fmt: skip
    assert again["factors"] == found["factors"] and len(told) == 6


def test_a_thing_that_grew_with_its_picture_is_as_large_as_before():
    small = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(sizes.smaller(small.repeat_interleave(2, 2).repeat_interleave(2, 3)), small)
