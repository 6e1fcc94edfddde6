"""van-large-kernel-attention: one test per criterion of the card that concerns the layer."""

import pytest
import torch
import torch.nn.functional as F
from parity import Fixture

import attnlib

F64 = torch.float64


def make(**config):
    torch.manual_seed(0)
    m = attnlib.create("lka", **{"dim": 4, **config}).double()
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.4)
    return m


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_the_authors_attention():
    fixture = Fixture("van-large-kernel-attention")
    fixture.holds("a", fixture.build("a"), lambda m, given: m(given["x"]))


def test_it_is_the_equation():
    m, x = make(), tokens(2, 9, 8, 4)
    u = F.gelu(x @ m.proj_in.weight.T + m.proj_in.bias).permute(0, 3, 1, 2)
    g = F.conv2d(u, m.conv.weight, m.conv.bias, padding=2, groups=4)
    g = F.conv2d(g, m.dilated.weight, m.dilated.bias, padding=9, dilation=3, groups=4)
    g = F.conv2d(g, m.point.weight[..., None, None], m.point.bias)
    torch.testing.assert_close(m(x), x + (u * g).permute(0, 2, 3, 1) @ m.proj.weight.T + m.proj.bias)


@pytest.mark.parametrize(("kernel", "dilation", "reach"), [(21, 3, 23), (7, 2, 11), (5, 1, 5), (35, 5, 39)])
def test_an_impulse_moves_the_gate_in_exactly_one_square(kernel, dilation, reach):
    m, u = make(kernel_size=kernel, dilation=dilation), torch.zeros(1, 49, 49, 4, dtype=F64)
    before = m.gate(u)
    u[0, 24, 24, 0] = 1
    moved = (m.gate(u) - before)[0].abs().amax(-1) > 0
    half = reach // 2
    assert moved[24 - half : 25 + half, 24 - half : 25 + half].all() and int(moved.sum()) == reach**2


def test_parameters_are_those_of_the_decomposition():
    m = attnlib.create("van-large-kernel-attention", dim=16)
    gate = [*m.conv.parameters(), *m.dilated.parameters(), *m.point.parameters()]
    assert sum(p.numel() for p in gate) == 16**2 + 77 * 16


def test_a_gate_of_one_leaves_the_residual():
    m, x = make(), tokens(1, 5, 6, 4)
    torch.nn.init.zeros_(m.point.weight)
    torch.nn.init.ones_(m.point.bias)
    torch.testing.assert_close(m(x), x + m.proj(F.gelu(m.proj_in(x))))


def test_away_from_borders_it_moves_with_the_image():
    m, x = make(kernel_size=7, dilation=2), tokens(1, 30, 30, 4)
    a, b = m(x), m(x.roll((1, 2), (1, 2)))
    torch.testing.assert_close(a[:, 8:20, 8:20], b[:, 9:21, 10:22])


def test_bad_settings():
    for settings, message in ((dict(dilation=0), "dilation"), (dict(kernel_size=2), "kernel_size"),
                              (dict(grid_rank=4), "grid_rank")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make(**settings)
