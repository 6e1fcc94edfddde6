"""Studies of foveation and of search, at a size of seconds."""

import functools

import pytest
import torch

from attnlib.bench.data.displays import PAIRS
from attnlib.bench.data.worlds import tiled_digits
from attnlib.bench.studies import foveation, searching
from attnlib.models.perception import EccNet


def test_foveation(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(foveation, "SHARES", (0.0, 0.3, 1.0))
    monkeypatch.setattr(foveation, "probed", functools.partial(foveation.probed, count=30))
    monkeypatch.setattr(foveation, "crossing", lambda shares, a, b: a[-1] - a[0])
    said: list[str] = []
    small = dict(seeds=(0,), coding=6, images=64, steps=3, descent=2)
    found = foveation.measure(said.append, tmp_path / "kept.jsonl", tmp_path, **small)
    assert [r["name"] for r in found["stages"]["rows"]] == list(foveation.STAGES) and len(said) == 7
    loss = {r["name"]: r["similarity"]["mean"] for r in found["stages"]["rows"]}
    assert loss.pop("reference") == pytest.approx(1) and max(loss.values()) - min(loss.values()) < 0.1
    ways = {r["name"]: r for r in found["metamers"]["rows"]}
    assert ways["one pass"]["outside over inside"]["mean"] > ways["uniform blur"]["outside over inside"]["mean"]
    assert (tmp_path / "foveation-cpu.svg").exists() and (tmp_path / "foveation-metamers-cpu.svg").exists()
    again: list[str] = []
    assert foveation.measure(again.append, tmp_path / "kept.jsonl", **small)["rows"] == found["rows"] and not again


def test_search(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(searching, "network", lambda name, seed: EccNet(width=1, degrees=(10, 5, 2, 1, 1), quant=2.0))
    found = searching.measure(
        None, tmp_path / "kept.jsonl", tmp_path, pairs=["L and T"], displays=1, seeds=(0,),
        contestants=(searching.TRAINED, *searching.BASELINES),
    )  # fmt: skip
    told = found["pairs"]["L and T"]
    assert {r["name"] for r in told["rows"]} == {searching.TRAINED, "template", "chance"}
    for row in told["runs"]:
        each = [value for key, value in row.items() if key.startswith("moves, ")]
        assert len(each) == 4 and row["moves"] == pytest.approx(sum(each) / 4)
    assert told["people"]["asymmetry"] == pytest.approx((33 - 14) / (33 + 14))
    assert (tmp_path / "searching-cpu.svg").exists() and set(searching.NETS).isdisjoint(PAIRS)


def test_random_weights_are_those_of_the_seed():
    a, b, c = (searching.network("random weights", s).blocks[0][0].weight for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_digits_are_everywhere():
    images, labels = tiled_digits(6, generator=torch.Generator().manual_seed(0))
    again, _ = tiled_digits(6, generator=torch.Generator().manual_seed(0))
    assert images.shape == (6, 3, 64, 64) and labels.shape == (6,) and torch.equal(images, again)
    cells = images.amax(1)[:, :63, :63].unfold(1, 21, 21).unfold(2, 21, 21).flatten(3).amax(3)
    assert (cells > 0.7).all()  # photographs are dimmed to 0.6
