"""vmamba: SS2D against the plain loop, and what it promises of maps with padding."""

import pytest
import torch
import torch.nn.functional as F
from test_routed_scan import along

import attnlib

DOUBLE = torch.double


def make(**config):
    m = attnlib.create("vmamba", **{"dim": 4, "state_dim": 3, **config}).double()
    torch.manual_seed(0)
    for p in m.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    return m


def test_the_equation():
    m, x = make(), torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    u, z = m.in_proj(x).chunk(2, -1)
    u = F.conv2d(u.permute(0, 3, 1, 2), m.conv.weight, m.conv.bias, padding=1, groups=8).permute(0, 2, 3, 1)
    y = along(m.scan, F.silu(u)).sum(2).view_as(u)
    y = F.layer_norm(y, (8,), m.norm.layer.weight, m.norm.layer.bias)
    torch.testing.assert_close(m(x), m.proj(y * F.silu(z)))


@pytest.mark.parametrize("norm", ["layer", "softmax", "layer-conv"])
@pytest.mark.parametrize("bias", [False, True])
def test_padding_marked_invalid_equals_the_cropped_map(norm, bias):
    m = make(norm=norm, bias=bias)
    small, big = torch.randn(2, 3, 4, 4, dtype=DOUBLE), torch.randn(2, 5, 5, 4, dtype=DOUBLE)
    big[:, :3, :4] = small
    valid = torch.zeros(2, 5, 5, dtype=torch.bool)
    valid[:, :3, :4] = True
    y = m(big, valid=valid)
    torch.testing.assert_close(y[:, :3, :4], m(small))
    assert not y[~valid].any()


def test_one_turned_map_is_scanned_as_the_other():
    """With the parameters of rows and columns exchanged, and a turned convolution, the answer turns with the map."""
    m, x = make(), torch.randn(1, 3, 5, 4, dtype=DOUBLE)
    turned = make()
    with torch.no_grad():
        for p in turned.scan.scan.parameters():
            p.copy_(p[[1, 0, 3, 2]])
        turned.conv.weight.copy_(turned.conv.weight.transpose(2, 3).clone())
    torch.testing.assert_close(turned(x.transpose(1, 2)), m(x).transpose(1, 2))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (dict(gate="soft"), "gate='soft'"),
        (dict(norm="batch"), "norm='batch'"),
        (dict(kernel_size=4), "kernel_size must be odd, or 0"),
        (dict(activation="tanh"), "activation='tanh'"),
        (dict(expand=0.1), "expand=0.1 of dim=4 leaves no channels"),
        (dict(routes=("rows", "left")), "routes='left' is no route"),
        (dict(state_dim=0), "state_dim"),
        (dict(rank_ratio=0.1), "leaves no channels"),
    ],
)
def test_bad_settings_are_refused(config, match):
    with pytest.raises(ValueError, match=match):
        make(**config)


def test_bad_inputs_are_refused():
    with pytest.raises(ValueError, match=r"x must have shape \(B, H, W, C\)"):
        make()(torch.zeros(1, 16, 4).double())
