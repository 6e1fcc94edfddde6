"""InLine-DeiT, -PVT, -Swin and -CSwin: what the card asks of them."""

import pytest
import torch

import attnlib
from attnlib.models.backbones.inline import convert_swin
from attnlib.nn.dense.attention_lepe import AttentionLePE
from attnlib.nn.linear.inline_attention import InLineAttention
from attnlib.nn.partition.cswin import CrossShapedAttention
from attnlib.nn.partition.maxvit import PartitionAttention
from attnlib.nn.reduced.spatial_reduction import SpatialReductionAttention

SMALL = {
    "inline_deit_tiny": dict(embed_dim=16, depth=2, num_heads=2, patch_size=8),
    "inline_pvt_tiny": dict(embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1),
                            inline_blocks=(None, 1)),
    "inline_swin_tiny": dict(embed_dim=8, depths=(2, 2), num_heads=(1, 2), inline_blocks=(None, 1), inline_window=4),
    "inline_cswin_tiny": dict(embed_dim=8, depths=(1, 2, 1), num_heads=(2, 2, 2), inline_blocks=(None, 1, 0),
                              split_size=(1, 2, 7)),
}  # fmt: skip


def tiny(name, **settings):
    torch.manual_seed(0)
    given = dict(num_classes=5, img_size=32, drop_path_rate=0.0) | SMALL[name] | settings
    return attnlib.create_model(name, **given).eval()


def kinds(model):
    return [[type(b.mixer.inner) for b in stage.blocks] for stage in model.stages]


def test_where_inline_attention_stands():
    i = InLineAttention
    assert kinds(tiny("inline_pvt_tiny")) == [[i], [i, SpatialReductionAttention]]
    assert kinds(tiny("inline_swin_tiny")) == [[i, i], [i, PartitionAttention]]
    assert kinds(tiny("inline_cswin_tiny")) == [[i], [i, CrossShapedAttention], [AttentionLePE]]
    with torch.device("meta"):
        base = kinds(attnlib.create_model("inline_swin_base"))
    assert base[0] == base[1] == [i] * 2 and base[2] == [i] * 2 + [PartitionAttention] * 16 and i not in base[3]


def test_windows_are_whole_maps_in_the_released_swin_and_shifted_beyond():
    with torch.device("meta"):
        released = attnlib.create_model("inline_swin_tiny")
    assert {b.mixer.inner.window for stage in released.stages[:3] for b in stage.blocks} == {None}
    first = tiny("inline_swin_tiny").stages[0].blocks
    assert [(b.mixer.inner.window, b.mixer.inner.shift) for b in first] == [((4, 4), (0, 0)), ((4, 4), (2, 2))]


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize("size", [(33, 47), (9, 23)])
def test_any_size(name, size):
    y = tiny(name)(torch.randn(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


@pytest.mark.parametrize("name", list(SMALL))
def test_pixels_that_do_not_exist_change_nothing(name):
    m, x = tiny(name), torch.randn(2, 3, 48, 32)
    valid = torch.zeros(2, 48, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    torch.testing.assert_close(m(x.masked_fill(~valid[:, None], float("nan")), valid), m(x, valid))


def test_weights_of_another_host_are_refused():
    with pytest.raises(ValueError, match="InLine-Swin"):
        convert_swin({"block1.0.attn.q.weight": torch.zeros(4, 4)})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("inline_pvt_tiny", dict(sr_ratios=(1,)), "sr_ratios=.*one number for each of 2 stages"),
        ("inline_swin_tiny", dict(inline_blocks=(1,)), "inline_blocks="),
        ("inline_swin_tiny", dict(inline_window=0), "window_size=0"),
        ("inline_swin_tiny", dict(features="elu"), "features='elu'"),
        ("inline_cswin_tiny", dict(split_size=3), "split_size=3"),
    ],
)
def test_bad_settings(name, change, message):
    with pytest.raises(ValueError, match=message):
        tiny(name, **change)
