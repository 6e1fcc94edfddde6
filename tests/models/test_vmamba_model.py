"""VMamba: sizes, maps of any size, pixels that do not exist, starts."""

import pytest
import torch

import attnlib
from attnlib.nn.scan.vmamba import SS2D

TINY = dict(embed_dims=(8, 12), depths=(1, 2), num_classes=5, drop_path_rate=0.0, state_dim=2)


def tiny(name="vmambav2_tiny", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["vmambav0_tiny", "vmambav2_tiny"])
@pytest.mark.parametrize("size", [(1, 1), (17, 30)])
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_sizes_by_name():
    for name, gated, state, width in (
        ("v0_tiny", True, 16, 192),
        ("v2_small", False, 1, 192),
        ("v2v_base", False, 1, 128),
    ):
        with torch.device("meta"):
            m = attnlib.create_model(f"vmamba{name}")
        block = m.stages[0].blocks[0]
        inner = block.mixer.inner
        assert isinstance(inner, SS2D) and inner.width == width and inner.scan.scan.state_dim == state
        assert (inner.gate_kind == "activated") is gated and (block.mlp is None) is gated


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 24, 32)
    valid = torch.zeros(2, 24, 32, dtype=torch.bool)
    valid[0, :16, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    torch.testing.assert_close(m(x, valid)[:1], m(x[:1, :, :16, :24]), atol=1e-5, rtol=1e-4)


def test_start_as_the_authors_model():
    m = tiny(embed_dims=(32, 64), expand=2.0)
    inner = m.stages[1].blocks[0].mixer.inner
    assert 0.018 < inner.in_proj.weight.std().item() < 0.022
    assert inner.scan.scan.x_proj.abs().max() <= 128**-0.5 and bool((inner.scan.scan.D == 1).all())
    assert inner.conv.weight.abs().max() <= 1 / 3


def test_another_mechanism_gets_heads():
    m = tiny(mechanism="softmax-attention", num_heads=(2, 4))
    assert [s.blocks[0].mixer.inner.num_heads for s in m.stages] == [2, 4]
    assert m(images(1, 3, 16, 16)).shape == (1, 5)


def test_bad_settings():
    with pytest.raises(ValueError, match="stem='conv'"):
        tiny(stem="conv")
    with pytest.raises(ValueError, match="downsample='pool'"):
        tiny(downsample="pool")
