"""Convolutions of voxels against dense ones on the same places, and windows as segments."""

import pytest
import torch
import torch.nn.functional as F

from attnlib.ops.voxels import conv_sites, numbers, sparse_conv, sparse_depthwise, window_segments

SHAPE = (5, 6, 4)


def scene(count=40, width=4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    at = torch.randperm(2 * 5 * 6 * 4, generator=gen)[:count]
    coords = torch.stack([at // 120, at // 24 % 5, at // 4 % 6, at % 4], 1)
    return torch.randn(count, width, generator=gen, dtype=torch.float64, requires_grad=True), coords


def dense(x, coords):
    out = x.new_zeros(2, *SHAPE, x.shape[1]).index_put(tuple(coords.T), x)
    return out.movedim(-1, 1)


@pytest.mark.parametrize("kernel", [3, (1, 1, 5), (3, 1, 1), 1])
def test_a_submanifold_convolution_is_a_dense_one_read_at_the_voxels(kernel):
    x, coords = scene()
    sites = conv_sites(coords, SHAPE, kernel)
    sides = (kernel,) * 3 if isinstance(kernel, int) else kernel
    weight = torch.randn(sites.table.shape[1], 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64)
    as_conv = weight.permute(2, 1, 0).reshape(3, 4, *sides)
    want = F.conv3d(dense(x, coords), as_conv, bias, padding=[k // 2 for k in sides]).movedim(1, -1)
    got = sparse_conv(x, weight, sites.table, bias)
    want = want[tuple(coords.T)]
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), (x, weight)) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), ((3, 1, 1), (2, 1, 1), 0), (2, 2, 0), (3, 1, 1)])
def test_a_strided_convolution_has_outputs_where_some_voxel_reaches(kernel, stride, padding):
    x, coords = scene(12)
    sites = conv_sites(coords, SHAPE, kernel, stride, padding)
    sides = (kernel,) * 3 if isinstance(kernel, int) else kernel
    weight = torch.randn(sites.table.shape[1], 4, 3, dtype=torch.float64)
    out = F.conv3d(dense(x, coords), weight.permute(2, 1, 0).reshape(3, 4, *sides), None, stride, padding)
    there = F.conv3d(dense(torch.ones_like(x[:, :1]), coords), torch.ones(1, 1, *sides).double(), None, stride, padding)
    assert sites.shape == tuple(out.shape[2:])
    want = there[:, 0].round().nonzero()
    assert torch.equal(sites.coords, want)
    got = sparse_conv(x, weight, sites.table)
    torch.testing.assert_close(got, out.movedim(1, -1)[tuple(want.T)])


def test_a_depthwise_convolution():
    x, coords = scene()
    table = conv_sites(coords, SHAPE, 3).table
    weight = torch.randn(27, 4, dtype=torch.float64)
    want = F.conv3d(dense(x, coords), weight.T.reshape(4, 1, 3, 3, 3), padding=1, groups=4).movedim(1, -1)
    torch.testing.assert_close(sparse_depthwise(x, weight, table), want[tuple(coords.T)])


def test_windows_as_segments():
    _, coords = scene()
    order, cu = window_segments(coords, SHAPE, (3, 2))
    assert sorted(order.tolist()) == list(range(40)) and cu[0] == 0 and cu[-1] == 40
    held = [set(map(tuple, coords[order[a:b]][:, [0, 2, 3]].tolist())) for a, b in zip(cu[:-1], cu[1:], strict=True)]
    cells = [{(b, y // 3, x // 2) for b, y, x in part} for part in held]
    assert all(len(c) == 1 for c in cells) and len({next(iter(c)) for c in cells}) == len(cells)


def test_no_voxels_are_none():
    none = torch.zeros(0, 4, dtype=torch.long)
    for sites in (conv_sites(none, SHAPE, 3), conv_sites(none, SHAPE, 3, 2, 1)):
        assert sites.table.shape == (0, 27)
        assert sparse_conv(torch.zeros(0, 4), torch.zeros(27, 4, 3), sites.table).shape == (0, 3)
    order, cu = window_segments(none, SHAPE, 2)
    assert order.shape == (0,) and cu.tolist() == [0]


def test_numbers_are_in_row_major_order():
    assert numbers(torch.tensor([[0, 0, 1], [1, 0, 0], [1, 2, 3]]), (3, 4)).tolist() == [1, 12, 23]


def _conv(c, shift, bias=None):
    table = conv_sites(c, SHAPE, 3).table + shift * 1000
    return sparse_conv(torch.zeros(len(c), 4), torch.zeros(27, 4, 3), table, bias)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: conv_sites(c + 4, SHAPE, 3), ValueError, "coords must lie in samples"),
        (lambda c: conv_sites(torch.cat([c, c[:1]]), SHAPE, 3), ValueError, "holds a voxel twice"),
        (lambda c: conv_sites(c, SHAPE[:2], 3), ValueError, r"coords must be \(N, 3\)"),
        (lambda c: conv_sites(c, SHAPE, 2), ValueError, "must be odd"),
        (lambda c: conv_sites(c, SHAPE, 9, 1, 0), ValueError, "larger than the grid"),
        (lambda c: conv_sites(c.float(), SHAPE, 3), TypeError, "coords must be an integer tensor"),
        (lambda c: window_segments(c, SHAPE, 0), ValueError, "window_size"),
        (
            lambda c: sparse_conv(torch.zeros(40, 4), torch.zeros(8, 4, 3), conv_sites(c, SHAPE, 3).table),
            ValueError, r"weight must be \(K, C, C'\) with K=27",
        ),
        (lambda c: _conv(c, -1), ValueError, "table points at voxel -"),
        (lambda c: _conv(c, 1), ValueError, "table points at voxel"),
        (lambda c: _conv(c, 0, torch.zeros(2)), ValueError, r"bias must be \(C',\)=\(3,\)"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(scene()[1])


def test_types_are_one_or_autocast_makes_them_one():
    x, c, *_ = scene()
    table, weight = conv_sites(c, SHAPE, 3).table, torch.randn(27, x.shape[1], 3)
    with pytest.raises(TypeError, match="x and weight must share one floating dtype"):
        sparse_conv(x.bfloat16(), weight, table)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_conv(x.bfloat16(), weight, table)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), sparse_conv(x.float(), weight, table), atol=0.3, rtol=0.05)
