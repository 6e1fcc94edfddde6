"""Shared layers: convolutions with norms that fold, paddings, means of cells, positions by an MLP."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.models.blocks import MBConv
from attnlib.nn.layers import ConvNorm, PositionMlp, cell_means, conv_any_size
from attnlib.positions import dense_window_bias, window_bias

F64 = torch.float64


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_statistics(module):
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(m.weight, std=0.5)
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight, m.bias, m.running_mean):
                nn.init.normal_(t, std=0.5)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module.double()


CONVS = {
    "plain": dict(kernel_size=3),
    "strided": dict(kernel_size=3, stride=2),
    "same": dict(kernel_size=3, stride=2, padding="same"),
    "same-wide": dict(kernel_size=5, stride=3, padding="same"),
    "patch": dict(kernel_size=4, stride=4),
    "dilated": dict(kernel_size=3, dilation=2, groups=2),
    "pre": dict(pre_norm=True),
    "pre-only": dict(pre_norm=True, norm=False, bias=True),
    "bias": dict(kernel_size=1, bias=True),
}


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("side", [1, 4, 6, 7, 9])
def test_norms_fold_into_the_convolution(case, side):
    """Evaluation, whichever way it goes, and the deployed form are norm after convolution after norm; any size."""
    settings = CONVS[case]
    m = with_statistics(ConvNorm(4, 6, activation=nn.SiLU, **settings)).eval()
    x = data(2, side, side + 1, 4)
    stride = settings.get("stride", 1)
    y = m(x)
    assert y.shape == (2, -(-side // stride), -(-(side + 1) // stride), 6)
    steps = x.permute(0, 3, 1, 2)
    if m.pre is not None:
        steps = m.pre(steps)
    conv = nn.Conv2d(4, 6, m.conv.kernel_size, stride, 0, m.conv.dilation, m.conv.groups).double()
    conv.weight, conv.bias = m.conv.weight, m.conv.bias
    kernel = (m.conv.kernel_size[0] - 1) * m.conv.dilation[0] + 1
    if m.same:  # TensorFlow's rule
        need = [max(0, (-(-n // stride) - 1) * stride + kernel - n) for n in (side, side + 1)]
        pads = [need[1] // 2, need[1] - need[1] // 2, need[0] // 2, need[0] - need[0] // 2]
    else:
        pads = [m.conv.padding[0], 9, m.conv.padding[0], 9]
    steps = conv(F.pad(steps, pads))[:, :, : y.shape[1], : y.shape[2]]
    expected = F.silu(steps if m.norm is None else m.norm(steps)).permute(0, 2, 3, 1)
    torch.testing.assert_close(y, expected)
    for pays in (True, False):
        m._pays = lambda x, pays=pays: pays
        torch.testing.assert_close(m(x), expected)
    del m._pays
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed.modules())
    torch.testing.assert_close(deployed(x), expected)


@pytest.mark.parametrize("case", ["plain", "strided", "pre"])
def test_statistics_are_those_of_the_tokens_that_exist(case):
    padded, cropped = (with_statistics(ConvNorm(4, 6, **CONVS[case])).train() for _ in range(2))
    x, valid = data(3, 6, 8, 4), torch.zeros(3, 6, 8, dtype=torch.bool)
    valid[:, :4, :6] = True
    rows, columns = (2, 3) if case == "strided" else (4, 6)
    torch.testing.assert_close(padded(x, valid)[:, :rows, :columns], cropped(x[:, :4, :6]))
    for (name, ours), theirs in zip(padded.state_dict().items(), cropped.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_settings_of_convolutions_are_checked():
    with pytest.raises(ValueError, match="padding='valid'"):
        ConvNorm(4, 4, 3, padding="valid")
    with pytest.raises(ValueError, match="pre_norm needs kernel_size=1"):
        ConvNorm(4, 4, 3, pre_norm=True)


@pytest.mark.parametrize("grid", [(1, 1), (4, 6), (5, 3)])
def test_means_of_cells_are_those_of_tokens_that_exist(grid):
    x, valid = data(2, *grid, 3), torch.rand(2, *grid, generator=torch.Generator().manual_seed(2)) < 0.6
    for exists in (None, valid):
        y = cell_means(x, 2, exists)
        for i in range(y.shape[1]):
            for j in range(y.shape[2]):
                for b in range(2):
                    cell = x[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(-1, 3)
                    if exists is not None:
                        cell = cell[exists[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()]
                    expected = cell.mean(0) if len(cell) else torch.zeros(3, dtype=F64)
                    torch.testing.assert_close(y[b, i, j], expected)


@pytest.mark.parametrize("window", [(5,), (2, 3), (2, 3, 2)])
def test_biases_of_windows_laid_out(window):
    table = data(2, *(2 * w - 1 for w in window)).requires_grad_()
    expected = window_bias(table.flatten(1), window).dense()[0]
    ours = dense_window_bias(table, window)
    assert ours.equal(expected)
    g = torch.randn_like(ours)
    torch.testing.assert_close(*(torch.autograd.grad(y, table, g)[0] for y in (ours, expected)))


def test_a_position_mlp_is_one_function_of_the_displacement_at_any_size():
    mlp = PositionMlp(3, hidden=8).double().eval()
    small, large = mlp((2, 3)), mlp((4, 4))
    assert small.shape == (3, 3, 5) and large.shape == (3, 7, 7)
    torch.testing.assert_close(large[:, 2:5, 1:6], small)
    at = torch.tensor([-1.0, 2.0], dtype=F64)
    expected = mlp.fc2(F.relu(mlp.fc1(at.sign() * (1 + at.abs()).log())))
    torch.testing.assert_close(small[:, 0, 4], expected)


def test_inverted_residuals_by_hand():
    m = with_statistics(MBConv(4, 6, 8, stride=2, squeeze=2)).eval()
    x = data(2, 6, 4, 4)
    y, valid = m(x)
    bn = lambda norm, t: F.batch_norm(t, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)  # noqa: E731
    h = x.permute(0, 3, 1, 2)
    short = F.conv2d(F.avg_pool2d(h, 2), m.shortcut.conv.weight, m.shortcut.conv.bias)
    h = F.silu(bn(m.expand.norm, F.conv2d(bn(m.expand.pre, h), m.expand.conv.weight)))
    h = F.silu(bn(m.depthwise.norm, F.conv2d(h, m.depthwise.conv.weight, stride=2, padding=1, groups=8)))
    gate = F.silu(m.squeeze.fc1(h.mean((2, 3))))
    h = h * m.squeeze.fc2(gate).sigmoid()[:, :, None, None]
    h = short + F.conv2d(h, m.project.conv.weight, m.project.conv.bias)
    torch.testing.assert_close(y, h.permute(0, 2, 3, 1))
    assert valid is None
    torch.testing.assert_close(attnlib.deploy(m)(x)[0], y)
    plain = with_statistics(MBConv(4, 4, 8, bias=False)).eval()
    assert plain.squeeze is None and plain.shortcut is None
    nn.init.zeros_(plain.project.conv.weight)
    torch.testing.assert_close(plain(x)[0], x)


@pytest.mark.parametrize("channels", [1, 4, 7, 16])
def test_a_strided_pointwise_convolution_of_few_channels_does_not_reach_onednn(channels, monkeypatch):
    """Its gradient there overruns a buffer on CPUs with AVX2: wrong numbers, or the end of the process."""
    convolve, called = F.conv2d, []
    monkeypatch.setattr(F, "conv2d", lambda *args: called.append(1) or convolve(*args))
    conv, x = nn.Conv2d(channels, 8, 1, 2).double(), data(2, 15, 16, channels).requires_grad_()
    ours = conv_any_size(conv, x, conv.weight, conv.bias)
    assert len(called) == (channels == 16)
    theirs = convolve(x.permute(0, 3, 1, 2).contiguous(), conv.weight, conv.bias, 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, theirs)
    given = (x, conv.weight, conv.bias)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), given) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other)
