"""LITv2: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.models.blocks import Residual
from attnlib.nn.reduced.hilo import HiLoAttention

TINY = dict(
    embed_dims=(8, 16, 32), depths=(1, 2, 1), num_heads=(1, 2, 4), window_sizes=(0, 2, 1), num_classes=5,
    drop_path_rate=0.0, mlp_ratio=2.0,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("litv2_small", **{**TINY, **settings}).eval()
    for name, p in m.named_parameters():
        if "conv.offset" in name:
            torch.nn.init.normal_(p, std=0.1)
    return m


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_early_stages_have_no_attention_and_the_last_one_has_plain_attention():
    with torch.device("meta"):
        m = attnlib.create_model("litv2_small")
    assert all(type(b) is Residual for stage in m.stages[:2] for b in stage.blocks)
    inner = [[b.mixer.inner for b in stage.blocks] for stage in m.stages[2:]]
    assert all(isinstance(a, HiLoAttention) for stage in inner for a in stage)
    assert [(a.high.num_heads, a.low.num_heads) for a in inner[0]] == [(2, 10)] * 6
    assert all(a.plain and a.high is None and a.low.num_heads == 24 for a in inner[1])
    assert [len(stage.blocks) for stage in m.stages] == [2, 2, 6, 2]


def test_patches_are_merged_by_a_plain_convolution_at_the_start():
    m = attnlib.create_model("litv2_small", **TINY).eval()
    merging = m.stages[1].downsample
    x = images(1, 6, 4, 8)
    conv = torch.nn.functional.conv2d(x.movedim(-1, 1), merging.conv.weight, merging.conv.bias, 2).movedim(1, -1)
    torch.testing.assert_close(merging(x)[0], torch.nn.functional.gelu(merging.norm(conv)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 38)])
def test_any_size_and_any_share_of_heads(alpha, size):
    y = tiny(alpha=alpha)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_pixels_that_do_not_exist_change_nothing(training):
    m, x = tiny().train(training), images(2, 3, 32, 32)
    valid = torch.zeros(2, 32, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_a_padded_image_is_that_image():
    m, x = tiny(), images(1, 3, 48, 48)
    valid = torch.zeros(1, 48, 48, dtype=torch.bool)
    valid[:, :32, :16] = True
    torch.testing.assert_close(m(x, valid), m(x[:, :, :32, :16]))


def test_maps_of_all_stages():
    f = attnlib.create_model("litv2_small", **TINY, features_only=True)
    assert [tuple(t.shape) for t in f(images(1, 3, 33, 40))] == [(1, 8, 9, 10), (1, 16, 5, 5), (1, 32, 3, 3)]
    assert f.feature_info.reduction() == [4, 8, 16]


def test_another_mechanism_takes_the_places_of_attention():
    m = tiny(mechanism="softmax-attention")
    assert sum(type(a).__name__ == "SoftmaxAttention" for a in m.modules()) == 3
    assert m(images(1, 3, 16, 16)).shape == (1, 5)


def test_it_starts_as_the_authors_whole_model():
    torch.manual_seed(0)
    m = attnlib.create_model("litv2_small", **{**TINY, "embed_dims": (64, 128), "depths": (1, 1), "num_heads": (2, 4),
                                               "window_sizes": (0, 2)})  # fmt: skip
    block = m.stages[1].blocks[0]
    for linear in (block.mixer.inner.high.qkv, block.mixer.inner.low.kv, block.mlp.inner.fc1):
        assert 0.019 < linear.weight.std() < 0.021 and not linear.bias.any()
    conv = block.mlp.inner.dwconv
    assert 0.9 < conv.weight.std() / (2 / 9) ** 0.5 < 1.1 and not conv.bias.any()
    merging = m.stages[1].downsample.conv
    bound = (64 * 4) ** -0.5
    assert 0.95 * bound < merging.weight.abs().max() <= bound and 0 < merging.bias.abs().max() <= bound
    assert not merging.offset.weight.any() and not merging.offset.bias.any()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="window_sizes="):
        tiny(window_sizes=(0, 2))
    with pytest.raises(ValueError, match="window_sizes"):
        tiny(window_sizes=(0, -2, 1))
    with pytest.raises(ValueError, match="alpha"):
        tiny(alpha=2)
    with pytest.raises(ValueError, match="pad="):
        tiny(pad="none")
