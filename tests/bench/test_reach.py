"""Pairs of digits, what a token sees, and the study of reach, small."""

import json

import pytest
import torch
from torch import nn

from attnlib.bench import suites
from attnlib.bench.data.worlds import digit_pairs
from attnlib.bench.fields import mean_distance, squared_gradients, support
from attnlib.bench.studies import reach
from attnlib.nn.modulation.van import LargeKernelAttention


def test_pairs_are_where_it_says():
    g = torch.Generator().manual_seed(0)
    x, classes, corners = digit_pairs(200, (30, 90), 14, (20, 60), 3, noise=0.0, generator=g)
    gap = corners[:, 1, 1] - corners[:, 0, 1]
    assert gap.min() >= 20 and gap.max() <= 60 and gap.unique().numel() > 30 and classes.max() == 2
    assert 70 < (classes[:, 0] == classes[:, 1]).sum() < 130
    inside = torch.zeros_like(x)
    for i, pair in enumerate(corners.tolist()):
        for row, column in pair:
            inside[i, 0, row : row + 14, column : column + 14] = 1
    assert (x * inside).equal(x) and x.flatten(1).any(1).all()
    with pytest.raises(ValueError, match="apart"):
        digit_pairs(1, (30, 90), 14, (20, 80))


def test_what_a_token_depends_on():
    class Dilated(nn.Conv2d):
        def forward(self, x):
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    assert support(Dilated(4, 4, (3, 1), padding=(2, 0), dilation=2), 4, 9) == (5, 1)
    assert support(LargeKernelAttention(4), 4, 25) == (23, 23)
    x = torch.randn(1, 1, 5, 5, requires_grad=True)
    mass = squared_gradients(x[:, :, 2, 4] + 0 * x[:, :, 0, 0], x)
    assert mass.count_nonzero() == 1 and mean_distance(mass, (2.0, 1.0)) == pytest.approx(3.0)


def test_contestants_have_equal_parameters_and_read_the_tokens_of_the_digits():
    assert "reach" in suites()
    models = {name: reach.Pairs(name) for name in reach.CONTESTANTS}
    counts = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    assert max(counts) < 1.05 * min(counts)
    model = models["UniFormer"].eval()
    tokens = torch.randn(1, 2, 8, 60)
    model.tokens = lambda x: tokens
    own, same = model(torch.zeros(1, 1, *reach.SIZE), torch.tensor([[[0, 0], [8, 104]]]))
    want = model.head(torch.stack([tokens[0, 0, 0], tokens[0, 1, 7]]))
    torch.testing.assert_close(torch.cat([own, same], -1)[0], want)


def test_a_small_run_of_reach(monkeypatch, tmp_path):
    chosen = {n: reach.CONTESTANTS[n] for n in (reach.BASELINE, reach.CONTROL, "UniFormer")}
    monkeypatch.setattr(reach, "CONTESTANTS", chosen)
    found = reach.measure(pictures=tmp_path, steps=1, batch=2, seeds=(0,), tested=40, side=9)
    near = found["rows"][1]
    assert "same_26" in near and "same_46" not in near and (tmp_path / "reach-cpu.svg").exists()
    json.dumps(found)
