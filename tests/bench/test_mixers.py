"""The study of mixers, as small as it goes."""

import pytest
import torch

from attnlib.bench import small
from attnlib.bench.studies import mixers


@pytest.mark.parametrize("name", mixers.CONTESTANTS)
def test_contestants_have_equal_parameters(name):
    with torch.device("meta"):
        goal = small.parameters(mixers.build(mixers.BASELINE, 10))
        own = small.parameters(mixers.build(name, 10, mixers.width_for(name, goal, 10)))
    assert abs(own - goal) <= 0.01 * goal


def test_what_the_middle_sees():
    """Windows that are not shifted see themselves; attention over all sees further."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, mixers.SIDE, mixers.SIDE)
    near = mixers.receptive_field(mixers.build("residual network", 10).eval(), x)
    far = mixers.receptive_field(mixers.build(mixers.BASELINE, 10).eval(), x)
    assert 0 < near and 0 < far < 32


def test_the_study_runs(tmp_path):
    names = ("Swin windows",)
    found = mixers.measure(
        pictures=tmp_path, steps=1, batch=2, seeds=(0, 1), tested=8, names=names, cost_side=32
    )  # fmt: skip
    assert set(found["tasks"]) == set(mixers.TASKS) and len(list(tmp_path.glob("mixers-*.svg"))) == 2
    for task in found["tasks"].values():
        assert [r["name"] for r in task["rows"]] == [mixers.BASELINE, "Swin windows"]
        assert task["rows"][1]["against"]["n"] == 2
