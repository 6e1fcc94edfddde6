"""crossformer: groups against an oracle, what the card asks for, any size, bad input."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.nn.partition.crossformer import DynamicPositionBias, LongShortAttention


def make(kind="near", **settings):
    torch.manual_seed(0)
    m = LongShortAttention(**{"dim": 16, "num_heads": 2, "rel_hidden": 8, "group_size": 2, "kind": kind, **settings})
    for p in m.parameters():
        nn.init.normal_(p, std=0.4)
    return m.double()


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def bias_at(dpb, d):
    """The equation, for one displacement query minus key."""
    y = dpb.fc0(torch.as_tensor(d, dtype=torch.float64))
    y = dpb.fc1(dpb.norm1(y).relu())
    y = dpb.fc2(dpb.norm2(y).relu())
    return dpb.fc3(dpb.norm3(y).relu())


def oracle(m, x, group, interval):
    """One query at a time over the tokens of its group, in float64."""
    q, k, v = m.qkv(x).unflatten(-1, (3, m.num_heads, m.head_dim)).unbind(-3)
    _, height, width, _ = x.shape

    def group_of(i, j):
        block = group * interval
        return i // block, j // block, i % interval, j % interval

    out = torch.zeros_like(x)
    for i in range(height):
        for j in range(width):
            keys = [(a, b) for a in range(height) for b in range(width) if group_of(a, b) == group_of(i, j)]
            s = torch.stack(
                [
                    (q[:, i, j] * k[:, a, b]).sum(-1) * m.scale
                    + bias_at(m.rel_bias, ((i - a) // interval, (j - b) // interval))
                    for a, b in keys
                ]
            )
            w = s.softmax(0)
            out[:, i, j] = sum(w[n][..., None] * v[:, a, b] for n, (a, b) in enumerate(keys)).flatten(1)
    return m.proj(out)


@pytest.mark.parametrize(
    ("settings", "grid", "group", "interval"),
    [
        (dict(kind="near"), (4, 6), 2, 1),
        (dict(kind="near"), (5, 3), 2, 1),
        (dict(kind="far", interval=2), (4, 8), 2, 2),
        (dict(kind="far", interval=2), (5, 7), 2, 2),
        (dict(kind="far", interval=None), (6, 3), 2, 3),
        (dict(kind="far", interval=2, group_size=7), (3, 5), 3, 1),
        (dict(kind="near", group_size=7), (1, 4), 1, 1),
    ],
)
def test_groups_equal_the_oracle(settings, grid, group, interval):
    """Also on maps that groups do not divide, where what is added is nobody's key, and on maps smaller than a group."""
    m, x = make(**settings), data(2, *grid, 16).requires_grad_()
    expected = oracle(m, x, group, interval)
    y = m(x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)
    g = torch.randn_like(y)
    leaves = [x, m.rel_bias.fc0.weight, m.qkv.weight]
    ours, theirs = (torch.autograd.grad(t, leaves, g, allow_unused=True) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_far_groups_at_interval_one_are_near_groups():
    x = data(2, 6, 4, 16)
    torch.testing.assert_close(make("far", interval=1)(x), make("near", interval=5)(x), atol=0, rtol=0)


def test_far_groups_are_near_groups_of_the_map_with_tokens_left_out():
    near, far, x = make("near"), make("far", interval=3), data(2, 12, 6, 16)
    y = far(x)
    for i in range(3):
        for j in range(3):
            # a map of 4 x 2 tokens is no larger than a group of 2: near groups of 2 either way
            torch.testing.assert_close(y[:, i::3, j::3], near(x[:, i::3, j::3]), atol=1e-12, rtol=0)


def test_the_bias_of_a_displacement_is_the_same_in_groups_of_any_size():
    torch.manual_seed(0)
    dpb = DynamicPositionBias(3, 8)
    large, small, oblong = dpb((5, 5)), dpb((3, 3)), dpb((2, 4))
    torch.testing.assert_close(large[:, 2:7, 2:7], small)
    torch.testing.assert_close(large[:, 3:6, 1:8], oblong)
    assert DynamicPositionBias(3, 8, residual=True)((2, 2)).shape == (3, 3, 3)


@pytest.mark.parametrize("grid", [(7, 9), (3, 5), (2, 6)])
def test_deployed_it_has_a_table_for_every_map(grid):
    m = make("far", interval=2, group_size=3).eval()
    d, x = attnlib.deploy(m), data(1, *grid, 16)
    assert d.rel_bias is None and d.table.shape == (2, 5, 5)
    torch.testing.assert_close(d(x), m(x), atol=1e-12, rtol=0)


def test_padding_takes_part_only_where_it_is_asked_to():
    x = data(1, 5, 7, 16)
    assert not torch.allclose(make(pad="zeros")(x), make()(x))
    torch.testing.assert_close(make(pad="zeros")(x[:, :4, :6]), make()(x[:, :4, :6]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="long"), "kind='long' is not possible"),
        (dict(pad="refuse"), "pad='refuse' is not possible"),
        (dict(group_size=0), "group_size"),
        (dict(interval=0), "interval"),
        (dict(num_heads=3), "num_heads"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LongShortAttention(**{"dim": 16, "num_heads": 2, **settings})
