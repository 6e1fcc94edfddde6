"""A decoder that goes up level by level."""

import pytest
import torch

import attnlib
from attnlib.models.dense.heads import Segmenter
from attnlib.models.dense.upsample import UpsampleHead


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def segmenter(**settings):
    torch.manual_seed(0)
    encoder = attnlib.create_model(
        "dinat_mini", features_only=True, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), kernel_size=3,
        dilations=None, drop_path_rate=0.0,
    )  # fmt: skip
    head = UpsampleHead(
        encoder.feature_info.channels(), **{"num_classes": 3, "window_size": 4, "head_dim": 8} | settings
    )
    return Segmenter(encoder, head).eval()


@pytest.mark.parametrize("settings", [{}, dict(upsample="bilinear"), dict(settings=dict(self_attention=True, shift=2))])
def test_any_size_and_pixels_that_do_not_exist(settings):
    m = segmenter(**settings)
    for size in ((1, 1), (37, 22)):
        y = m(rand(2, 3, *size))
        assert y.shape == (2, 3, *size) and y.isfinite().all()
    x = rand(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    for training in (False, True):
        torch.testing.assert_close(m.train(training)(other, valid), m(x, valid))


def test_attention_that_adds_nothing_is_the_bilinear_decoder():
    ours, plain = segmenter(settings=dict(mlp_ratio=0.0)), segmenter(upsample="bilinear")
    for up in ours.head.ups:
        torch.nn.init.zeros_(up.proj.weight), torch.nn.init.zeros_(up.proj.bias)
    held = plain.state_dict()
    assert set(held) < set(ours.state_dict())
    ours.load_state_dict({**ours.state_dict(), **held})
    x = rand(1, 3, 40, 36)
    torch.testing.assert_close(ours(x), plain(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(upsample="nearest"), "upsample"),
        (dict(upsample="bilinear", settings=dict(shift=2)), "upsample='attention'"),
        (dict(head_dim=0), "head_dim"),
        (dict(window_size=3), "window_size=3"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        segmenter(**settings)


def test_no_maps():
    with pytest.raises(ValueError, match="in_dims"):
        UpsampleHead([])
