"""The study of scans, as small as it goes."""

import pytest
import torch

from attnlib.bench import small
from attnlib.bench.studies import mixers, scans


@pytest.mark.parametrize("name", scans.CONTESTANTS)
def test_contestants_have_equal_parameters(name):
    with torch.device("meta"):
        goal = small.parameters(scans.build(scans.BASELINE, 10))
        own = small.parameters(scans.build(name, 10, scans.width_for(name, goal, 10)))
    assert abs(own - goal) <= 0.01 * goal


def test_one_route_sees_what_came_before_it():
    """Of two tokens in a row, the later one depends on the earlier one's pixels; both ways see both."""
    for name, both in (("one route (rows)", False), ("rows both ways", True)):
        torch.manual_seed(0)
        place = scans.CONTESTANTS[name](mixers.places((8,), (1,), (2,), (2,))[0][0]).double()
        x = torch.randn(1, 2, 6, 8, dtype=torch.double, requires_grad=True)
        (seen,) = torch.autograd.grad(place(x)[0, 0, 0].sum(), x)
        assert bool(seen[0, 1, 5].any()) is both  # the last token, for the first


def test_the_study_runs(tmp_path):
    names = ("one route (rows)", "convolution only (MambaOut)")
    found = scans.measure(pictures=tmp_path, steps=1, batch=2, seeds=(0, 1), tested=8, names=names)
    assert set(found["tasks"]) == set(mixers.TASKS) and len(list(tmp_path.glob("scans-*.svg"))) == 2
    for task in found["tasks"].values():
        assert [r["name"] for r in task["rows"]] == [scans.BASELINE, *names]
        assert task["rows"][1]["against"]["n"] == 2
    assert found["costs"][scans.BASELINE]["x_four_routes"] == 1
