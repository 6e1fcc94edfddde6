"""SHViT: what its card asks of the backbone."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

import attnlib
from attnlib.nn.dense.shvit import SingleHeadAttention
from attnlib.nn.layers import BatchNormLinear, ResidualConv

TINY = dict(embed_dims=(16, 24, 20), depths=(1, 1, 2), partial_dims=(4, 6, 5), qk_dim=4, num_classes=5)


def started(name="shvit_s1", **settings):
    torch.manual_seed(0)
    return attnlib.create_model(name, **{**TINY, **settings})


def tiny(**settings):
    m = started(**settings)
    for part in m.modules():
        if isinstance(part, _BatchNorm):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.normal_(part.bias, std=0.3)
            nn.init.normal_(part.running_mean, std=0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 1), (33, 70), (64, 128)])
def test_any_size(size):
    maps = tiny().forward_intermediates(images(2, 3, *size), intermediates_only=True)
    for stride, t in zip((16, 32, 64), maps, strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


def test_folded_it_is_the_same_and_has_no_norm_of_batches_left():
    m, x = tiny().double(), images(2, 3, 64, 96).double()
    deployed = attnlib.deploy(m)
    assert not any(isinstance(part, _BatchNorm) for part in deployed.modules())
    assert not any(part.skip for part in deployed.modules() if isinstance(part, ResidualConv))
    torch.testing.assert_close(deployed(x), m(x), atol=1e-10, rtol=1e-8)
    assert attnlib.deploy(deployed)(x).equal(deployed(x))
    assert any(isinstance(part, nn.GroupNorm) for part in deployed.modules())  # that of attention stays
    single = tiny()
    torch.testing.assert_close(attnlib.deploy(single)(x.float()), single(x.float()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_at_the_start_every_block_is_the_identity(train):
    m = started().train(train)
    for stage, dim in zip(m.stages, (16, 24, 20), strict=True):
        x = images(2, 3, 4, dim)
        for block in stage.blocks:
            torch.testing.assert_close(block(x)[0], x)


def test_attention_stands_in_the_later_stages():
    m = tiny()
    assert [isinstance(s.blocks[0].mixer and s.blocks[0].mixer.inner, SingleHeadAttention) for s in m.stages] == [
        False, True, True,
    ]  # fmt: skip
    everywhere = tiny(kinds=["attention"] * 3)
    assert everywhere.stages[0].blocks[0].mixer.inner.partial_dim == 4
    other = tiny(mechanism="softmax-attention", num_heads=(1, 2, 4))
    assert other.stages[0].blocks[0].mixer is None and other.stages[2].blocks[0].mixer.inner.num_heads == 4
    assert other(images(1, 3, 64, 64)).shape == (1, 5)


def test_products_of_attention_are_cheaper_than_the_mlps_of_its_stage():
    m = attnlib.create_model("shvit_s1").eval()
    for stage, side in ((1, 7), (2, 4)):
        dim = m.stages[stage].blocks[0].mlp.inner.fc1.conv.in_channels
        with FlopCounterMode(display=False) as counter, torch.no_grad(), attnlib.use_backend("eager"):
            m.stages[stage].blocks[0].mixer(torch.zeros(1, side, side, dim))
        counts = counter.get_flop_counts()["Global"]
        products = sum(n for op, n in counts.items() if str(op) not in ("aten.mm", "aten.addmm"))
        assert 0 < products < 2 * side**2 * 2 * dim * 2 * dim


@pytest.mark.parametrize("train", [False, True])
def test_pixels_that_do_not_exist_change_nothing(train):
    x = images(3, 3, 128, 128)
    valid = torch.zeros(3, 128, 128, dtype=torch.bool)
    valid[0, :64, :96] = valid[1:] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    first, second = tiny().train(train), tiny().train(train)
    torch.testing.assert_close(first(other, valid), second(x, valid))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    if not train:
        torch.testing.assert_close(tiny()(x, valid)[:1], tiny()(x[:1, :, :64, :96]), atol=1e-5, rtol=1e-4)


def test_two_classifiers_are_a_pair_in_training_and_their_mean_afterwards():
    m, x = tiny(distillation=True), images(4, 3, 32, 32)
    labels, teacher = m.train()(x)
    assert labels.shape == teacher.shape == (4, 5) and not torch.allclose(labels, teacher)
    m.eval()
    pooled = m.forward_features(x).mean((1, 2))
    expected = (m.head.fc.labels(pooled) + m.head.fc.teacher(pooled)) / 2
    torch.testing.assert_close(m(x), expected)
    torch.testing.assert_close(attnlib.deploy(m)(x), m(x), atol=1e-5, rtol=1e-5)


def test_the_head_is_behind_a_norm_that_goes_with_it():
    m, x = tiny(), images(2, 3, 32, 32)
    assert isinstance(m.get_classifier(), BatchNormLinear)
    torch.testing.assert_close(
        m.forward_head(m.forward_features(x), pre_logits=True), m.forward_features(x).mean((1, 2))
    )
    m.reset_classifier(7)
    assert m(x).shape == (2, 7) and not m.head.fc.linear.bias.any()
    m.reset_classifier(3, "")
    assert m(x).shape == (2, 1, 1, 3)
    m.reset_classifier(0, "avg")
    torch.testing.assert_close(m(x), m.forward_features(x).mean((1, 2)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kinds=("conv", "shsa", "shsa")), "kinds='shsa'"),
        (dict(embed_dims=(12, 24, 20)), "multiple of 8"),
        (dict(partial_dims=(4, 25, 5)), "partial_dim must lie between 1 and dim=24"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        started(**settings)


def test_kernels_of_residual_convolutions_are_odd():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        ResidualConv(4, 2)
