"""DDRNet and its context module: what its card asks."""

import pytest
import torch
import torch.nn.functional as F
from parity import HERE, Models
from torch import nn

import attnlib
from attnlib.models.build import load_pretrained, model_entry
from attnlib.models.dense.ddrnet import DAPPM

TINY = dict(dim=4, num_classes=5)
SEGMENT = dict(TINY, branch_dim=6, head_dim=8)


def tiny(name="ddrnet_23_segmenter", **settings):
    torch.manual_seed(0)
    own = SEGMENT if name.endswith("segmenter") else dict(TINY, last_dim=12)
    m = attnlib.create_model(name, **{**own, **settings})
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return m.eval()


def images(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_of_the_card():
    counts = [round(model_entry(f"ddrnet_{n}_segmenter").params / 1e6, 3) for n in ("23_slim", "23", "39")]
    assert counts == [5.696, 20.149, 32.360]


class Training(Models):
    """Recorded in training, to be held in float64: norms of few values make much of rounding."""

    folder = HERE


def test_training_with_two_classifiers_is_the_authors():
    recorded = Training("ddrnet-training")
    recorded._model_holds("segment", 1e-5, torch.float64)


def test_the_auxiliary_classifier_of_a_release_may_be_left_out():
    recorded = Training("ddrnet-training")
    m = tiny(num_classes=2, head_dim=10)
    load_pretrained(m, recorded.weights("segment"))
    full = recorded.build_model("segment").eval()
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(m(x), full(x))


@pytest.mark.parametrize("size", [(64, 64), (128, 256), (1, 1), (70, 45)])
def test_any_size(size):
    m, x = tiny(), images(1, 3, *size)
    maps = m.encoder(x)
    eighth = (-(-size[0] // 8), -(-size[1] // 8))
    assert [t.shape[2:] for t in maps] == [eighth, eighth, (-(-size[0] // 64), -(-size[1] // 64))]
    assert m.head(maps, [None] * 3).shape[2:] == eighth
    assert m(x).shape == (1, 5, *size) and m(x).isfinite().all()
    for stride, t in zip((4, 8, 16, 32, 32), tiny("ddrnet_39", features_only=True)(x), strict=True):
        assert t.shape[2:] == (-(-size[0] // stride), -(-size[1] // stride)) and t.isfinite().all()


def test_without_exchanges_the_branches_are_independent():
    m, x = tiny(), images(1, 3, 64, 64)

    def gradients():
        m.zero_grad()
        _, high, low = m.encoder(x)
        blocks = m.encoder.model.stages[3].blocks[0]
        told = []
        for end in (high, low):
            weights = [blocks.low[0].conv1.conv.weight, blocks.high[0].conv1.conv.weight]
            told.append([bool(g.any()) for g in torch.autograd.grad(end.sum(), weights, retain_graph=True)])
        return told

    assert gradients() == [[True, True], [True, True]]
    for stage in (2, 3):
        for block in m.encoder.model.stages[stage].blocks:
            for conv in (block.compress, block.down[-1]):
                nn.init.zeros_(conv.norm.weight)
    assert gradients() == [[False, True], [True, False]]


# ---- DAPPM


def test_dappm_is_its_equation():
    torch.manual_seed(0)
    m, x = DAPPM(6, 4, 5).double().eval(), images(2, 9, 12, 6).double()
    for part in m.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight)
            nn.init.uniform_(part.running_var, 0.5, 2)

    def conv(layer, t):
        t = layer.norm.norm(t).relu()
        return F.conv2d(t, layer.conv.conv.weight, padding=layer.conv.conv.padding)

    t = x.permute(0, 3, 1, 2)
    means = [F.unfold(t, k, padding=k // 2, stride=s).unflatten(1, (6, -1)).mean(2) for k, s in DAPPM.pools]
    means = [p.unflatten(-1, (-(-9 // s), -(-12 // s))) for p, (_, s) in zip(means, DAPPM.pools, strict=True)]
    ys = [conv(m.scales[0], t)]
    for mean, scale, process in zip([*means, t.mean((2, 3), keepdim=True)], m.scales[1:], m.process, strict=True):
        wide = F.interpolate(conv(scale, mean), (9, 12), mode="bilinear", align_corners=False)
        ys.append(conv(process, wide + ys[-1]))
    expected = conv(m.compress, torch.cat(ys, 1)) + conv(m.shortcut, t)
    torch.testing.assert_close(m(x), expected.permute(0, 2, 3, 1))


def test_a_constant_stays_constant_only_away_from_borders():
    torch.manual_seed(0)
    y = DAPPM(4, 4, 4).double().eval()(torch.ones(1, 49, 49, 4).double())[0]
    torch.testing.assert_close(y[24, 24], y[25, 24])
    assert not torch.allclose(y[24, 24], y[0, 0])


def test_dappm_of_one_token_and_of_one_image():
    m = DAPPM(4, 4, 3)
    assert m.eval()(images(1, 1, 1, 4)).isfinite().all()
    with pytest.raises(ValueError, match="at least two images in training"):
        m.train()(images(1, 4, 4, 4))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["ddrnet_23", "ddrnet_23_segmenter"])
def test_pixels_that_do_not_exist_change_nothing(name, train):
    x = images(2, 3, 128, 96)
    valid = torch.zeros(2, 128, 96, dtype=torch.bool)
    valid[0, :64, :80] = valid[1] = True
    first, second = tiny(name).train(train), tiny(name).train(train)
    torch.testing.assert_close(first(x.masked_fill(~valid[:, None], float("nan")), valid), second(x, valid))


def test_folded_it_is_the_same():
    for name in ("ddrnet_39", "ddrnet_39_segmenter"):
        m, x = tiny(name, depths=(1, 1, 2, 1)).double(), images(2, 3, 80, 96).double()
        torch.testing.assert_close(attnlib.deploy(m)(x), m(x), atol=1e-10, rtol=1e-8)


def test_the_loss_has_an_auxiliary_term_of_its_own_weight():
    m, x = tiny(auxiliary=True).train(), images(2, 3, 64, 64)
    target = torch.randint(0, 5, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    both = m(x)
    assert isinstance(both, tuple) and [t.shape for t in both] == [(2, 5, 64, 64)] * 2
    losses = m.loss(both, target)
    torch.testing.assert_close(losses["auxiliary"], 0.4 * F.cross_entropy(both[1], target))
    torch.testing.assert_close(losses["cross_entropy"], F.cross_entropy(both[0], target))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in m.parameters())
    assert set(m.loss(m.eval()(x), target)) == {"cross_entropy"}
    assert m.predict(x, (16, 16)).shape == (2, 16, 16)


def test_bad_settings():
    for settings, message in ((dict(exchanges=(3, 1)), "must divide the depths"), (dict(depths=(2, 2)), "depths"),
                              (dict(exchanges=(0, 1)), "exchanges"), (dict(dim=0), "dim")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tiny(**settings)
