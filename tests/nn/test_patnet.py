"""patnet-partial-attention: one test per criterion of the card that concerns the layers."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture
from torch import nn

import attnlib
from attnlib.nn.gates.patnet import PartialSpatialAttention
from attnlib.positions import euclidean_buckets

F64 = torch.float64
PARTS = ("patnet-partial-attention", "patnet-self-attention")


def make(name, **config):
    torch.manual_seed(0)
    settings = {"dim": 8, **config}
    m = (PartialSpatialAttention if name == "spatial" else functools.partial(attnlib.create, name))(**settings)
    m = m.double().eval()
    for p in m.parameters():
        nn.init.normal_(p, 0, 0.4)
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def normed(norm, x):
    return (x - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias


def convolved(m, x):
    return F.conv2d(x.movedim(-1, 1), m.conv.conv.weight, padding=1).movedim(1, -1)


@pytest.mark.parametrize("slug", PARTS)
def test_the_authors_class(slug):
    fixture = Fixture(slug)
    fixture.holds("a", fixture.build("a").eval(), lambda m, given: m(given["x"]))


def test_channel_attention_is_the_equation():
    m, x = make("pat-ch"), tokens(2, 5, 4, 8)
    first, rest = x[..., :2], x[..., 2:]
    stats = torch.cat([rest.mean((1, 2)), rest.flatten(1, 2).std(1)], -1)
    gates = F.hardsigmoid(normed(m.gate.norm, stats @ m.gate.conv.weight[..., 0, 0].T))
    y = torch.cat([convolved(m, first), normed(m.norm.norm, rest * gates[:, None, None])], -1)
    torch.testing.assert_close(m(x), y)


def test_self_attention_is_the_equation():
    m, x = make("pat-sf", num_heads=3, ratio=1.5), tokens(1, 5, 4, 8)
    rest = F.layer_norm(x[..., 2:], (6,), m.norm.weight, m.norm.bias, 1e-6).flatten(1, 2)
    q, k, v = (rest @ m.qkv.weight.T)[0].chunk(3, -1)
    out = torch.zeros(20, 6, dtype=F64)
    for h in range(3):
        at = slice(2 * h, 2 * h + 2)
        scores = q[:, at] @ k[:, at].T / math.sqrt(2)
        for i in range(20):
            for j in range(20):
                d = float(round(math.hypot(i // 4 - j // 4, i % 4 - j % 4)))
                if d > 1.5:
                    d = min(3, round(1.5 + 1.5 * math.log(d / 1.5) / math.log(8)))
                scores[i, j] += m.rel_bias[h, 3 + int(d)]
        out[:, at] = scores.softmax(-1) @ v[:, at]
    y = (out @ m.proj.weight.T + m.proj.bias).view(1, 5, 4, 6)
    torch.testing.assert_close(m(x), torch.cat([convolved(m, x[..., :2]), y], -1))


def test_buckets_are_exact_then_logarithmic_then_one():
    buckets = euclidean_buckets((1, 400), 20, 40, 160)[0, 399:].tolist()
    assert buckets[:21] == list(range(21)) and set(buckets[160:]) == {40}
    assert buckets[57] == round(20 + 20 * math.log(57 / 20) / math.log(8)) and buckets == sorted(buckets)
    assert euclidean_buckets((3, 3), 20, 40, 160).tolist()[0] == [3, 2, 2, 2, 3]
    with pytest.raises(ValueError, match="beta"):
        euclidean_buckets((3, 3), 20, 10, 160)


def test_without_deviations_it_is_a_gate_of_one_layer_from_means():
    m, x = make("pat-ch"), tokens(2, 5, 4, 8)
    with torch.no_grad():
        m.gate.conv.weight[:, 6:] = 0
    means = x[..., 2:].mean((1, 2)) @ m.gate.conv.weight[:, :6, 0, 0].T
    torch.testing.assert_close(m.gates(x[..., 2:]).flatten(1), F.hardsigmoid(normed(m.gate.norm, means)))


def test_with_open_gates_it_is_a_partial_convolution():
    m, x = make("pat-ch"), tokens(2, 5, 4, 8)
    m.norm.norm.reset_parameters()
    m.norm.norm.eps = 0.0
    nn.init.constant_(m.gate.norm.bias, 1e3)
    torch.testing.assert_close(m(x), torch.cat([convolved(m, x[..., :2]), x[..., 2:]], -1))


def test_gates_read_mean_and_deviation_alone():
    m, x = make("pat-ch"), tokens(1, 5, 4, 6)
    shuffled = x.flatten(1, 2)[:, torch.randperm(20, generator=torch.Generator().manual_seed(2))].view_as(x)
    torch.testing.assert_close(m.gates(x), m.gates(shuffled))
    assert not torch.allclose(m.gates(x), m.gates(2 * x - x.mean((1, 2), keepdim=True)))


def test_the_spatial_gate_is_one_number_a_pixel_on_half_of_the_channels():
    m, x = make("spatial"), tokens(2, 5, 4, 8)
    gates = F.hardsigmoid(x[..., :4] @ m.score.weight.T)
    assert gates.shape == (2, 5, 4, 1)
    y = [normed(m.norm.norm, x[..., :4] * gates), normed(m.conv.pre, x[..., 4:]) @ m.conv.conv.weight[..., 0, 0].T]
    torch.testing.assert_close(m(x), torch.cat(y, -1))


def test_one_pixel_has_no_deviation_and_a_gradient():
    m, x = make("pat-ch"), tokens(2, 1, 1, 8).requires_grad_()
    (grad,) = torch.autograd.grad(m(x).sum(), x)
    assert m(x).isfinite().all() and grad.isfinite().all()


def test_bad_input():
    for name, settings, message in (("pat-sf", dict(num_heads=4), "num_heads"), ("pat-ch", dict(n_div=1), "n_div"),
                                    ("spatial", dict(dim=1), "dim"),
                                    ("pat-sf", dict(num_heads=2, ratio=0.0), "ratio")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(name, **settings)
    with pytest.raises(ValueError, match="at least two images"):
        make("pat-ch").train()(tokens(1, 3, 3, 8))
