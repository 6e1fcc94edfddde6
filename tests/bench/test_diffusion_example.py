import importlib.util
import json
import pathlib

import pytest
import torch

from attnlib.bench.worlds import judge as judging
from attnlib.bench.worlds import models

FOLDER = pathlib.Path(__file__).parents[2] / "examples" / "diffusion"
pytest.importorskip("diffusers")
pytest.importorskip("accelerate")


def script(name):
    spec = importlib.util.spec_from_file_location(f"diffusion_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generators_train_go_on_and_load(tmp_path, capsys):
    common = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--scenes", "48", "--batch", "2"]
    train = script("train").main
    parts = ["scenes", "clip", "vae", "unet", "dit", "sd3", "pixel"]
    train([*parts, *common, "--steps", "1"])
    assert models.missing_parts(parts[1:], tmp_path / "out") == []
    before = models.part("unet", tmp_path / "out").conv_in.weight.clone()
    train(["unet", *common, "--steps", "3"])
    assert "unet: going on from step 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "work" / "unet" / "taken.json").read_text())["steps"] == 3
    assert not torch.equal(before, models.part("unet", tmp_path / "out").conv_in.weight)
    vae = models.part("vae", tmp_path / "out")
    assert vae.config.scaling_factor != 0.18215 and vae.config.shift_factor == 0.0
    image = models.pipeline("unet", tmp_path / "out")("a red star", num_inference_steps=1, output_type="pt").images
    assert image.isfinite().all()


def test_the_judge_trains_goes_on_and_loads(tmp_path, capsys):
    main = script("judge").main
    common = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--batch", "4"]
    main([*common, "--steps", "1"])
    main([*common, "--steps", "2"])
    assert "going on from step 1" in capsys.readouterr().out
    main([*common, "--examine", "--count", "4", "--results", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["bars"]) == set(judging.BARS) and isinstance(judging.load(tmp_path / "out"), judging.Judge)
