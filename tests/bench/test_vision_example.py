"""The example that trains a backbone with Accelerate: it goes on where it stopped, and its weights load."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import attnlib

pytest.importorskip("accelerate")
PATH = Path(__file__).parents[2] / "examples" / "vision" / "train.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("vision_example", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, out, *more):
    return example.main(["--out", str(out), "--batch", "4", "--save-every", "2", *more])


def test_it_trains_goes_on_and_its_weights_load(example, tmp_path, capsys):
    straight = run(example, tmp_path / "a", "--steps", "4")
    assert straight["steps"] == 4 and 0 <= straight["accuracy"] <= 100
    run(example, tmp_path / "b", "--steps", "4")
    (tmp_path / "b" / "checkpoint" / "taken.json").write_text(json.dumps({"steps": 4}))
    again = run(example, tmp_path / "b", "--steps", "4")
    assert "going on from step 4" in capsys.readouterr().out and again == straight
    model = attnlib.create_model(
        "crossformer_tiny", pretrained=tmp_path / "a" / "model.safetensors", num_classes=10, in_chans=1,
        **example.SMALL,
    )  # fmt: skip
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)


def test_another_model_with_another_mechanism(example, tmp_path):
    settings = ("embed_dim=16", "depths=(1, 1)", "num_heads=(1, 2)", "kernel_size=3", "mlp_ratio=1.0")
    found = run(
        example, tmp_path, "--steps", "2", "--model", "nat_mini", "--mechanism", "focalnet",
        *(word for s in settings for word in ("--set", s)),
    )  # fmt: skip
    assert found["model"] == "nat_mini"
    with pytest.raises(SystemExit, match="NAME=VALUE"):
        run(example, tmp_path, "--set", "depths")
