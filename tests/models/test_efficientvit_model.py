"""EfficientViT: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import load_pretrained, model_entry

TINY = dict(embed_dims=(16, 24), depths=(1, 1), num_heads=(2, 3), window_sizes=(3, 2), key_dim=4, num_classes=5)


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("efficientvit_m0", **{**TINY, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_of_the_card():
    counts = [round(model_entry(f"efficientvit_m{i}").params / 1e6, 3) for i in range(6)]
    assert counts == [2.349, 2.981, 4.188, 6.901, 8.804, 12.474]


def test_windows_are_at_most_a_stages_map():
    with torch.device("meta"):
        m = attnlib.create_model("efficientvit_m0")
    assert [s.blocks[0].mixer.inner.window_size for s in m.stages] == [7, 7, 4]


@pytest.mark.parametrize("size", [(1, 1), (90, 130)])
def test_any_size(size):
    maps = tiny().forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((16, 32), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(2, 3, 128, 96)
    valid = torch.zeros(2, 128, 96, dtype=torch.bool)
    valid[0, :64, :80] = valid[1] = True
    first, second = tiny().train(train), tiny().train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))


def test_folded_it_is_the_same_and_has_no_norm_left():
    m, x = tiny().double(), images(2, 3, 80, 96).double()
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed.modules())
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)


def test_biases_of_another_window_are_interpolated():
    small, large = tiny(), tiny(window_sizes=(4, 3))
    assert load_pretrained(large, small.state_dict()).resized


def test_bad_settings():
    for settings, message in ((dict(embed_dims=(12, 24)), "embed_dims"), (dict(window_sizes=(3,)), "window_sizes"),
                              (dict(compat="timm"), "compat")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tiny(**settings)
