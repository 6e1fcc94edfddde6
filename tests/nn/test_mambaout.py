"""mambaout: gated convolutions, one test per acceptance criterion of its card that concerns the module."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.nn.modulation.mambaout import GatedCNN, long_sequence


def make(**config):
    torch.manual_seed(0)
    return attnlib.create("mambaout", **{"dim": 6, **config}).double()


def oracle(m, x, mixer=lambda c: c):
    """The equation, with channels first in the convolution."""
    g, i, c = m.fc1(x).split([m.hidden, m.hidden - m.conv_dim, m.conv_dim], -1)
    k = m.conv.weight.shape[-1]
    c = F.conv2d(c.permute(0, 3, 1, 2), m.conv.weight, m.conv.bias, padding=k // 2, groups=m.conv_dim)
    return m.fc2(F.gelu(g) * torch.cat([i, mixer(c.permute(0, 2, 3, 1))], -1))


@pytest.mark.parametrize("config", [{}, dict(conv_ratio=0.5, kernel_size=3), dict(expansion=2.0, conv_ratio=2.0)])
def test_the_equation(config):
    m, x = make(**config), torch.randn(2, 5, 4, 6, dtype=torch.double)
    torch.testing.assert_close(m(x), oracle(m, x))


@pytest.mark.parametrize(("dim", "expansion", "hidden"), [(48, 8 / 3, 128), (96, 8 / 3, 256), (128, 8 / 3, 341)])
def test_the_hidden_width_is_rounded_down(dim, expansion, hidden):
    m = GatedCNN(dim, expansion)
    assert m.hidden == hidden and m.fc1.out_features == 2 * hidden and m.fc2.in_features == hidden


def test_a_scan_between_convolution_and_gate_makes_a_mamba_block():
    """Any causal sum along the rows stands for it here; the identity gives the gated convolution back."""

    class RunningSum(nn.Module):
        def forward(self, x):
            return x.flatten(1, 2).cumsum(1).view_as(x)

    widths = []

    def scan(width):
        widths.append(width)
        return RunningSum()

    m, x = make(expansion=2.0, conv_ratio=2.0, mixer=scan), torch.randn(1, 3, 4, 6, dtype=torch.double)
    assert widths == [12]
    torch.testing.assert_close(m(x), oracle(m, x, RunningSum()))
    same = make(expansion=2.0, conv_ratio=2.0, mixer=lambda width: nn.Identity())
    torch.testing.assert_close(same(x), make(expansion=2.0, conv_ratio=2.0)(x))


def test_a_mechanism_between_them_is_told_which_tokens_exist():
    inner = make(expansion=2.0, conv_ratio=2.0, mixer=lambda width: attnlib.create("davit", dim=width, num_heads=2))
    x = torch.randn(1, 4, 4, 6, dtype=torch.double)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[:, 3] = False
    torch.testing.assert_close(inner(x, valid=valid)[:, :3], inner(x[:, :3]))


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_block_sees_its_kernel_and_no_more(kernel):
    x = torch.randn(1, 15, 15, 6, dtype=torch.double, requires_grad=True)
    seen = torch.autograd.grad(make(kernel_size=kernel)(x)[0, 7, 7].sum(), x)[0].abs().sum(-1)[0] > 0
    want = torch.zeros(15, 15, dtype=torch.bool)
    want[7 - kernel // 2 : 8 + kernel // 2, 7 - kernel // 2 : 8 + kernel // 2] = True
    assert torch.equal(seen, want)


def test_which_tasks_are_long_sequences():
    """Where 4 D L^2 exceeds 24 D^2 L: from 2304 tokens on at width 384, from 4608 at 768."""
    for dim, limit in ((384, 2304), (768, 4608)):
        assert not long_sequence(limit, dim) and long_sequence(limit + 1, dim)
        assert not 4 * dim * limit**2 > 24 * dim**2 * limit and 4 * dim * (limit + 1) ** 2 > 24 * dim**2 * (limit + 1)
    assert not long_sequence(196, 384) and long_sequence(4000, 384)


def test_gradients_are_exact():
    m = make(dim=2, kernel_size=3)
    x = torch.randn(1, 3, 3, 2, dtype=torch.double, requires_grad=True)
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    valid[0, 0, 1] = False
    assert torch.autograd.gradcheck(lambda t: m(t, valid=valid), (x,))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(kernel_size=4), "kernel_size must be odd, got 4"),
        (dict(conv_ratio=3.0), "conv_ratio=3.0 puts 18 channels.*1 to 16"),
        (dict(conv_ratio=0.1), "conv_ratio=0.1 puts 0"),
        (dict(activation="relu"), "activation='relu'"),
        (dict(grid_rank=4), "grid_rank=4"),
        (dict(expansion=0.0), "expansion"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_bad_counts_are_refused():
    with pytest.raises(ValueError, match="tokens.*-1"):
        long_sequence(-1, 4)
    with pytest.raises(ValueError, match="dim.*0"):
        long_sequence(1, 0)
