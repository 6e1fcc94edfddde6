"""BiFormer: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.nn.dense.attention_lepe import AttentionLePE
from attnlib.nn.layers import MapNorm, masked_batch_norm
from attnlib.nn.sparse.biformer import BiLevelRoutingAttention

TINY = dict(
    embed_dims=(8, 16), depths=(1, 2), topks=(2, -2), n_win=2, head_dim=8, mlp_ratio=2.0, num_classes=5,
    drop_path_rate=0.0,
)  # fmt: skip


def tiny(name="biformer_tiny", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_stages_route_and_the_last_is_dense():
    with torch.device("meta"):
        m = attnlib.create_model("biformer_tiny")
    inner = [[b.mixer.inner for b in stage.blocks] for stage in m.stages]
    assert [stage[0].topk for stage in inner[:3]] == [1, 4, 16]
    assert all(isinstance(a, BiLevelRoutingAttention) for stage in inner[:3] for a in stage)
    assert all(isinstance(a, AttentionLePE) and a.reads == "input" and a.num_heads == 8 for a in inner[3])
    assert tiny("biformer_stl_nchw", topks=(2, -1)).stages[1].blocks[0].mixer.inner.reads == "value"
    assert tiny(topks=(2, -1)).stages[1].blocks[0].mixer.inner.lepe is None
    assert tiny("biformer_stl").stages[0].blocks[0].position is None


@pytest.mark.parametrize("name", ["biformer_stl", "biformer_stl_nchw"])
def test_the_layout_of_swin_has_as_many_parameters_as_the_authors(name):
    with torch.device("meta"):
        m = attnlib.create_model(name)
    assert sum(p.numel() for p in m.parameters()) == 28_372_552


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (45, 38)])
@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_all_regions_read_make_attention_dense():
    """Every region chosen: how many there are does not matter."""
    x = images(1, 3, 32, 32)
    torch.testing.assert_close(tiny(topks=(4, 4))(x), tiny(topks=(1, 1), n_win=1)(x))
    assert not torch.allclose(tiny(topks=(1, 1))(x), tiny(topks=(4, 4))(x))


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl"])
@pytest.mark.parametrize("training", [False, True])
def test_pixels_that_do_not_exist_change_nothing(name, training):
    m, x = tiny(name).train(training), images(2, 3, 32, 32)
    valid = torch.zeros(2, 32, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))


def test_statistics_of_the_last_norm_are_those_of_what_exists():
    norm, x = MapNorm(4), images(2, 3, 5, 4)
    valid = torch.rand(2, 3, 5) < 0.6
    y = norm(x, valid)
    real = y[valid]
    torch.testing.assert_close(real.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(real.var(0, unbiased=False), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(norm.eval()(x), masked_batch_norm(norm.norm, x, None))


def test_maps_of_all_stages():
    f = attnlib.create_model("biformer_tiny", **TINY, features_only=True)
    assert [tuple(t.shape) for t in f(images(1, 3, 33, 40))] == [(1, 8, 9, 10), (1, 16, 5, 5)]
    assert f.feature_info.reduction() == [4, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(topks=(1, 0)), "topks="),
        (dict(topks=(1,)), "topks="),
        (dict(head_dim=3), "head_dim="),
        (dict(layout="swin"), "layout="),
        (dict(compat="timm"), "compat="),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_linear_maps_start_as_the_authors_whole_model():
    m = attnlib.create_model("biformer_tiny", embed_dims=(64, 128), depths=(1, 1), topks=(1, -2))
    for stage in m.stages:
        inner = stage.blocks[0].mixer.inner
        for linear in (inner.qkv, inner.proj, stage.blocks[0].mlp.inner.fc1):
            assert 0.019 < linear.weight.std() < 0.021
            assert linear.bias is None or not linear.bias.any()
