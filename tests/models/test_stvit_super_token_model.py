"""STViT: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.stvit import LocalMlp
from attnlib.nn.layers import MapNorm

TINY = dict(
    embed_dims=(16, 24), depths=(1, 2), num_heads=(1, 2), stoken_size=(3, 1), projection=20, mlp_ratio=2.0,
    num_classes=5, drop_path_rate=0.0,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("stvit_small", **{**TINY, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.bias, std=0.3)
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_super_tokens_in_the_first_stages_and_scales_in_the_last():
    m = attnlib.create_model("stvit_base", **{**TINY, "embed_dims": (8,) * 4, "depths": (1,) * 4, "num_heads": (1,) * 4,
                                              "stoken_size": (8, 4, 1, 1)})  # fmt: skip
    mixers = [s.blocks[0].mixer for s in m.stages]
    assert [x.inner.stoken_size for x in mixers] == [(8, 8), (4, 4), (1, 1), (1, 1)]
    assert [isinstance(x.scale, nn.Identity) for x in mixers] == [True, True, False, False]
    assert mixers[3].scale.gamma.eq(1e-6).all() and m.stages[3].blocks[0].mlp.scale.gamma.eq(1e-6).all()


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 37)])
def test_any_size(size):
    m, x = tiny(), images(2, 3, *size)
    assert m(x).shape == (2, 5) and m(x).isfinite().all()
    maps = m.forward_intermediates(x, intermediates_only=True)
    for stride, t in zip((4, 8), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride))


def test_features_before_the_pool_have_the_width_of_the_projection():
    m, x = tiny(), images(2, 3, 32, 32)
    assert m.num_features == m.head_hidden_size == 20
    assert m.forward_features(x).shape == (2, 4, 4, 20)
    torch.testing.assert_close(m.forward_head(m.forward_features(x)), m(x))
    f = attnlib.create_model("stvit_small", **TINY, features_only=True)
    assert f.feature_info.channels() == [16, 24] and [t.shape[1] for t in f(x)] == [16, 24]


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_pixels_that_do_not_exist_change_nothing(border):
    m, x = tiny(border=border), images(2, 3, 48, 48)
    valid = torch.zeros(2, 48, 48, dtype=torch.bool)
    valid[0, :24, :40] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    torch.testing.assert_close(m(x, valid)[:1], m(x[:1, :, :24, :40]))


def test_the_norm_before_an_mlp_is_folded_in_evaluation():
    torch.manual_seed(0)
    mlp = LocalMlp(6, 2.0).double()
    nn.init.normal_(mlp.fc1.pre.running_mean)
    nn.init.uniform_(mlp.fc1.pre.running_var, 0.5, 2)
    x = images(2, 40, 41, 6).double()
    y = mlp.eval()(x)
    normed = MapNorm(6).double().eval()
    normed.norm = mlp.fc1.pre
    z = nn.functional.gelu(nn.functional.linear(normed(x), mlp.fc1.conv.weight.flatten(1), mlp.fc1.conv.bias))
    torch.testing.assert_close(y, mlp.fc2(z + mlp.local.conv(z)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(stoken_size=(3,)), "stoken_size"),
        (dict(stoken_size=(3, 0)), "stoken_size"),
        (dict(n_iter=(1, 1, 1)), "n_iter"),
        (dict(layer_scale=(-1.0, 0.0)), "layer_scale"),
        (dict(layer_scale=(1.0,)), "layer_scale"),
        (dict(embed_dims=(15, 24)), "embed_dims"),
        (dict(num_heads=(1, 5)), "num_heads"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
