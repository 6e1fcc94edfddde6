"""FocalNet: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.models.build import model_entry
from attnlib.nn.modulation.focalnet import FocalModulation

TINY = dict(embed_dim=8, depths=(1, 2), mlp_ratio=2.0, num_classes=5, drop_path_rate=0.0)


def tiny(name="focalnet_tiny_srf", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["focalnet_tiny_srf", "focalnet_large_fl3", "focalnet_huge_fl3"])
@pytest.mark.parametrize("size", [(1, 1), (17, 30), (16, 24)])
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


@pytest.mark.parametrize(
    ("name", "kernels", "between"),
    [
        ("focalnet_small_srf", (3, 5), 2),
        ("focalnet_base_lrf", (3, 5, 7), 2),
        ("focalnet_large_fl3", (5, 7, 9), 3),
        ("focalnet_xlarge_fl4", (3, 5, 7, 9), 3),
        ("focalnet_huge_fl3", (3, 5, 7), 3),
    ],
)
def test_sizes_by_name(name, kernels, between):
    with torch.device("meta"):
        m = attnlib.create_model(name)
    inner = m.stages[1].blocks[0].mixer.inner
    assert inner.kernel_sizes == kernels and m.stages[1].downsample.proj.kernel_size == (between, between)
    large = between == 3
    assert m.stages[1].blocks[0].mixer.post_norm is large
    assert ("scale.gamma" in dict(m.stages[1].blocks[0].mixer.named_parameters())) is large
    assert isinstance(inner.norm, torch.nn.LayerNorm) is name.startswith("focalnet_huge")


def test_one_level_is_divided_by_the_number_of_levels_where_the_authors_say_so():
    """Their configuration of large_fl4 alone; timm leaves it out."""
    divided = {n for n in attnlib.list_models("focalnet*") if model_entry(n).settings.get("normalize_modulator")}
    assert divided == {"focalnet_large_fl4"}


def test_isotropic_models_are_one_stage_of_patches():
    m = tiny("focalnet_small_iso", depths=(2,))
    assert [tuple(t.shape) for t in m.forward_intermediates(images(1, 3, 48, 40), intermediates_only=True)] == [
        (1, 8, 3, 3)
    ]
    assert m.feature_info[0]["reduction"] == 16


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 40, 32)
    valid = torch.zeros(2, 40, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    torch.testing.assert_close(m(x, valid)[:1], m(x[:1, :, :24, :16]), atol=1e-6, rtol=1e-5)


def test_every_pixel_reaches_every_output_through_the_mean():
    m, x = tiny(depths=(1, 1)).double(), images(1, 3, 64, 64).double().requires_grad_()
    (seen,) = torch.autograd.grad(m.forward_features(x)[0, 0, 0, 0], x)
    assert (seen.abs().sum(1) > 0).all()


def test_start_as_the_authors_whole_model():
    """Linear maps are truncated normal; the modulator, a convolution in their code, starts as torch's do."""
    m = tiny(embed_dim=64)
    inner = m.stages[1].blocks[0].mixer.inner
    assert isinstance(inner, FocalModulation)
    for linear in (inner.f, inner.proj, m.stages[1].blocks[0].mlp.inner.fc1, m.head.fc):
        assert 0.018 < linear.weight.std().item() < 0.022 and not linear.bias.any()
    bound = 128**-0.5
    assert inner.h.weight.abs().max() <= bound and inner.h.weight.std().item() == pytest.approx(
        bound / 3**0.5, rel=0.03
    )
    assert inner.h.bias.any()
    large = tiny("focalnet_large_fl3")
    assert large.stages[0].blocks[0].mixer.scale.gamma.unique().tolist() == pytest.approx([1e-4])


def test_another_mechanism_gets_heads():
    m = tiny(mechanism="softmax-attention", num_heads=(2, 4))
    assert [s.blocks[0].mixer.inner.num_heads for s in m.stages] == [2, 4]
    assert m(images(1, 3, 16, 16)).shape == (1, 5)


def test_bad_settings():
    with pytest.raises(ValueError, match="focal_window=4"):
        tiny(focal_windows=(4, 4))
    with pytest.raises(TypeError, match="focal_window"):
        tiny(focal_window=3)
