"""The study of importance, as small as it goes."""

import pytest
import torch

from attnlib.bench.studies import importance
from attnlib.hooks import Node


def test_sizes_are_those_of_the_path_from_values_to_the_stream():
    model = importance.build()
    inner, found = model.stages[1].mixer.inner, importance.sizes(model)
    own = slice(12, 24)
    path = (inner.proj.weight[:, own] @ inner.v.weight[own]).detach()
    assert found[Node("z", 1, 1)] == pytest.approx(float(path.norm()), rel=1e-5) and len(found) == 12


def test_all_heads_silent_is_less_than_some():
    model = importance.build().eval()
    test = importance.images(6, "test", torch.Generator().manual_seed(0))
    nodes = [Node("z", layer, head) for layer in range(3) for head in range(4)]
    with torch.no_grad():
        for block in model.stages:
            block.mixer.inner.proj.bias.zero_()
        silent = importance.silenced(model, test, nodes)
        for block in model.stages:
            block.mixer.inner.proj.weight.zero_()
        assert importance.silenced(model, test) == silent


def test_the_study_runs(tmp_path):
    orders = (importance.BASELINE, "size of weights", "uniform: divergence")
    found = importance.measure(
        pictures=tmp_path, keep=tmp_path / "kept", steps=1, batch=2, fitting=2, tested=2, draws=1, seeds=(0,),
        orders=orders,
    )  # fmt: skip
    assert (tmp_path / "importance-cpu.svg").exists() and [row["name"] for row in found["rows"]] == list(orders)
    assert len({row["intact"]["mean"] for row in found["rows"]}) == 1
    assert {f"{n} silent" for n in range(1, 12)} <= set(found["rows"][0])
