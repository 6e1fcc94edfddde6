"""RAVLT: what its card asks of the backbone."""

import pytest
import torch

import attnlib

SMALL = dict(
    embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), mlp_ratio=2.0, features=12, num_classes=5,
    drop_path_rate=0.0,
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("ravlt_tiny", **{**SMALL, **settings}).eval()


def test_stages_read_as_the_released_models_do():
    kinds = [[b.mixer.inner.attention for b in stage.blocks] for stage in tiny().stages]
    assert kinds == [["linear"], ["linear"], ["softmax"] * 2, ["softmax"]]
    with torch.device("meta"):
        base = attnlib.create_model("ravlt_base")
    assert [stage.blocks[0].mixer.inner.head_dim for stage in base.stages] == [96, 96, 64, 64]


@pytest.mark.parametrize("size", [(33, 47), (9, 70)])
def test_any_size(size):
    y = tiny()(torch.randn(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), torch.randn(2, 3, 64, 32)
    valid = torch.zeros(2, 64, 32, dtype=torch.bool)
    valid[0, :40, :20] = valid[1] = True
    torch.testing.assert_close(m(x.masked_fill(~valid[:, None], float("nan")), valid), m(x, valid))


def test_first_weights():
    torch.manual_seed(0)
    model = attnlib.create_model("ravlt_tiny", depths=(1, 1, 1, 1))
    block = model.stages[2].blocks[0]
    for weight in (block.position.conv.weight, block.mlp.inner.dwconv.weight, block.mixer.inner.qkv.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(block.mixer.scale.gamma.mean()) == 1.0 and not block.mixer.inner.gate.bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention=("linear",)), "attention=.*one entry for each of 4 stages"),
        (dict(attention=("linear", "linear", "soft", "softmax")), "attention='soft'"),
        (dict(layer_scales=(1.0,)), "layer_scales=.*one entry"),
        (dict(features=0), "features must be an integer of at least 1"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        tiny(**change)
