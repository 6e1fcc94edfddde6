"""generalized-neighborhood-attention: what the card asks for, and bad input. (Simulator: tests/ops.)"""

import math

import pytest
import torch

import attnlib
from attnlib.ops.neighborhood import neighborhood_attention
from attnlib.ops.partition import window_attention


def make(slug="generalized-neighborhood-attention", **config):
    torch.manual_seed(0)
    return attnlib.create(slug, **{"dim": 8, "num_heads": 2, "kernel_size": 4, **config}).double()


def data(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def read(grid, *settings):
    """(N, N): what the tiled path reads."""
    n = math.prod(grid)
    zero, eye = torch.zeros(1, 1, n, 1), torch.eye(n)[None, None]
    return neighborhood_attention(zero, zero, eye, grid, *settings)[0, 0] > 0


@pytest.mark.parametrize("grid", [(13,), (6, 7), (4, 5, 6)])
def test_stride_one_is_neighborhood_attention(grid):
    x = data(2, *grid, 8)
    assert torch.equal(make(stride=1)(x), make("fused-neighborhood-attention")(x))


@pytest.mark.parametrize(("grid", "window"), [((12,), 4), ((8, 12), 4), ((6, 8), (3, 2)), ((4, 4, 6), (2, 4, 3))])
def test_stride_of_the_kernel_is_window_attention(grid, window):
    q, k, v = data(3, 2, 2, math.prod(grid), 4)
    ours = neighborhood_attention(q, k, v, grid, window, stride=window)
    torch.testing.assert_close(ours, window_attention(q, k, v, grid, window), atol=1e-12, rtol=0)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 5])
def test_every_query_sees_the_whole_kernel_for_every_stride(stride):
    assert (read((23,), 5, 1, stride).sum(-1) == 5).all()
    assert (read((9, 11), 5, 1, stride).sum(-1) == 25).all()
    assert (read((22,), 5, 3, stride).sum(-1) == 5).all()


def test_queries_of_a_group_share_their_window():
    for stride in (2, 3, 5):
        rows = read((20,), 5, 1, stride)
        assert all(torch.equal(rows[i], rows[i // stride * stride]) for i in range(20))


def test_stride_acts_inside_residue_classes():
    m, plain = make(stride=3, dilation=2), make(stride=3)
    x = data(1, 14, 8)
    parts = torch.empty_like(x)
    for i in range(2):
        parts[:, i::2] = plain(x[:, i::2])
    torch.testing.assert_close(m(x), parts, atol=1e-12, rtol=0)


def test_causal_window_ends_at_the_query_not_at_the_leader():
    rows = torch.stack([*read((16,), 6, 1, 4, True)])
    for i in range(16):
        leader = min(i // 4 * 4 + 3, 15)
        assert rows[i].nonzero()[:, 0].tolist() == list(range(max(0, leader - 5), i + 1))
    m = make(kernel_size=6, stride=4, causal=True)
    assert m.traits.patterns == {"causal-self"} and not m.traits.streaming
    assert make(kernel_size=6, stride=1, causal=True).traits.streaming


@pytest.mark.parametrize("tile", [None, 1, 3, 4, 8])
def test_tiles_of_any_size_equal_the_dense_mask(tile):
    q, k, v = data(3, 1, 2, 12, 10, 4).requires_grad_()
    settings = (None, (6, 4), (2, 1), (2, 4))
    spec = neighborhood_attention(q, k, v, *settings, backend="eager")
    fast = neighborhood_attention(q, k, v, *settings, tile=tile)
    torch.testing.assert_close(fast, spec, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(stride=5), "stride=5 on axis 0 must be between 1 and kernel_size=4"),
        (dict(stride=0), "stride=0"),
        (dict(stride=(1, 2), kernel_size=(4, 4, 4)), "axes"),
        (dict(stride=1.5), "stride must be an integer"),
    ],
)
def test_bad_settings_are_refused(config, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**config)


def test_kernel_times_dilation_beyond_the_grid_is_refused():
    with pytest.raises(ValueError, match="kernel_size=4 with dilation=2 spans 8 tokens"):
        make(stride=2, dilation=2, pad="refuse")(data(1, 8, 7, 8))


@pytest.mark.parametrize("settings", [(5, 1, 3, 4), (5, 1, 3, 1), (4, 3, 2, 11), (3, 7, 3, 20)], ids=str)
def test_a_causal_sequence_shorter_than_the_window_reads_all_before_it(settings):
    kernel, dilation, stride, n = settings
    m = attnlib.create(
        "gna", dim=8, num_heads=2, kernel_size=kernel, dilation=dilation, stride=stride, causal=True
    ).double()  # fmt: skip
    x, at = torch.randn(2, n, 8, dtype=torch.float64), torch.arange(n)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    back = at[:, None] - at
    out = attnlib.attention(q, k, v, mask=(back >= 0) & (back % dilation == 0))
    torch.testing.assert_close(m(x), m.proj(out.transpose(1, 2).flatten(2)))
