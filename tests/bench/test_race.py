"""The race between ours and another implementation: equal outputs first, then times; files keep what they held."""

import json

import pytest
import torch
from torch import nn

from attnlib.bench.speed.race import Race


def given():
    return [torch.randn(2, 4, requires_grad=True)]


def test_outputs_that_differ_are_no_race():
    torch.manual_seed(0)
    race = Race("two layers", rounds=1)
    with pytest.raises(ValueError, match="one: outputs differ by"):
        race.run("one", nn.Linear(4, 4), nn.Linear(4, 4), given())
    with pytest.raises(ValueError, match=r"two: ours gives \(2, 4\), theirs \(2, 3\)"):
        race.run("two", nn.Linear(4, 4), nn.Linear(4, 3), given())
    with pytest.raises(ValueError, match="nan: outputs differ"):
        race.run("nan", lambda x: x * float("nan"), lambda x: x, given())
    assert race.records == {}


def test_slow_theirs_and_what_a_file_holds(tmp_path):
    fast, path = nn.Linear(4, 4), tmp_path / "sub" / "race.json"

    def slow(x):
        torch.randn(200_000).exp()
        return fast(x)

    race = Race("a layer", rounds=3)
    record = race.run("slow", fast, slow, given(), authors="nobody", commit="0")
    assert record["forward"]["speedup"] > 1 < record["both"]["speedup"]
    assert "both" not in race.run("forward alone", fast, fast, given(), backward=False)
    race.write(path)
    again = Race("a layer", rounds=1)
    again.run("third", fast, fast, given())
    again.write(path)
    held = json.loads(path.read_text())["results"]
    assert list(held) == ["slow", "forward alone", "third"]
    assert held["slow"]["authors"] == "nobody"
    assert held["slow"]["difference"] == 0.0
