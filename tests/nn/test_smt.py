"""smt-scale-aware-modulation: one test per criterion of the card that concerns the layer."""

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib

F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    m = attnlib.create("scale-aware-modulation", **{"dim": 12, **config}).double().eval()
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    m.within.norm.running_mean.normal_(0, 0.3)
    m.within.norm.running_var.uniform_(0.5, 2)
    return m


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_the_authors_attention():
    fixture = Fixture("smt-scale-aware-modulation")
    fixture.holds("a", fixture.build("a").eval(), lambda m, given: m(given["x"]))


def test_it_is_the_equation():
    """Every group of one channel per size is gathered by hand."""
    m, x = make(num_heads=3), tokens(2, 7, 6, 12)
    s = x @ m.s.weight.T + m.s.bias
    seen = [
        F.conv2d(s[..., 4 * i : 4 * i + 4].movedim(-1, 1), c.weight, c.bias, padding=1 + i, groups=4)
        for i, c in enumerate(m.local)
    ]
    hidden = []
    for j in range(4):
        group = torch.stack([t[:, j] for t in seen], -1)
        rows = slice(6 * j, 6 * j + 6)
        hidden.append(group @ m.within.conv.weight[rows, :, 0, 0].T + m.within.conv.bias[rows])
    norm = m.within.norm
    u = (torch.cat(hidden, -1) - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    a = F.gelu(u) @ m.across.conv.weight[..., 0, 0].T + m.across.conv.bias
    torch.testing.assert_close(m(x), m.proj(a * m.v(x)))


@pytest.mark.parametrize("head", [0, 1, 2, 3])
def test_an_impulse_reaches_the_square_of_its_run(head):
    m, x = make(), torch.zeros(1, 13, 13, 12, dtype=F64)
    with torch.no_grad():
        m.s.weight.copy_(torch.eye(12))
    before = m.scales(x)
    x[0, 6, 6, 3 * head + 1] = 1
    moved = (m.scales(x) - before)[0].abs() > 0
    side = 3 + 2 * head
    # Channel 1 of every run is group 1, in which run i is at place i.
    assert int(moved.sum()) == int(moved[..., 4 + head].sum()) == side**2


def test_a_group_reads_one_channel_of_every_run():
    m = make(expand_ratio=1)
    s = tokens(1, 1, 1, 12).requires_grad_()
    m.s = torch.nn.Identity()
    for j in range(3):
        (grad,) = torch.autograd.grad(m.within(m.scales(s))[0, 0, 0, 4 * j : 4 * j + 4].sum(), s)
        assert grad[0, 0, 0].nonzero().flatten().tolist() == [j, j + 3, j + 6, j + 9]


def test_a_gate_of_one_leaves_two_linear_maps():
    m, x = make(), tokens(1, 5, 6, 12)
    torch.nn.init.zeros_(m.across.conv.weight)
    torch.nn.init.ones_(m.across.conv.bias)
    torch.testing.assert_close(m(x), m.proj(m.v(x)))


def test_bad_settings():
    for settings, message in ((dict(num_heads=5), "num_heads"), (dict(expand_ratio=0), "expand_ratio")):
        with pytest.raises(ValueError, match=message):
            make(**settings)
    with pytest.raises(ValueError, match="smt-scale-aware-modulation"):
        attnlib.create("sam", dim=8)
