"""Studies of whole small backbones: crops of photographs, and segmentation beside dilation."""

import json

import pytest
import torch

from attnlib.bench import suites
from attnlib.bench.studies import backbones, ddrnet
from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features


def test_backbones_have_about_equal_parameters():
    assert {"backbones", "ddrnet"} <= set(suites())
    with torch.device("meta"):
        counts = {name: backbones.parameters(make()) for name, make in backbones.CONTESTANTS.items()}
        dense = [ddrnet.parameters(make()) for make in ddrnet.CONTESTANTS.values()]
    goal = counts[backbones.BASELINE]
    assert all(abs(n - goal) < 0.05 * goal for n in counts.values()), counts
    assert max(dense) < 1.01 * min(dense)


def test_a_small_run_of_the_backbones(monkeypatch, tmp_path):
    chosen = {n: backbones.CONTESTANTS[n] for n in (backbones.BASELINE, "PATNet")}
    monkeypatch.setattr(backbones, "CONTESTANTS", chosen)
    found = backbones.measure(pictures=tmp_path, steps=1, batch=2, seeds=(0,), tested=8, repeats=1)
    assert set(found["costs"]) == set(chosen) and (tmp_path / "backbones-cpu.svg").exists()
    json.dumps(found)


def test_dilations_take_the_place_of_strides():
    """A dilated network is the strided one where both are defined: at every fourth token of its map."""
    torch.manual_seed(0)
    plain = resnet((4, 4, 4, 4), (1, 1, 1, 1), basic=True, stem_dim=4, num_classes=0, img_size=64).eval()
    for block in (b for stage in plain.stages for b in stage.blocks):
        torch.nn.init.normal_(block.conv3.norm.weight)  # branches start at zero
    model = Features(plain, [len(plain.feature_info) - 1])
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        strided = model(x)[0]
        wide = ddrnet.dilated(model, {2: 2, 3: 4})(x)[0]
    assert strided.shape[2:] == (2, 2) and wide.shape[2:] == (8, 8)
    torch.testing.assert_close(wide[:, :, ::4, ::4], strided)


def test_a_small_run_of_segmentation(monkeypatch, tmp_path):
    chosen = {n: ddrnet.CONTESTANTS[n] for n in (ddrnet.BASELINE, ddrnet.OURS, ddrnet.AUXILIARY)}
    monkeypatch.setattr(ddrnet, "CONTESTANTS", chosen)
    found = ddrnet.measure(
        pictures=tmp_path, steps=1, batch=2, seeds=(0,), tested=4, latency_side=64, repeats=1
    )  # fmt: skip
    assert [r["name"] for r in found["latency"]["rows"]] == [ddrnet.BASELINE, ddrnet.OURS]
    assert found["rows"][0]["parameters"]["mean"] == pytest.approx(found["rows"][2]["parameters"]["mean"], rel=0.01)
    assert (tmp_path / "ddrnet-cpu.svg").exists()
    json.dumps(found)
