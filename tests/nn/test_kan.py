"""Layers of learned curves: the bumps, the layer, and what its norm makes of it."""

import pytest
import torch

from attnlib.nn.kan import KAN, KANLayer, SwitchBasis

F64 = torch.float64


def test_bumps_are_those_of_the_definition_and_their_derivatives():
    basis = SwitchBasis().double()
    u = torch.cat([torch.linspace(-6, 6, 241), torch.tensor([-300.0, 300.0])]).to(F64).requires_grad_()
    expected = 1 - torch.tanh((u.unsqueeze(-1) - torch.linspace(-2, 2, 8).double()) / 0.33) ** 2
    basis.grid.data = torch.linspace(-2, 2, 8).double()
    torch.testing.assert_close(basis(u), expected, rtol=1e-7, atol=1e-12)
    g = torch.randn(243, 8, dtype=F64)
    ours, theirs = (torch.autograd.grad((y * g).sum(), u)[0] for y in (basis(u), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-11)
    assert not basis.grid.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bumps_are_finite_in_every_type(dtype):
    basis = SwitchBasis().to(dtype)
    u = torch.tensor([-6e4, -30.0, -2.0, 0.0, 2.0, 30.0, 6e4], dtype=dtype, requires_grad=True)
    y = basis(u)
    y.float().sum().backward()
    assert y.isfinite().all() and u.grad.isfinite().all() and 0 <= y.min() and y.max() <= 1
    assert max(y[0].max().item(), y[-1].max().item()) < 1e-16


def test_layer_equals_its_definition():
    torch.manual_seed(0)
    layer, x = KANLayer(5, 3, grids=4).double(), torch.randn(2, 6, 5, dtype=F64)
    u = torch.nn.functional.layer_norm(x, (5,))
    weight, at = layer.linear.weight.view(3, 5, 4), layer.basis.grid
    expected = torch.zeros(2, 6, 3, dtype=F64)
    for c in range(5):
        for g in range(4):
            expected += (1 - torch.tanh((u[..., c : c + 1] - at[g]) / 0.33) ** 2) * weight[:, c, g]
    torch.testing.assert_close(layer(x), expected)


def test_scale_and_shift_of_what_it_reads_change_nothing():
    torch.manual_seed(0)
    kan, x = KAN((16, 32, 16)).double(), torch.randn(4, 16, dtype=F64)
    torch.testing.assert_close(kan(3 * x - 2), kan(x), rtol=1e-3, atol=1e-4)  # but for the epsilon of the norm


def test_sum_of_bumps_is_bounded():
    total = SwitchBasis()(torch.linspace(-40, 40, 999)).sum(-1)
    assert 0 <= total.min() and total.max() <= 8


def test_it_starts_as_the_authors():
    layer = KANLayer(32, 64)
    bound = (6 / (32 * 8 + 64)) ** 0.5
    assert 0.98 * bound < layer.linear.weight.abs().max() <= bound and layer.linear.bias is None
    assert KAN((8, 16, 8))[1].linear.in_features == 16 * 8


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="dims="):
        KAN((8,))
    with pytest.raises(ValueError, match="dims"):
        KAN((8, 0))
    with pytest.raises(ValueError, match="width"):
        SwitchBasis(width=0)
    with pytest.raises(ValueError, match="count"):
        SwitchBasis(count=0)
