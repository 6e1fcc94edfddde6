"""TiC: blocks as the released operator, shifts and pooling as read here, any size, other mechanisms, bad input."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.models.backbones.tic import NearMeans
from attnlib.nn.local.tic_msa_conv import MSAConv, MSAConvDownsampling

TINY = dict(embed_dims=(8, 12), depths=(2, 3), num_heads=(4, 4), img_size=32, num_classes=5)


def tiny(**settings):
    torch.manual_seed(0)
    return attnlib.create_model("tic_tiny", **{**TINY, **settings}).double().eval()


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_bare_blocks_are_the_released_operator():
    m = tiny(norm=False, shift=0, inter_pool=0, num_heads=(1, 1))
    x, _ = m.stem(images(2, 3, 36, 28).permute(0, 2, 3, 1))
    y = x
    for stage in m.stages:
        for block in stage.blocks:
            dim, out = block.mixer.dim, block.conv.conv.out_channels
            whole = MSAConv(dim, 1) if block.stride == 1 else MSAConvDownsampling(dim, out)
            inner = getattr(whole, "inner", whole)
            inner.load_state_dict({**block.mixer.state_dict(), "conv.weight": block.conv.conv.weight.detach()})
            y = whole.double()(y)
            y = y if isinstance(y, torch.Tensor) else y[0]
        x, _ = stage(x)
        torch.testing.assert_close(x, y)


def test_parameters_follow_from_widths():
    m = attnlib.create_model("tic_small")
    dims, depths = (64, 128, 256, 512), (2, 2, 6, 2)
    count = 4 * 4 * 3 * 64 + 3 * 64 + 512 * 1000 + 1000
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        for block in range(depth):
            wide = dims[i - 1] if i and not block else dim
            count += 3 * wide * (wide + 1) + 9 * wide * dim + 2 * dim
    assert sum(p.numel() for p in m.parameters()) == count


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 4)])
def test_any_size_and_maps_of_features(size):
    m = tiny(features_only=True)
    a, b = m(images(1, 3, *size))
    assert a.shape == (1, 8, -(-size[0] // 4), -(-size[1] // 4))
    assert b.shape == (1, 12, -(-a.shape[2] // 2), -(-a.shape[3] // 2))


def test_shifts_reach_across_the_map():
    x = images(1, 3, 64, 64)

    def reached(**settings):
        m = tiny(depths=(1, 1), inter_pool=0, norm=False, **settings)
        leaf = x.clone().requires_grad_()
        tokens, _ = m.stem(leaf.permute(0, 2, 3, 1))
        m.stages[0].blocks[0](tokens)[0][0, 1, 1].sum().backward()
        return leaf.grad[0, :, 32:, 32:].abs().sum() > 0

    assert reached(shift=0.5) and not reached(shift=0)


def test_means_count_tokens_that_exist():
    x = images(2, 5, 4, 3)
    valid = torch.ones(2, 5, 4, dtype=torch.bool)
    valid[0, 3:] = valid[1, :, 2:] = False
    y = NearMeans(3)(x, valid)
    for b in range(2):
        for i, j in ((0, 0), (2, 1), (1, 3)):
            near = [
                x[b, a, c] for a in range(max(0, i - 1), min(5, i + 2)) for c in range(max(0, j - 1), min(4, j + 2))
                if valid[b, a, c]
            ]  # fmt: skip
            expected = torch.stack(near).mean(0) if near else torch.zeros(3).double()
            torch.testing.assert_close(y[b, i, j], expected)


def test_padding_changes_nothing_without_shifts():
    m = tiny(shift=0, border="mask")
    x = images(1, 3, 32, 24)
    padded = torch.full((1, 3, 40, 32), 7.0, dtype=torch.float64)
    padded[..., :32, :24] = x
    valid = torch.zeros(1, 40, 32, dtype=torch.bool)
    valid[:, :32, :24] = True
    torch.testing.assert_close(m(padded, valid), m(x))


def test_pools_stand_between_blocks():
    m = tiny(depths=(2, 5), pool_every=2)
    assert [[b.pool is not None for b in s.blocks] for s in m.stages] == [
        [False, False],
        [False, False, True, False, True],
    ]


def test_folded_and_other_mechanisms():
    m, x = tiny(), images(1, 3, 32, 32)
    for module in m.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    torch.testing.assert_close(attnlib.deploy(m)(x), m(x), atol=1e-10, rtol=1e-8)
    assert tiny(mechanism="dinat")(x).shape == (1, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inter_pool": 2}, "inter_pool=2"),
        ({"pool_every": 0}, "pool_every"),
        ({"num_heads": (2, 4)}, "directions of the shift"),
        ({"depths": (1,)}, "depths"),
        ({"kernel_size": 4}, "kernel_size"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
