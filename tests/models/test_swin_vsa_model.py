"""Swin with varied-size windows: its blocks against plain formulas, any size, absent pixels."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.models.backbones.swin_vsa import swin_vsa
from attnlib.nn.partition.maxvit import PartitionAttention
from attnlib.nn.sampled.vsa_varied_size_window import VariedSizeWindowAttention

TINY = dict(embed_dim=8, depths=(1, 2), num_heads=(2, 4), window_size=3, num_classes=5, drop_path_rate=0.0)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("swin_vsa_tiny", **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 37)])
def test_any_size(size):
    m, x = tiny(zero_init=False), images(2, 3, *size)
    assert m(x).shape == (2, 5) and m(x).isfinite().all()
    maps = m.forward_intermediates(x, intermediates_only=True)
    assert [t.shape[2:] for t in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8)]


def test_the_whole_model_is_the_formula():
    """Stem, blocks (convolution, attention, MLP), merging, norm, mean, linear map, written out."""
    m = tiny(zero_init=False).double()
    x = images(2, 3, 24, 48).double()

    def norm(y, part):
        return F.layer_norm(y, y.shape[-1:], part.weight, part.bias, 1e-5)

    y = F.conv2d(x, m.stem.proj.weight, m.stem.proj.bias, 4).permute(0, 2, 3, 1)
    y = norm(y, m.stem.norm)
    for stage in m.stages:
        if stage.downsample is not None:
            four = torch.cat([y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
            y = norm(four, stage.downsample.norm) @ stage.downsample.reduction.weight.T
        for block in stage.blocks:
            conv = block.position.conv
            assert conv.weight.shape[-1] == 7
            y = y + F.conv2d(
                y.permute(0, 3, 1, 2), conv.weight.view(y.shape[-1], 1, 7, 7), conv.bias, padding=3, groups=y.shape[-1]
            ).permute(0, 2, 3, 1)
            assert isinstance(block.mixer.inner, VariedSizeWindowAttention)
            y = y + block.mixer.inner(norm(y, block.mixer.norm))
            mlp = block.mlp.inner
            y = y + mlp.fc2(F.gelu(mlp.fc1(norm(y, block.mlp.norm))))
    expected = m.head.fc(norm(y, m.norm).mean((1, 2)))
    torch.testing.assert_close(m(x), expected)


def test_regressors_of_zeros_are_windows():
    m = tiny().double()

    def windows(place):
        return PartitionAttention(place.dim, place.num_heads, 3, rank=2, qkv_bias=True)

    host = swin_vsa(**{k: v for k, v in TINY.items() if k != "num_classes"}, num_classes=5, mechanism=windows).double()
    state = {k: v for k, v in m.state_dict().items() if k in host.state_dict()}
    missing = host.load_state_dict(state, strict=False).missing_keys
    for name in missing:  # tables of the relative bias, which are held in other shapes
        assert "rel" in name or "bias" in name, name
    x = images(1, 3, 24, 48).double()
    for module in (*m.modules(), *host.modules()):
        for name, value in module.named_parameters(recurse=False):
            if "rel" in name or "table" in name:
                nn.init.zeros_(value)
    torch.testing.assert_close(host.eval()(x), m(x))


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(zero_init=False), images(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    torch.testing.assert_close(m(x.masked_fill(~valid[:, None], float("nan")), valid), m(x, valid))


def test_no_window_is_shifted_and_another_mechanism_may_stand_in_blocks():
    m = tiny(mechanism="softmax-attention")
    assert m(images(1, 3, 16, 16)).shape == (1, 5)
    with pytest.raises(ValueError, match="window_size"):
        tiny(window_size=0)
    with pytest.raises(ValueError, match="border='wrap' is not possible"):
        tiny(border="wrap")
