"""Shared attention over the scales of a backbone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from attnlib.models.backbones.resnet import resnet
from attnlib.models.medusa import SharedAttention


class Body(nn.Module):
    """A body that counts its calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(1, 3, 3, padding=1), 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x)


def trunk():
    torch.manual_seed(0)
    return resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=2)


def wrapped(**settings):
    return SharedAttention(trunk(), **{"body": Body(), "global_dim": 3, "body_size": 16, **settings})


def test_the_formula():
    """A small chain of stages, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1))
    for form, factor in (("residual", 2), ("multiply", 1)):
        model = SharedAttention(
            net, ["0", "1"], [4, 5], body=Body(), global_dim=3, body_size=None, form=form, zero_heads=False
        ).double()
        x = torch.randn(2, 1, 13, 9, dtype=torch.float64)
        g = model.body.conv(x)
        y = x
        for stage, head in zip(net, model.heads, strict=True):
            y = nn.functional.conv2d(y, stage.weight, stage.bias, 2, 1)
            near = nn.functional.interpolate(g, y.shape[2:], mode="bilinear")
            y = y * factor * head(torch.cat([near, y], 1)).sigmoid()
        torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-12)
        for stage in net:
            stage._forward_hooks.clear()


def test_body_runs_once_and_zero_heads_change_nothing():
    model, x = wrapped().eval(), torch.rand(2, 3, 40, 33)
    assert model(x).equal(trunk().eval()(x)) and model.body.calls == 1
    open_ = wrapped(form="multiply").eval()
    assert not open_(x).allclose(open_.model(x))
    assert open_.model(x).equal(trunk().eval()(x))  # the backbone by itself is what it was
    assert len(open_.heads) == len(open_.stage_names) >= 4 and open_.body.calls == 1


@pytest.mark.parametrize("head", ["channel", "pixel"])
def test_gates(head):
    model, x = wrapped(form="multiply", head=head, kernel_size=3).eval(), torch.rand(2, 3, 40, 33)
    gates, maps = model.gates(x), model.model.forward_intermediates(x, intermediates_only=True)
    assert list(gates) == model.stage_names
    for gate, m in zip(gates.values(), maps, strict=True):
        assert gate.shape[2:] == m.shape[2:] and gate.shape[1] in (1, m.shape[1]) and 0 < gate.min() <= gate.max() < 1


def test_every_scale_teaches_the_body():
    model, x = wrapped(zero_heads=False), torch.rand(2, 3, 40, 33)
    for j in range(len(model.heads)):
        alone = copy.deepcopy(model)
        for i, head in enumerate(alone.heads):
            if i != j:
                nn.init.zeros_(head.weight)
        alone(x).sum().backward()
        assert alone.body.conv.weight.grad.abs().sum() > 0


def test_foreign_backbones():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 3, 2))
    model = SharedAttention(net, ["0", "2"], [4, 6], global_dim=3, body_size=16).eval()
    x = torch.rand(2, 3, 20, 21)
    assert model(x).equal(net(x)) and model.layout == "NCHW"
    assert sorted(model.gates(x)) == ["0", "2"]


def test_use():
    model, x = wrapped(form="multiply").eval(), torch.rand(2, 3, 24, 17)
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other(x).equal(y)
        nn.init.zeros_(other.heads[0].weight)  # the copy gates by its own heads
        assert not other(x).equal(y) and model(x).equal(y)
    assert model(x[:0]).shape == (0, 2)
    assert copy.deepcopy(model).bfloat16()(x.bfloat16()).isfinite().all()
    grey = torch.rand(2, 1, 30, 30)
    assert not model(x, grey).equal(y) and model(x, grey)[:1].allclose(model(x[:1], grey[:1]), atol=1e-5)
    broken = wrapped(form="multiply").eval()
    with pytest.raises(ValueError, match="x must be images"):
        broken(torch.zeros(1, 2, 8, 8))
    assert broken._shared is None and broken.model(x).equal(trunk().eval()(x))


def test_bad_input():
    model, x = wrapped(), torch.rand(2, 3, 24, 17)
    with pytest.raises(ValueError, match="body_x must be"):
        model(x, torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="target holds the class 2"):
        model.loss(model(x), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="target must be"):
        model.loss(model(x), torch.zeros(2))
    with pytest.raises(ValueError, match="no modules"):
        wrapped(stages=["stage9"], dims=[4])
    with pytest.raises(ValueError, match="as many"):
        wrapped(stages=["stages.0"], dims=[4, 4])
    with pytest.raises(ValueError, match="feature_info"):
        SharedAttention(nn.Identity())
    with pytest.raises(ValueError, match="form"):
        wrapped(form="add")
    with pytest.raises(ValueError, match="odd"):
        wrapped(kernel_size=2)
