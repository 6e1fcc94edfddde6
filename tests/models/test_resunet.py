"""ResUNet with channel attention and ASPP: what its card asks, over a small trunk; and how masks are compared."""

import math

import pytest
import torch
from torch import nn

import attnlib
from attnlib.bench.masks import mask_dice, surface_distance
from attnlib.models.backbones.resnet import resnet
from attnlib.models.backbones.stages import Features
from attnlib.models.dense.resunet import ResUNet


def small(**settings):
    trunk = resnet((4, 4, 8, 8), (1, 1, 1, 1), stem_dim=4, num_classes=0, in_chans=4)
    return ResUNet(num_classes=3, dims=(4,) * 5, encoder=Features(trunk), rates=(1, 2), **settings)


@pytest.mark.parametrize("attention", ["se", "eca", None])
def test_size_in_is_size_out(attention):
    torch.manual_seed(0)
    model = small(attention=attention).eval()
    for size in ((32, 64), (45, 33), (96, 32)):
        assert model(torch.randn(2, 4, *size)).shape == (2, 3, *size)
    terms = model.train().loss(model(torch.randn(2, 4, 64, 64)), torch.randint(0, 3, (2, 64, 64)))
    assert list(terms) == ["dice", "cross_entropy"]
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.levels.parameters())


def test_open_gates_are_no_gates():
    torch.manual_seed(0)
    gated, plain = small().eval(), small(attention=None).eval()
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if ".attention." not in k}, strict=True)

    x = torch.randn(1, 4, 32, 32)
    assert not gated(x).equal(plain(x))
    for level in gated.levels:
        if level.attention is not None:
            for layer in (m for m in level.attention.modules() if isinstance(m, nn.Linear)):
                nn.init.zeros_(layer.weight)
                nn.init.constant_(layer.bias, 60.0)  # a sigmoid of 1
    torch.testing.assert_close(gated(x), plain(x))


def test_the_named_model():
    with torch.device("meta"):
        model = attnlib.models.build.model_entry("resunet_efficientnet_b0").make()
    trunk = sum(p.numel() for p in model.encoder.parameters())
    assert trunk == 3_595_676 and model.encoder.dims == [16, 24, 40, 112, 320]
    assert model.in_chans == 4 and [tuple(h.weight.shape) for h in model.heads] == [(4, 16, 1, 1)]


def test_masks_that_agree_and_that_do_not():
    one = torch.zeros(5, 6, 7, dtype=torch.bool)
    one[2:4, 1:4, 2:5] = True
    assert mask_dice(one, one) == 1 and surface_distance(one, one) == 0
    assert surface_distance(one, one.roll(1, 2), 100) == 1 and surface_distance(one, one.roll(1, 2), 100, 2.0) == 2
    none = torch.zeros_like(one)
    assert mask_dice(none, none) == 1 and mask_dice(one, none) == 0
    assert surface_distance(none, none) == 0 and surface_distance(one, none) == math.inf
    with pytest.raises(ValueError, match="boolean"):
        mask_dice(one, one.float())
    with pytest.raises(ValueError, match="one shape"):
        surface_distance(one, one[1:])
    for spacing in (-1.0, math.nan, (1, 1, 0.0)):
        with pytest.raises(ValueError, match="spacing must be a finite number above 0"):
            surface_distance(one, one, spacing=spacing)
    with pytest.raises(TypeError, match="spacing must be"):
        surface_distance(one, one, spacing="ab")
    with pytest.raises(ValueError, match="spacing"):
        surface_distance(one, one, spacing=(1, 1))


def test_bad_settings():
    with pytest.raises(ValueError, match="attention"):
        small(attention="cbam")
    with pytest.raises(ValueError, match="encoder given by name"):
        small(pretrained=True)
