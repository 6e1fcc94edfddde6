"""MambaOut: what its card asks of the backbone."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.build import model_entry
from attnlib.nn.modulation.mambaout import GatedCNN

TINY = dict(embed_dims=(8, 12), depths=(1, 2), num_classes=5)


def tiny(name="mambaout_tiny", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["mambaout_femto", "mambaout_small_rw"])
@pytest.mark.parametrize("size", [(1, 1), (17, 30), (33, 32)])
def test_any_size(name, size):
    y = tiny(name)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_counts_of_the_paper():
    counts = {
        n: round(model_entry(f"mambaout_{n}").params / 1e6, 3) for n in ("femto", "kobe", "tiny", "small", "base")
    }
    assert counts == {"femto": 7.305, "kobe": 9.141, "tiny": 26.545, "small": 48.488, "base": 84.813}


def test_there_is_no_mlp_and_every_block_has_a_gate():
    m = tiny()
    for stage in m.stages:
        for block in stage.blocks:
            assert block.mlp is None and isinstance(block.mixer.inner, GatedCNN)


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 40, 32)
    valid = torch.zeros(2, 40, 32, dtype=torch.bool)
    valid[0, :24, :16] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    torch.testing.assert_close(m(other, valid), m(x, valid))
    torch.testing.assert_close(m(x, valid)[:1], m(x[:1, :, :24, :16]), atol=1e-6, rtol=1e-5)


def test_start_as_the_authors_model():
    """Every linear map and convolution from a truncated normal distribution, no biases; scales where there are any."""
    m = tiny(embed_dims=(64, 96))
    for module in m.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 2000:
            assert 0.018 < module.weight.std().item() < 0.022 and not module.bias.any()
    conv = m.stages[1].blocks[0].mixer.inner.conv
    assert 0.018 < conv.weight.std().item() < 0.022 and not conv.bias.any()
    scaled = tiny("mambaout_base_wide_rw").stages[0].blocks[0].mixer.scale
    assert scaled.gamma.unique().tolist() == pytest.approx([1e-6])


def test_another_mechanism_gets_heads():
    m = tiny(mechanism="softmax-attention", num_heads=(2, 4))
    assert [s.blocks[0].mixer.inner.num_heads for s in m.stages] == [2, 4]
    assert m(images(1, 3, 16, 16)).shape == (1, 5)


def test_bad_settings():
    with pytest.raises(TypeError, match="head_norm.*'none'"):
        tiny(head_norm="none")
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        tiny(kernel_size=4)
    with pytest.raises(ValueError, match="stem_activation='relu'"):
        tiny(stem_activation="relu")
