"""SOFT: what its card asks of the backbone."""

import pytest
import torch

import attnlib
from attnlib.nn.dense.softmax_attention import SoftmaxAttention
from attnlib.nn.reduced.soft_softmax_free_transformer import SoftmaxFreeAttention

TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), num_classes=5)


def tiny(name="soft_tiny", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings}).eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_stages_and_landmarks():
    with torch.device("meta"):
        m = attnlib.create_model("soft_small")
    kinds = [{type(b.mixer) for b in stage.blocks} for stage in m.stages[:3]]
    assert kinds == [{SoftmaxFreeAttention}] * 3
    assert all(type(b.mixer.inner) is SoftmaxAttention for b in m.stages[3].blocks)
    assert [m.stages[i].blocks[0].mixer.ratio[0] for i in range(3)] == [8, 4, 2]  # 49 landmarks of 56, 28 and 14 tokens
    assert [len(stage.blocks) for stage in m.stages] == [1, 3, 7, 4]
    assert len(attnlib.models.build.model_entry("soft_small_as_coded").settings["depths"]) == 4


@pytest.mark.parametrize("size", [(1, 1), (40, 33), (64, 64)])
@pytest.mark.parametrize("name", ["soft_tiny", "soft_norm_tiny"])
def test_any_size(name, size):
    y = tiny(name, max_iter=6)(images(2, 3, *size))
    assert y.shape == (2, 5) and y.isfinite().all()


def test_pixels_that_do_not_exist_change_nothing():
    m, x = tiny(), images(2, 3, 64, 64)
    valid = torch.zeros(2, 64, 64, dtype=torch.bool)
    valid[0, :32, :48] = valid[1] = True
    torch.testing.assert_close(m(x.masked_fill(~valid[:, None], float("nan")), valid), m(x, valid))


def test_maps_of_all_stages_and_tokens():
    f = attnlib.create_model("soft_tiny", **TINY, features_only=True)
    assert [tuple(t.shape) for t in f(images(1, 3, 64, 32))] == [
        (1, 8, 16, 8),
        (1, 8, 8, 4),
        (1, 16, 4, 2),
        (1, 16, 2, 1),
    ]
    m = tiny()
    assert m.forward_features(images(1, 3, 64, 32)).shape == (1, 3, 16)
    x = images(1, 3, 64, 32).requires_grad_()
    m.train().set_grad_checkpointing()
    m(x).sum().backward()
    assert x.grad.any()


def test_another_mechanism_takes_the_places_of_attention():
    m = tiny(mechanism="softmax-attention")
    assert sum(type(a) is SoftmaxAttention for a in m.modules()) == 4
    with pytest.raises(ValueError, match="class_token=False"):
        tiny(mechanism="hilo-litv2", mechanism_settings={"rank": 2})
    m = tiny(mechanism="hilo-litv2", mechanism_settings={"rank": 2}, class_token=False, global_pool="avg")
    assert m(images(1, 3, 32, 32)).shape == (1, 5)


def test_it_starts_as_the_authors_whole_model():
    m = attnlib.create_model("soft_tiny", **{**TINY, "embed_dims": (64, 64, 64, 64)})
    block = m.stages[0].blocks[0]
    for linear in (block.mixer.q, block.mixer.proj, block.mlp.fc1, m.stages[3].blocks[0].mixer.inner.k):
        assert 0.018 < linear.weight.std() < 0.022 and not linear.bias.any()
    assert 0.9 < block.mixer.landmark.weight.abs().max() * (64 * 64) ** 0.5 <= 1  # as torch's convolutions
    for table in (m.cls_token, m.stages[1].downsample[1].pos_embed):
        assert 0.014 < table.std() < 0.026


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="ratios="):
        tiny(ratios=(2, 2))
    with pytest.raises(ValueError, match="conv_sizes"):
        tiny(conv_sizes=(3, 3, 3, 3))
    with pytest.raises(ValueError, match="global_pool"):
        tiny(class_token=False)
