"""Swin V2: attention by cosines written out, windows of other sizes, any image, a detector on it."""

import math

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.models.detect.plain_detr import LastMap, PlainDETR
from attnlib.nn.partition.swinv2 import CosineWindowAttention

TINY = dict(
    embed_dim=8, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5, img_size=32, drop_path_rate=0.0,
    pretrained_windows=(0, 0), global_blocks=((), ()),
)  # fmt: skip


def tiny(**settings):
    torch.manual_seed(0)
    m = attnlib.create_model("swinv2_tiny_window8_256", **{**TINY, **settings})
    for name, p in m.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(m, x, valid=None):
    """All pairs of one window, written out."""
    _, height, width, dim = x.shape
    flat = x.flatten(1, 2)
    q, k, v = (flat @ part.T for part in m.qkv.weight.chunk(3))
    q, v = q + m.q_bias, v + m.v_bias
    heads, out = m.num_heads, []
    for h in range(heads):
        part = slice(h * m.head_dim, (h + 1) * m.head_dim)
        cosine = F.normalize(q[..., part], dim=-1) @ F.normalize(k[..., part], dim=-1).mT
        scores = cosine * min(math.exp(m.logit_scale[h].item()), 100.0)
        for i in range(height * width):
            for j in range(height * width):
                gap = torch.tensor([i // width - j // width, i % width - j % width], dtype=torch.float64)
                sides = [(p or n) - 1 for p, n in zip(m.pretrained_window, (height, width), strict=True)]
                gap = gap / torch.tensor(sides, dtype=torch.float64) * 8
                gap = gap.sign() * (gap.abs() + 1).log2() / 3
                scores[:, i, j] += 16 * m.position(gap)[h].sigmoid()
        out.append(scores.softmax(-1) @ v[..., part])
    return m.proj(torch.cat(out, -1)).view(x.shape[0], height, width, dim)


def made(**settings):
    torch.manual_seed(0)
    m = CosineWindowAttention(**{**dict(dim=8, num_heads=2, window_size=(3, 4), rel_hidden=6), **settings}).double()
    for p in (m.q_bias, m.v_bias, m.logit_scale):
        torch.nn.init.normal_(p, 0.5, 0.3)
    return m


@pytest.mark.parametrize("settings", [{}, dict(pretrained_window=(5, 2)), dict(whole=True)])
def test_attention_is_the_equation(settings):
    m, x = made(**settings), images(2, 3, 4, 8).double()
    torch.testing.assert_close(m(x), oracle(m, x), atol=1e-6, rtol=1e-5)  # displacements are float32
    scales = made(**settings)
    torch.nn.init.constant_(scales.logit_scale, 9.0)  # held at 100
    torch.testing.assert_close(scales(x), oracle(scales, x), atol=1e-5, rtol=1e-4)


def test_windows_do_not_meet_and_shifted_ones_read_across():
    x = images(1, 6, 8, 8).double()
    m = made()
    whole = m(x)
    torch.testing.assert_close(whole[:, :3, 4:], oracle(m, x[:, :3, 4:]), atol=1e-6, rtol=1e-5)
    shifted = made(shift=(1, 2))
    torch.testing.assert_close(shifted(x)[:, 1:4, 2:6], oracle(shifted, x[:, 1:4, 2:6]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attnlib.deploy(m)(x), whole)


@pytest.mark.parametrize("size", [(1, 1), (33, 70)])
def test_any_size(size):
    m = tiny(global_blocks=((), (1,)))
    maps = m.forward_intermediates(images(2, 3, *size), intermediates_only=True)
    assert [t.shape[2:] for t in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8)]
    assert all(t.isfinite().all() for t in maps)


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    torch.testing.assert_close(m(x.masked_fill(~valid[:, None], float("nan")), valid), m(x, valid))


def test_weights_serve_windows_of_another_size():
    small, large = tiny(), tiny(window_size=8, img_size=64, pretrained_windows=(4, 4))
    large.load_state_dict(small.state_dict())
    assert large(images(1, 3, 64, 64)).isfinite().all()
    assert large.stages[0].blocks[1].mixer.inner.shift == (4, 4)


def test_it_starts_with_norms_of_zeros():
    m = attnlib.create_model("swinv2_tiny_window8_256", **TINY)
    for stage in m.stages:
        for block in stage.blocks:
            assert not block.mixer.norm.weight.any() and not block.mlp.norm.weight.any()
            assert torch.allclose(block.mixer.inner.logit_scale.exp(), torch.tensor(10.0))


def test_a_detector_stands_on_it():
    m = PlainDETR(LastMap(tiny(num_classes=0)), 2, dim=16, num_heads=2, hidden=16, depth=1, queries=3, box_hidden=8)
    logits, boxes = m(images(1, 3, 32, 32))
    assert m.stride == 8 and logits.shape == (1, 3, 2) and boxes.shape == (1, 3, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(pretrained_windows=(0,)), "pretrained_windows=.* one entry for each of 2 stages"),
        (dict(global_blocks=((),)), "global_blocks=.* one entry for each of 2 stages"),
        (dict(window_size=0), "window_size"),
        (dict(length_eps=-1.0), "eps"),
        (dict(num_heads=(3, 4)), "num_heads"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(**settings)
