"""MaxViT: what its card asks of the backbone."""

import functools

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import load_pretrained, model_entry
from attnlib.nn.layers import ConvNorm
from attnlib.nn.partition.maxvit import PartitionAttention

TINY = dict(
    embed_dims=(8, 16), depths=(1, 2), stem_dims=(6, 8), head_dim=4, window_size=2, num_classes=5, drop_path_rate=0.0
)


def tiny(name="maxvit_tiny", **settings):
    torch.manual_seed(0)
    model = attnlib.create_model(name, **{**TINY, **settings})
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.2)
            nn.init.uniform_(m.running_var, 0.5, 2)
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(m.weight, std=m.weight[0].numel() ** -0.5)
    return model.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["maxvit_tiny", "maxvit_tiny_rw_224", "maxvit_rmlp_tiny_rw_256"])
@pytest.mark.parametrize("size", [(1, 1), (17, 30), (32, 16)])
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_windows_are_a_part_of_the_image():
    for side, window in ((224, 7), (256, 8), (384, 12), (512, 16), ((256, 224), (8, 7))):
        with torch.device("meta"):
            m = attnlib.create_model("maxvit_tiny", img_size=side)
        expected = (window, window) if isinstance(window, int) else window
        assert {a.window_size for a in m.modules() if isinstance(a, PartitionAttention)} == {expected}
    assert [a.kind for a in tiny().modules() if isinstance(a, PartitionAttention)] == ["block", "grid"] * 3


def test_one_block_reads_the_whole_map_once_windows_meet_the_grid():
    """Grid tokens no wider apart than a window: every pixel reaches every output; with windows alone it does not."""
    m = tiny(embed_dims=(8,), depths=(1,)).double()
    x = images(1, 3, 16, 16).double().requires_grad_()  # a map of 4 x 4, windows and grids of 2
    (seen,) = torch.autograd.grad(m.forward_features(x)[0, 0, 0].sum(), x)
    assert (seen.abs().sum(1) > 0).all()
    local = tiny(embed_dims=(8,), depths=(1,), grid_size=1).double()
    for part in local.modules():
        if hasattr(part, "squeeze"):
            part.squeeze = None  # it reads the mean of the whole map
    (seen,) = torch.autograd.grad(local.forward_features(x)[0, 0, 0].sum(), x)
    assert not (seen.abs().sum(1) > 0).all()


def test_the_stem_is_level_0_as_timm_counts():
    f = attnlib.create_model("maxvit_tiny", **TINY, features_only=True).eval()
    assert f.feature_info.reduction() == [2, 4, 8] and f.feature_info.module_name() == ["stem", "stages.0", "stages.1"]
    x = images(1, 3, 24, 32)
    assert [tuple(t.shape) for t in f(x)] == [(1, 8, 12, 16), (1, 8, 6, 8), (1, 16, 3, 4)]
    assert len(f.state_dict()) < len(tiny().state_dict())
    m = tiny()
    (last,) = m.forward_intermediates(x, 1, intermediates_only=True)
    assert last.shape == (1, 16, 3, 4)
    stem, first = m.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True)
    assert stem.shape == (1, 8, 12, 16) and first.shape == (1, 8, 6, 8)
    only = attnlib.create_model("maxvit_tiny", **TINY, features_only=True, out_indices=(0,))
    assert len(only.model.stages) == 0 and only(x)[0].shape == (1, 8, 12, 16)
    with pytest.raises(ValueError, match="there are 3: 0 to 2"):
        attnlib.create_model("maxvit_tiny", **TINY, features_only=True, out_indices=(3,))


@pytest.mark.parametrize("name", ["maxvit_tiny", "maxvit_tiny_rw_224"])
def test_pixels_that_do_not_exist_change_nothing(name):
    m, x = tiny(name), images(2, 3, 40, 32)
    valid = torch.zeros(2, 40, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    # windows lie the same in the padded image; the grid does not
    alone = functools.partial(tiny, name, grid_size=1)
    torch.testing.assert_close(alone()(x, valid)[:1], alone()(x[:1, :, :24, :16]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["maxvit_tiny", "maxvit_rmlp_tiny_rw_256"])
def test_deployed_has_no_norms_of_batches_left(name):
    m, x = tiny(name).double(), images(2, 3, 24, 32).double()
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in deployed.modules())
    assert not any("rel_" in key for key, _ in deployed.named_parameters())
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)
    assert any(isinstance(part, ConvNorm) and part.norm is not None for part in m.modules())


def test_tables_follow_the_size_of_images():
    small, large = tiny(img_size=64, window_size=None), tiny(img_size=128, window_size=None)
    done = load_pretrained(large, small.state_dict())
    assert len(done.resized) == 6 and all(name.endswith("rel_bias") for name in done.resized)
    table, old = (m.stages[0].blocks[0].window.mixer.inner.rel_bias.detach() for m in (large, small))
    assert table.shape == (2, 7, 7) and table[0, 3, 3].item() == pytest.approx(old[0, 1, 1].item(), abs=0.05)
    free = tiny("maxvit_rmlp_tiny_rw_256", img_size=64, window_size=None)
    assert not load_pretrained(
        tiny("maxvit_rmlp_tiny_rw_256", img_size=128, window_size=None), free.state_dict()
    ).resized


def test_start_as_the_paper_and_as_timm():
    paper = attnlib.create_model("maxvit_tiny", **{**TINY, "embed_dims": (32, 64), "head_dim": 32})
    for p in (paper.stages[1].blocks[0].window.mixer.inner.qkv, paper.stages[0].downsample.expand.conv, paper.head.pre):
        assert 0.018 < p.weight.std().item() < 0.022
    assert paper.stem[0].norm.momentum == 0.01 and paper.stem[0].norm.eps == 1e-3
    timm = attnlib.create_model("maxvit_tiny_rw_224", **{**TINY, "embed_dims": (32, 64), "head_dim": 32})
    qkv = timm.stages[1].blocks[0].window.mixer.inner.qkv.weight.detach()
    assert qkv.abs().max() <= (6 / (64 + 192)) ** 0.5 and qkv.std().item() == pytest.approx(
        (2 / (64 + 192)) ** 0.5, rel=0.05
    )
    wide = timm.stages[1].blocks[1].conv.expand.conv.weight.detach()
    assert wide.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert timm.stem[0].norm.momentum == 0.1 and timm.stem[0].norm.eps == 1e-5


def test_what_comes_before_the_model():
    assert tiny().pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    large = model_entry("maxvit_base_tf_384_21k")
    assert large.data["mean"] == (0.5,) * 3 and large.data["crop_pct"] == 1.0
    assert large.weights == ("timm/maxvit_base_tf_384.in21k_ft_in1k", "model.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layout="pt"), "layout='pt'"),
        (dict(head_dim=3), "head_dim=3 does not divide"),
        (dict(rel_bias="swin"), "rel_bias='swin'"),
        (dict(window_size=0), "window_size"),
        (dict(pad="reflect"), "pad='reflect'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_maps_that_windows_do_not_divide_can_be_refused():
    m = tiny(pad="refuse")
    assert m(images(1, 3, 16, 16)).shape == (1, 5)
    with pytest.raises(ValueError, match="does not divide the grid"):
        m(images(1, 3, 12, 16))
