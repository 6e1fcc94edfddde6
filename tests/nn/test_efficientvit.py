"""efficientvit-cascaded-group-attention: one test per criterion of the card that concerns the layer."""

import pytest
import torch
from parity import Fixture
from torch import nn

import attnlib

F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    m = attnlib.create("cga", **{"dim": 12, "num_heads": 3, "key_dim": 4, "window_size": 4, **config}).double()
    for p in m.parameters():
        nn.init.normal_(p, 0, 0.5)
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
    return m.eval()


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_the_authors_windows():
    fixture = Fixture("efficientvit-cascaded-group-attention")
    fixture.holds("a", fixture.build("a").eval(), lambda m, given: m(given["x"]))


def test_it_is_the_equation_in_every_window():
    m, x = make(window_size=3), tokens(2, 5, 7, 12)
    want = torch.zeros_like(x)
    for top in range(0, 5, 3):
        for left in range(0, 7, 3):
            part = x[:, top : top + 3, left : left + 3]
            h, w = part.shape[1:3]
            at = torch.cartesian_prod(torch.arange(h), torch.arange(w))
            step = (at[:, None] - at).abs()
            outs = []
            for i in range(3):
                f = part[..., 4 * i : 4 * i + 4] + (outs[-1] if outs else 0)
                q, k, v = m.qkv[i](f).split([4, 4, 4], -1)
                q, k, v = m.local[i](q).flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2)
                scores = q @ k.transpose(1, 2) / 2 + m.attention_bias[i][step[..., 0], step[..., 1]]
                outs.append((scores.softmax(-1) @ v).unflatten(1, (h, w)))
            want[:, top : top + 3, left : left + 3] = m.proj(torch.cat(outs, -1).relu())
    torch.testing.assert_close(m(x), want)


def test_heads_are_causal_in_runs_of_channels():
    m, x = make(), tokens(1, 4, 4, 12).requires_grad_()
    seen = {}
    for j, local in enumerate(m.local):
        local.register_forward_hook(lambda module, given, out, j=j: seen.__setitem__(j, out))
    m(x)
    for j in range(3):
        grad = torch.autograd.grad(seen[j].square().sum(), x, retain_graph=True)[0].unflatten(-1, (3, 4)).abs()
        reads = grad.sum((0, 1, 2, 4)) > 0
        assert reads.tolist() == [i <= j for i in range(3)]


def test_one_head_without_extras_is_plain_attention():
    m, x = make(num_heads=1, kernel_sizes=(1,), key_dim=12), tokens(2, 4, 3, 12)
    nn.init.zeros_(m.attention_bias)
    conv = m.local[0]
    nn.init.ones_(conv.conv.weight)
    conv.norm = None
    conv.conv.bias = nn.Parameter(torch.zeros(12, dtype=F64))
    q, k, v = m.qkv[0](x).flatten(1, 2).chunk(3, -1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(m(x), m.proj(out.relu().unflatten(1, (4, 3))))


def test_zeros_that_fill_up_windows_are_read_by_the_authors_alone():
    x = tokens(1, 6, 5, 12)
    ours, theirs = make(), make(compat="authors")
    theirs.load_state_dict(ours.state_dict())
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a[:, :4, :4], b[:, :4, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])
    torch.testing.assert_close(a[:, 4:, :4], ours(x[:, 4:, :4]))


def test_the_bias_is_that_of_the_weights_at_hand():
    m, x = make(), tokens(1, 4, 4, 12)
    before = m(x)
    m.train()
    m.eval()
    torch.testing.assert_close(m(x), before)
    state = m.state_dict()
    state["attention_bias"] = state["attention_bias"] + tokens(3, 4, 4)
    m.load_state_dict(state)
    assert not torch.allclose(m(x), before)


def test_deployed_it_is_the_same_and_has_no_norm_left():
    m, x = make(), tokens(2, 6, 5, 12)
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed.modules())
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)


def test_at_the_start_it_adds_nothing():
    assert not attnlib.create("cga", dim=12, num_heads=2)(torch.randn(2, 4, 4, 12)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide"),
        (dict(kernel_sizes=(3, 3)), "kernel_sizes"),
        (dict(kernel_sizes=(3, 4, 3)), "kernel_sizes"),
        (dict(window_size=0), "window_size"),
        (dict(compat="timm"), "compat"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
