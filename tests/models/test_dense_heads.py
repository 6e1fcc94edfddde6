"""Heads over the maps of a backbone, and the model of both."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.models.backbones.stages import map_info
from attnlib.models.dense.heads import FPNHead, FuseMaps, SegFormerHead, Segmenter, UPerHead

DIMS = [8, 16, 24]
HEADS = {"segformer": SegFormerHead, "fpn": FPNHead, "uper": UPerHead}


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(size=(9, 12), batch=2, dtype=torch.float32, dims=DIMS):
    return [rand(batch, c, -(-size[0] // 2**i), -(-size[1] // 2**i), seed=i).to(dtype) for i, c in enumerate(dims)]


def head(kind="segformer", **settings):
    torch.manual_seed(0)
    return HEADS[kind](DIMS, 12, num_classes=5, **settings).eval()


def segmenter(kind="segformer"):
    torch.manual_seed(0)
    encoder = attnlib.create_model(
        "dinat_mini", features_only=True, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), kernel_size=3,
        dilations=None, drop_path_rate=0.0,
    )  # fmt: skip
    return Segmenter(encoder, HEADS[kind](encoder.feature_info.channels(), 12, num_classes=5)).eval()


def shaken(module):
    """Norms that do something."""
    for i, m in enumerate(module.modules()):
        if isinstance(m, nn.BatchNorm2d):
            with torch.no_grad():
                m.weight.copy_(1 + 0.3 * rand(*m.weight.shape, seed=i))
                m.bias.copy_(rand(*m.bias.shape, seed=i + 1))
                m.running_mean.copy_(rand(*m.bias.shape, seed=i + 2))
                m.running_var.copy_(1 + rand(*m.bias.shape, seed=i + 3).abs())
    return module


# ---- the equation, in float64


def segformer_oracle(m, levels):
    size = levels[0].shape[2:]
    parts = []
    for linear, x in zip(m.linears, levels, strict=True):
        y = F.conv2d(x, linear.weight[..., None, None], linear.bias)
        parts.append(F.interpolate(y, size=size, mode="bilinear", align_corners=False))
    y = F.conv2d(torch.cat(parts[::-1], 1), m.linear_fuse.conv.weight)
    return m.classifier(F.relu(m.linear_fuse.norm(y)))


def uper_oracle(m, levels):
    def conv(layer, x):
        return F.relu(layer.norm(F.conv2d(x, layer.conv.weight, padding=layer.conv.padding)))

    def up(x, like):
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)

    last = levels[-1]
    pooled = [
        up(conv(layer, F.adaptive_avg_pool2d(last, cells)), last)
        for cells, layer in zip(m.context.cells, m.context.pooled, strict=True)
    ]
    top = conv(m.context.fuse, torch.cat([last, *pooled], 1))
    laterals = [conv(layer, x) for layer, x in zip(m.pyramid.laterals, levels, strict=False)] + [top]
    for i in range(len(laterals) - 1, 0, -1):
        laterals[i - 1] = laterals[i - 1] + up(laterals[i], laterals[i - 1])
    outs = [conv(layer, x) for layer, x in zip(m.pyramid.convs, laterals, strict=False)] + [laterals[-1]]
    return m.classifier(conv(m.bottleneck, torch.cat([up(x, outs[0]) for x in outs], 1)))


@pytest.mark.parametrize(("kind", "oracle"), [("segformer", segformer_oracle), ("uper", uper_oracle)])
@pytest.mark.parametrize("training", [False, True])
def test_a_head_is_its_equation(kind, oracle, training):
    m = shaken(head(kind, drop=0.0)).double().train(training)
    levels = maps(dtype=torch.float64)
    torch.testing.assert_close(m(levels), oracle(m, levels))


def test_fused_maps_are_the_convolution_of_what_stands_side_by_side():
    m = shaken(FuseMaps([3, 4], 5, activation=nn.ReLU)).double()
    a, b = rand(2, 6, 4, 3).double(), rand(2, 3, 2, 4).double()
    for training in (False, True):
        m.train(training)
        wide = torch.cat([a, F.interpolate(b.permute(0, 3, 1, 2), (6, 4), mode="bilinear").permute(0, 2, 3, 1)], -1)
        expected = F.relu(m.norm(m.conv(wide.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        torch.testing.assert_close(m([a, b], (6, 4)), expected)
    m.eval()
    torch.testing.assert_close(m.deployed()([a, b], (6, 4)), m([a, b], (6, 4)))
    called = []
    expected = m([a, b], (6, 4))
    m.conv.register_forward_hook(lambda *_: called.append(1))  # somebody listens: sizes stay right
    torch.testing.assert_close(m([a, b], (6, 4)), expected)


def test_fpn_adds_its_levels():
    m = head("fpn", drop=0.0)
    levels = maps()
    y = m(levels)
    assert y.shape == (2, 5, 9, 12)
    alone = [x if i == 2 else torch.zeros_like(x) for i, x in enumerate(levels)]
    assert not torch.allclose(m(alone), m([torch.zeros_like(x) for x in levels]))  # the coarsest reaches the finest


# ---- the model


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("size", [(16, 16), (37, 22), (1, 1), (5, 61)])
def test_any_size(kind, size):
    m = segmenter(kind)
    y = m(rand(2, 3, *size))
    assert y.shape == (2, 5, *size) and y.isfinite().all()
    assert m.predict(rand(2, 3, *size)).shape == (2, *size)
    assert m.predict(rand(2, 3, *size), (7, 9)).shape == (2, 7, 9)


@pytest.mark.parametrize("kind", HEADS)
def test_pixels_that_do_not_exist_change_nothing(kind):
    m, x = segmenter(kind), rand(2, 3, 48, 40)
    valid = torch.zeros(2, 48, 40, dtype=torch.bool)
    valid[0, :32, :24] = valid[1] = True
    other = x.masked_fill(~valid[:, None], float("nan"))
    for training in (False, True):
        m.train(training)
        torch.manual_seed(0)
        a = m(other, valid)
        torch.manual_seed(0)
        torch.testing.assert_close(a, m(x, valid))


def test_loss_is_the_mean_over_labelled_pixels():
    m, x = segmenter(), rand(2, 3, 20, 24)
    target = torch.randint(5, (2, 20, 24), generator=torch.Generator().manual_seed(0))
    target[0, :7] = 255
    (name, term), *rest = m.loss(m(x), target).items()
    logits = m(x).permute(0, 2, 3, 1)[target != 255]
    torch.testing.assert_close(term, F.cross_entropy(logits, target[target != 255]))
    assert name == "cross_entropy" and not rest
    coarse = m.loss(m(x)[..., ::2, ::2], target.int())  # logits of another size
    assert coarse["cross_entropy"].isfinite()
    nothing = m.loss(m(x), torch.full_like(target, 255))["cross_entropy"]
    nothing.backward()
    assert nothing == 0 and all(p.grad is None or not p.grad.any() for p in m.parameters())


def test_it_learns_a_mask():
    m = segmenter("segformer").train()
    x = rand(4, 3, 32, 32)
    target = (F.avg_pool2d(x[:, :1], 5, 1, 2) > 0)[:, 0].long()
    optimizer = torch.optim.AdamW(m.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = sum(m.loss(m(x), target).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_a_new_number_of_classes():
    m = segmenter()
    m.head.reset(3)
    assert m(rand(1, 3, 16, 16)).shape == (1, 3, 16, 16) and m.num_classes == 3


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegFormerHead([], 8, 3), "in_dims"),
        (lambda: SegFormerHead([8, 0], 8, 3), r"in_dims\[1\]"),
        (lambda: SegFormerHead([8], 0, 3), "dim"),
        (lambda: SegFormerHead([8], 8, 0), "num_classes"),
        (lambda: SegFormerHead([8], 8, 3, drop=1.0), "drop"),
        (lambda: UPerHead([8], 8, 3, cells=(0,)), "cells"),
        (lambda: head()(maps()[:2]), r"maps must have \[8, 16, 24\] channels"),
        (lambda: head()(maps(dims=[8, 16, 25])), r"got \[8, 16, 25\]"),
        (lambda: Segmenter(segmenter().encoder, SegFormerHead([8, 16], 8, 3)), r"head reads maps of \[8, 16\]"),
        (lambda: segmenter()(rand(1, 3, 8, 8), torch.ones(1, 8, 7, dtype=torch.bool)), "valid"),
        (lambda: segmenter()(rand(1, 1, 8, 8)), "x must be images"),
        (lambda: segmenter().predict(rand(1, 3, 8, 8), (0, 8)), r"size\[0\]"),
        (lambda: segmenter().predict(rand(1, 3, 8, 8), (8,)), "a height and a width"),
        (lambda: segmenter().loss(rand(1, 5, 8, 8), torch.full((1, 8, 8), 5)), "class 5; possible: 0 to 4, and 255"),
        (lambda: segmenter().loss(rand(1, 5, 8, 8), torch.zeros(1, 8, 8)), "target must be whole numbers"),
        (lambda: segmenter().loss(rand(1, 5, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)), r"\(1, H, W\)"),
        (lambda: segmenter().loss(rand(5, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)), "prediction must be logits"),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


class OfSome(list):
    """As timm's: of all maps that there are, with answers for those that are given."""

    def get_dicts(self):
        return self[1:3]


def test_what_encoders_tell_of_their_maps():
    encoder = torch.nn.Identity()
    encoder.feature_info = OfSome({"num_chs": 8 * (i + 1), "reduction": 2**i} for i in range(4))
    told = map_info(encoder)
    assert told.channels() == [16, 24] and told.reduction() == [2, 4]
    assert Segmenter(encoder, SegFormerHead([16, 24], 8, num_classes=2)).reductions == [2, 4]
    encoder.feature_info = list(encoder.feature_info)  # plain dictionaries will do
    assert map_info(encoder).channels() == [8, 16, 24, 32]
    with pytest.raises(ValueError, match="trunk must have a feature_info of its maps.*got Identity"):
        map_info(torch.nn.Identity(), "trunk")
