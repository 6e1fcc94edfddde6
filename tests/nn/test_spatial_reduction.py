"""Spatial-reduction attention: the equation, and the rows that the authors leave out."""

import pytest
import torch
import torch.nn.functional as F

from attnlib.nn.reduced.spatial_reduction import SpatialReductionAttention


def rand(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(**settings):
    torch.manual_seed(0)
    return SpatialReductionAttention(**{"dim": 8, "num_heads": 2, "sr_ratio": 2, **settings}).double().eval()


def oracle(m, x):
    batch, height, width, dim = x.shape
    source = x
    if m.sr is not None:
        source = m.norm(F.conv2d(x.permute(0, 3, 1, 2), m.sr.weight, m.sr.bias, m.sr_ratio).permute(0, 2, 3, 1))
    k, v = m.kv(source.flatten(1, 2)).view(batch, -1, 2, 2, dim // 2).permute(2, 0, 3, 1, 4)
    q = m.q(x.flatten(1, 2)).view(batch, -1, 2, dim // 2).transpose(1, 2)
    y = (q @ k.mT / (dim // 2) ** 0.5).softmax(-1) @ v
    return m.proj(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize(("ratio", "grid"), [(1, (4, 5)), (2, (6, 4)), (4, (8, 12))])
def test_it_is_the_equation(ratio, grid):
    m, x = make(sr_ratio=ratio), rand(2, *grid, 8)
    torch.testing.assert_close(m(x), oracle(m, x))


def test_the_last_rows_are_read_unless_as_the_authors():
    ours, theirs = make(sr_ratio=4), make(sr_ratio=4, compat="authors")
    x = rand(1, 10, 9, 8).requires_grad_()
    torch.testing.assert_close(theirs(x), oracle(theirs, x))  # whose convolution stops there, too
    torch.testing.assert_close(ours(x), oracle(ours, F.pad(x, (0, 0, 0, 3, 0, 2)))[:, :10, :9])
    for m, read in ((ours, True), (theirs, False)):
        grad = torch.autograd.grad(m(x)[0, 0, 0].sum(), x)[0]
        assert bool(grad[0, 9].any()) == read
    assert make(sr_ratio=4, compat="authors")(rand(1, 2, 3, 8)).isfinite().all()  # smaller than a cell


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(sr_ratio=0), "sr_ratio"), (dict(num_heads=3), "num_heads=3"), (dict(compat="pvt"), "compat")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
