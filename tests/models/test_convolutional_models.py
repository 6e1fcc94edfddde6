"""ResNet, RegNet, MobileNetV3 and EfficientNet: maps, sizes, tokens that do not exist, folding, starts, errors."""

import math

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import attnlib
from attnlib.models.backbones.convs import InvertedResidual, MaxPool, ResidualBlock
from attnlib.models.backbones.efficientnet import efficientnet
from attnlib.models.backbones.regnet import widths_and_depths
from attnlib.models.backbones.resnet import resnet
from attnlib.models.build import load_pretrained
from attnlib.nn.layers import ConvNorm

TINY = {
    "resnet18": dict(embed_dims=(8, 8, 16, 16), depths=(1, 2, 1, 1), stem_dim=8),
    "resnet26t": dict(embed_dims=(8, 8, 16, 16), depths=(1, 2, 1, 1), stem_dim=16),
    "regnety_002": dict(initial=8, slope=8.0, factor=2.0, depth=6, group=4, stem_dim=8),
    "mobilenetv3_small_050": dict(width=0.25),
    "mobilenetv3_large_050": dict(width=0.25),
    "tf_efficientnet_b0": dict(width=0.25, depth=0.5),
    "efficientnet_b0": dict(width=0.25, depth=0.5),
}  # fmt: skip


def started(name, **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY[name], "num_classes": 5, **settings})


def tiny(name, **settings):
    m = started(name, **settings)
    for part in m.modules():
        if isinstance(part, _BatchNorm):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.bias, std=0.3)
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", [64, 64, 128, 256, 512]),
        ("resnet50", [64, 256, 512, 1024, 2048]),
        ("resnet26t", [64, 256, 512, 1024, 2048]),
        ("regnety_016", [32, 48, 120, 336, 888]),
        ("regnety_008_tv", [32, 64, 144, 320, 784]),
        ("mobilenetv3_small_100", [16, 16, 24, 48, 576]),
        ("mobilenetv3_large_075", [16, 24, 32, 88, 720]),
        ("efficientnet_b0", [16, 24, 40, 112, 320]),
        ("tf_efficientnet_b7", [32, 48, 80, 224, 640]),
    ],
)
def test_maps_are_those_that_timm_gives(name, channels):
    with torch.device("meta"):
        f = attnlib.create_model(name, features_only=True)
    assert f.feature_info.channels() == channels and f.feature_info.reduction() == [2, 4, 8, 16, 32]
    with torch.device("meta"):
        two = attnlib.create_model(name, features_only=True, out_indices=(0, -2))
    assert two.feature_info.channels() == [channels[0], channels[3]]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(1, 1), (33, 50)])
def test_any_size(name, size):
    m = tiny(name)
    maps = m.forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((2, 4, 8, 16, 32), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()
    features = m.forward_features(images(2, 3, *size))
    assert features.shape[-1] == m.num_features and m(images(2, 3, *size)).shape == (2, 5)
    assert m.forward_head(features, pre_logits=True).shape == (2, m.head_hidden_size)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(name, train):
    x = images(3, 3, 128, 128)
    valid = torch.zeros(3, 128, 128, dtype=torch.bool)
    valid[0, :64, :96] = valid[1:] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    first, second = tiny(name).train(train), tiny(name).train(train)
    torch.testing.assert_close(first(other, valid), second(x, valid))
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)
    if not train and not name.startswith("tf_"):  # TensorFlow's zeros stand where the image's own size wants them
        torch.testing.assert_close(tiny(name)(x, valid)[:1], tiny(name)(x[:1, :, :64, :96]), atol=1e-5, rtol=1e-4)


def test_maxima_are_those_of_tokens_that_exist():
    x = -images(1, 5, 7, 2).abs() - 1
    valid = torch.zeros(1, 5, 7, dtype=torch.bool)
    valid[:, :3, :4] = True
    y, exists = MaxPool()(x.masked_fill(~valid[..., None], float("nan")), valid)
    assert y.shape == (1, 3, 4, 2) and exists.sum() == 4
    torch.testing.assert_close(y[:, :2, :2], MaxPool()(x[:, :3, :4])[0])
    assert not y[~exists].any()


@pytest.mark.parametrize("name", TINY)
def test_folded_it_is_the_same_and_has_no_norm_left(name):
    m, x = tiny(name).double(), images(2, 3, 64, 72).double()
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, _BatchNorm) for part in deployed.modules())
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)
    f = attnlib.deploy(started(name, features_only=True))
    assert len(f(x.float())) == 5


@pytest.mark.parametrize("name", ["resnet26t", "efficientnet_b0"])
def test_checkpointing_changes_nothing(name):
    m, x, grads = started(name).train(), images(2, 3, 64, 64), []
    for on in (False, True):
        m.set_grad_checkpointing(on)
        m.zero_grad()
        m(x).square().sum().backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


# ---- where a mechanism may stand


def test_a_mechanism_takes_the_place_of_the_wide_convolution():
    for name in ("resnet26t", "regnety_002"):
        m = started(name, mechanism="softmax-attention", num_heads=(1, 1, 2, 2)).eval()
        blocks = [b for stage in m.stages for b in stage.blocks]
        assert [b.conv2.inner.slug for b in blocks] == ["softmax-attention"] * len(blocks)
        assert m.stages[2].blocks[0].conv2.inner.num_heads == 2
        maps = m.forward_intermediates(images(1, 3, 40, 50), intermediates_only=True)
        assert [t.shape[2] for t in maps] == [20, 10, 5, 3, 2]
        m.train()(images(2, 3, 64, 64)).sum().backward()
        assert all(p.grad is not None for p in m.parameters())


def test_losses_of_mechanisms_are_handed_up():
    m = started("resnet26t", mechanism="moh-vit-attention", num_heads=(4, 4, 4, 4)).train()
    assert m(images(2, 3, 64, 64), returns=("losses",)).losses


def test_a_mechanism_needs_a_place():
    with pytest.raises(ValueError, match="mechanism needs bottlenecks"):
        started("resnet18", mechanism="softmax-attention")
    with pytest.raises(TypeError, match="efficientnet_b0.*mechanism"):
        started("efficientnet_b0", mechanism="softmax-attention")


# ---- starts and schedules


@pytest.mark.parametrize("name", ["resnet18", "resnet26t", "regnety_002"])
def test_at_the_start_branches_are_zero(name):
    for stage in started(name).eval().stages:
        for block in stage.blocks:
            assert isinstance(block, ResidualBlock) and not block.conv3.norm.weight.any()
            if block.shortcut is None:
                x = images(1, 3, 3, block.conv1.conv.in_channels).relu()
                torch.testing.assert_close(block(x)[0], x)


def test_starts_are_timms():
    torch.manual_seed(0)
    m = attnlib.create_model("resnet18", embed_dims=(64, 64, 64, 64))
    weight = m.stages[1].blocks[0].conv3.conv.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    bound = 1 / math.sqrt(64)  # as torch's linear maps
    assert 0.99 * bound < m.head.fc.weight.abs().max() <= bound
    m = attnlib.create_model("regnety_002")
    assert m.head.fc.weight.std().item() == pytest.approx(0.01, rel=0.03) and not m.head.fc.bias.any()
    conv = m.stages[3].blocks[0].conv2.conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (368 * 9 // conv.groups)), rel=0.03)
    assert m.stages[3].blocks[1].squeeze.fc1.weight.std().item() == pytest.approx(math.sqrt(2 / 92), rel=0.03)
    m = attnlib.create_model("mobilenetv3_small_100")
    assert m.head.pre.weight.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.03) and not m.head.pre.bias.any()
    assert m.head.fc.weight.abs().max().item() == pytest.approx(1 / math.sqrt(1000), rel=0.03)
    assert m.stages[1].blocks[0].depthwise.norm.weight.eq(1).all()


def test_stochastic_depth_of_efficientnet_ends_before_its_rate():
    m = efficientnet(width=0.25, depth=1.0, drop_path_rate=0.16)
    blocks = [b for stage in m.stages for b in stage.blocks]
    assert len(blocks) == 16
    for i, block in enumerate(blocks):
        if block.skip and i:
            assert block.drop_path.p == pytest.approx(0.01 * i)
        else:
            assert isinstance(block.drop_path, nn.Identity)


def test_the_line_of_a_regnet():
    assert widths_and_depths(24, 36.44, 2.49, 13, 8) == ([24, 56, 152, 368], [1, 1, 4, 7], [8] * 4)
    assert widths_and_depths(56, 38.84, 2.4, 14, 16, exact=False)[0] == [64, 144, 320, 784]
    assert widths_and_depths(8, 0.0, 2.0, 3, 16) == ([8], [3], [8])
    for wrong, message in ((dict(initial=4), "initial"), (dict(factor=1.0), "factor"), (dict(group=0), "group")):
        with pytest.raises(ValueError, match=message):
            widths_and_depths(**{**dict(initial=8, slope=1.0, factor=2.0, depth=3, group=4), **wrong})


def test_torchvisions_names_of_a_resnet_are_timms():
    """Its shortcuts count from 0, as those without means do in timm's."""
    m = tiny("resnet18")
    names = {"stem.0.": ("conv1.", "bn1."), "head.fc.": ("fc.", "fc.")}
    for i, stage in enumerate(m.stages):
        for j, block in enumerate(stage.blocks):
            ours, theirs = f"stages.{i}.blocks.{j}.", f"layer{i + 1}.{j}."
            names[ours + "conv1."] = theirs + "conv1.", theirs + "bn1."
            names[ours + "conv3."] = theirs + "conv2.", theirs + "bn2."
            if block.shortcut is not None:
                names[ours + "shortcut.conv."] = theirs + "downsample.0.", theirs + "downsample.1."
    state = {}
    for key, value in m.state_dict().items():
        ours = next(n for n in names if key.startswith(n))
        rest = key.removeprefix(ours)
        conv, norm = names[ours]
        name = norm + rest.removeprefix("norm.") if rest.startswith("norm.") else conv + rest.removeprefix("conv.")
        state[f"module.{name}"] = value
    again = started("resnet18").eval()
    load_pretrained(again, state)
    torch.testing.assert_close(again(images(1, 3, 40, 40)), m(images(1, 3, 40, 40)))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet18", dict(stem="9x9"), "stem='9x9' is not possible"),
        ("resnet26t", dict(num_heads=(1, 2), mechanism="focalnet"), "must have one number for each of 4 stages"),
        ("resnet18", dict(depths=(1, 0, 1, 1)), r"depths\[1\]"),
        ("regnety_002", dict(squeeze=-1.0), "squeeze"),
        ("mobilenetv3_small_050", dict(size="middle"), "size='middle' is not possible"),
        ("mobilenetv3_small_050", dict(width=0.0), "width"),
        ("efficientnet_b0", dict(padding="valid"), "padding='valid' is not possible"),
        ("efficientnet_b0", dict(depth=-1.0), "depth"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        started(name, **settings)


def test_blocks_by_hand():
    block = InvertedResidual(8, 8, None, drop_path=0.5)
    y, valid, carry = block(images(1, 3, 5, 8), None, "carry")
    assert y.shape == (1, 3, 5, 8) and valid is None and carry == "carry" and block.expand is None
    assert resnet(embed_dims=(8,), depths=(1,), num_classes=0, stem_dim=8)(images(1, 3, 9, 9)).shape == (1, 32)
    assert isinstance(block.project, ConvNorm)
