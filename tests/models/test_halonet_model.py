"""HaloNet: what its card asks of the backbones."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import attnlib
from attnlib.models.backbones.convs import Mixing
from attnlib.nn.layers import MapNorm
from attnlib.nn.local.halonet import HaloAttention, HaloDownsampling

TINY = {
    "halonet_h1": dict(embed_dims=(16, 16, 32, 32), depths=(1, 2, 1, 1), stem_dim=8),
    "halonet_h5": dict(
        embed_dims=(32, 32, 64, 64), bottle_ratio=0.5, depths=(1, 2, 1, 1), stem_dim=8, num_heads=2, num_features=40
    ),
    "sehalonet33ts": dict(
        embed_dims=(32, 64, 64, 48), depths=(1, 2, 2, 1), attention=((), (1,), (1,), None), stem_dim=16, num_features=40
    ),
    "halo2botnet50ts_256": dict(
        embed_dims=(32, 64, 64, 128), depths=(1, 1, 2, 2), attention=((), (), (1,), (1,)), stem_dim=16,
        halo_size=(1, 1, 1, 0), num_heads=(2, 2, 2, 4),
    ),
}  # fmt: skip


def tiny(name="halonet_h1", **settings):
    torch.manual_seed(0)
    m = attnlib.create_model(
        name, **{"num_classes": 5, "block_size": 2, "halo_size": 1, "num_heads": 2, **TINY[name], **settings}
    )
    for part in m.modules():
        if isinstance(part, _BatchNorm):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.bias, std=0.3)
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kinds(m):
    """c: convolution, h: halo attention, d: downsampling."""
    letter = {HaloAttention: "h", HaloDownsampling: "d"}
    return [
        "".join(letter[type(b.conv2.inner)] if isinstance(getattr(b, "conv2", None), Mixing) else "c" for b in s.blocks)
        for s in m.stages
    ]


@pytest.mark.parametrize(
    ("name", "expected", "channels"),
    [
        ("halonet_h1", ["hhh", "dhh", "d" + 9 * "h", "dhh"], [64, 64, 128, 256, 512]),
        ("halonet26t", ["cc", "cc", "ch", "dh"], [64, 256, 512, 1024, 2048]),
        ("halonet50ts", ["ccc", "ccch", "chchch", "chc"], [64, 256, 512, 1024, 2048]),
        ("sehalonet33ts", ["cc", "cch", "cch", "dhc"], [32, 256, 512, 1024, 1280]),
        ("halo2botnet50ts_256", ["ccc", "chch", "chchch", "chc"], [32, 256, 512, 1024, 2048]),
    ],
)
def test_where_attention_stands(name, expected, channels):
    with torch.device("meta"):
        m = attnlib.create_model(name)
    assert kinds(m) == expected
    assert [(f["num_chs"], f["reduction"]) for f in m.feature_info] == list(
        zip(channels, (2, 4, 8, 16, 32), strict=True)
    )
    for stage in m.stages:
        for block in stage.blocks:
            if isinstance(getattr(block, "conv2", None), Mixing):
                assert block.conv2.inner.halo.pad_mode == "zero" and block.squeeze is None
    if name.startswith("halo2bot"):  # one block on the 8 x 8 map of its images
        last = m.stages[3].blocks[1].conv2.inner.halo
        assert (last.block_size, last.halo_size, last.num_heads) == (8, 0, 4)


@pytest.mark.parametrize(
    ("name", "row"),
    [  # of the paper: block, halo, width of values, of blocks, blocks of the third stage, width before the head
        ("halonet_h0", (8, 3, 1.0, 0.5, 7, 256)),
        ("halonet_h2", (8, 3, 1.0, 1.25, 11, 640)),
        ("halonet_h3", (10, 3, 1.0, 1.5, 12, 1024)),
        ("halonet_h4", (12, 2, 1.0, 3.0, 12, 1280)),
        ("halonet_h5", (14, 2, 2.5, 2.0, 23, 1536)),
        ("halonet_h6", (8, 4, 3.0, 2.75, 24, 1536)),
        ("halonet_h7", (10, 3, 4.0, 3.5, 26, 2048)),
    ],
)
def test_the_papers_table(name, row):
    block, halo, values, wide, third, last = row
    with torch.device("meta"):
        m = attnlib.create_model(name)
    extra = "c" if last not in (256, 640) else ""
    own = all(kind in "hd" for stage in kinds(m)[:3] for kind in stage)
    assert own and [len(k) for k in kinds(m)] == [3, 3, third, 3 + len(extra)] and kinds(m)[3][3:] == extra
    for stage, heads, width in zip(m.stages, (4, 8, 8, 8), (64, 128, 256, 512), strict=True):
        for i, part in enumerate(list(stage.blocks)[:3]):
            inner = part.conv2.inner.halo
            assert (inner.block_size, inner.halo_size, inner.num_heads) == (block, halo, heads)
            assert inner.q.in_features == inner.q.out_features == inner.k.out_features == width
            assert inner.v.out_features == part.conv3.conv.in_channels == width * values
            assert part.conv3.conv.out_channels == width * wide and inner.stride == (1 if i or width == 64 else 2)
    assert m.head.fc.in_features == last


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(1, 1), (33, 90)])
def test_any_size(name, size):
    maps = tiny(name).forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((2, 4, 8, 16, 32), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_pixels_that_do_not_exist_change_nothing(name, train):
    x = images(3, 3, 96, 64)
    valid = torch.zeros(3, 96, 64, dtype=torch.bool)
    valid[0, :64, :32] = valid[1:] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    first, second = tiny(name).train(train), tiny(name).train(train)
    torch.testing.assert_close(first(other, valid), second(x, valid))
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


def test_a_padded_image_is_that_image_where_its_border_is_masked():
    """Blocks lie the same; keys of zeros at the image's own border are what ``zero`` has and padding does not."""
    m, x = tiny(pad_mode="masked"), images(1, 3, 96, 128)
    valid = torch.zeros(1, 96, 128, dtype=torch.bool)
    valid[:, :64, :96] = True
    torch.testing.assert_close(m(x, valid), m(x[:, :, :64, :96]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_folded_it_is_the_same_and_only_norms_behind_attention_are_left(name):
    m, x = tiny(name).double(), images(2, 3, 64, 64).double()
    deployed = attnlib.deploy(m)
    left = [part for part in deployed.modules() if isinstance(part, _BatchNorm)]
    behind = [part.norm for part in deployed.modules() if isinstance(part, MapNorm)]
    assert len(left) == len(behind) == sum(k in "hd" for row in kinds(m) for k in row)
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)


def test_displacements_of_downsampling_may_be_those_of_the_map():
    x = images(1, 3, 64, 64)
    assert not torch.allclose(tiny(compat=None, block_size=4)(x), tiny(block_size=4)(x), atol=1e-4)
    assert tiny(compat=None).stages[1].blocks[0].conv2.inner.halo.compat is None


def test_another_mechanism_strides_by_means_of_cells():
    m = tiny("sehalonet33ts", mechanism="softmax-attention", num_heads=(1, 2, 2, 4))
    assert [tuple(t.shape[1:]) for t in m.forward_intermediates(images(1, 3, 64, 64), intermediates_only=True)] == [
        (8, 32, 32), (32, 16, 16), (64, 8, 8), (64, 4, 4), (40, 2, 2),
    ]  # fmt: skip
    inner = m.stages[3].blocks[0].conv2
    assert inner.stride == 2 and inner.inner.num_heads == 4
    x = images(1, 3, 5, 16)
    mixed, _ = inner(x)
    means = inner.inner(x).permute(0, 3, 1, 2)
    means = nn.functional.avg_pool2d(means, 2, ceil_mode=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(mixed, inner.act(inner.norm(means)))


def test_starts_are_timms():
    torch.manual_seed(0)
    m = attnlib.create_model("halonet26t", embed_dims=(64, 64, 256, 512))
    block = m.stages[3].blocks[1]
    assert not block.conv3.norm.weight.any() and block.conv2.norm.norm.weight.eq(1).all()
    halo = block.conv2.inner.halo
    assert halo.q.weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert halo.height_rel.std().item() == pytest.approx(halo.scale, rel=0.15)
    assert m.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert m.stem[0].conv.weight.std().item() == pytest.approx((2 / (24 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(attention=((), (), (1,), None)), r"attention=\[1\] names blocks that are not there"),
        (dict(block_size=(2, 2)), "block_size=.* one for each of 4 stages"),
        (dict(attention=(None,) * 3), "attention=.* one for each of 4 stages"),
        (dict(stem_pool=False), "stem_pool=False needs a stem of three"),
        (dict(activation="gelu"), "activation='gelu' is not possible"),
        (dict(num_heads=3), "num_heads=3"),
        (dict(block_size=0), "block_size"),
        (dict(halo_size=-1), "halo_size"),
        (dict(bottle_ratio=0.0), "bottle_ratio"),
        (dict(value_ratio=0.0), "value_ratio"),
        (dict(value_ratio=2.0, mechanism="softmax-attention"), "value_ratio=2.0 needs the model's own attention"),
        (dict(pad_mode="reflect"), "pad_mode='reflect' is not possible"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
