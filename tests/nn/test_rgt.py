"""RGT's two attentions: to a map made small by recursion, and in rectangular windows."""

import math

import pytest
import torch
import torch.nn.functional as F

import attnlib
from attnlib.nn.partition.rgt import RectangularAttention
from attnlib.nn.reduced.rgt import RecursiveGeneralization, recursions_of


def data(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def recursive(**settings):
    torch.manual_seed(0)
    return RecursiveGeneralization(**{"dim": 12, "num_heads": 2, **settings}).double().eval()


def rectangles(**settings):
    torch.manual_seed(0)
    return RectangularAttention(**{"dim": 96, "num_heads": 4, "split_size": (2, 4), **settings}).double().eval()


def oracle(m, x, times):
    """The equation, channels first, one head at a time."""
    y = x.movedim(-1, 1)
    for _ in range(times):
        y = F.conv2d(y, m.reduce.weight, m.reduce.bias, stride=4, groups=m.dim)
    y = F.conv2d(y, m.local.weight, m.local.bias, padding=1, groups=m.dim)
    y = F.conv2d(y, m.narrow.conv.weight, m.narrow.conv.bias).movedim(1, -1)
    g = F.gelu(m.norm(y))
    v = m.v(g).movedim(-1, 1)
    v = v + F.conv2d(v, m.position.conv.weight, m.position.conv.bias, padding=1, groups=m.dim)
    q, k, v = m.q(x).flatten(1, 2), m.k(g).flatten(1, 2), v.flatten(2).mT
    h = m.num_heads
    heads = []
    for a, b, c in zip(*(t.chunk(h, -1) for t in (q, k, v)), strict=True):
        heads.append((a @ b.mT * (k.shape[-1] / h) ** -0.5).softmax(-1) @ c)
    return m.proj(torch.cat(heads, -1)).view(x.shape)


@pytest.mark.parametrize(
    ("settings", "grid", "times"),
    [(dict(), (16, 32), 2), (dict(recursions=1, c_ratio=1.0), (8, 12), 1), (dict(recursions=0), (3, 5), 0)],
)
def test_the_equation(settings, grid, times):
    m, x = recursive(**settings), data(2, *grid, 12).requires_grad_()
    y, expected = m(x), oracle(m, x, times)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    g = data(*y.shape, seed=2)
    leaves = [x, m.reduce.weight, m.position.conv.weight]
    mine, theirs = (torch.autograd.grad(t, leaves, g, allow_unused=True) for t in (y, expected))
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_how_often_the_authors_apply_it():
    """Their rounded logarithms, and 16 keys on 64 x 64 both in training and after it."""
    for height in (4, 15, 16, 17, 63, 64, 255, 256, 300, 1024, 4096):
        for width in (16, 64, 100, 1023):
            train = max(int(math.log(height // 4, 4)), int(math.log(width // 4, 4)))
            assert recursions_of((height, width), True) == train
            if min(height, width) >= 16:
                test = max(2, int(math.log(height // 16, 4)), int(math.log(width // 16, 4)))
                assert recursions_of((height, width), False) == test
    m = recursive()
    for training in (True, False):
        small, _ = m.train(training)._small(data(1, 64, 64, 12), None)
        assert small.shape == (1, 4, 4, 12)


def test_the_same_weights_go_deeper_on_larger_maps():
    m = recursive()
    keys = {side: m._small(torch.zeros(1, side, 16, 12).double(), None)[0].shape[1] for side in (64, 256, 1024)}
    assert keys == {64: 4, 256: 16, 1024: 16}
    assert m(data(1, 1024, 16, 12)).isfinite().all()


def test_without_recursions_it_is_attention_to_every_token():
    """With keys of full width, whose convolutions, norm and activation are taken away: plain softmax attention."""
    m = recursive(c_ratio=1.0, recursions=0)
    m.local, m.narrow, m.norm = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
    with torch.no_grad():
        m.position.conv.weight.zero_()
        m.position.conv.bias.zero_()
    x = data(1, 3, 5, 12)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (2, 6)).transpose(1, 2) for t in (m.q(x), m.k(F.gelu(x)), m.v(F.gelu(x))))
    plain = attnlib.attention(q, k, v, backend="eager").transpose(1, 2).reshape(1, 3, 5, 12)
    torch.testing.assert_close(m(x), m.proj(plain))


@pytest.mark.parametrize("grid", [(5, 9), (17, 16), (2, 3)])
def test_cells_that_the_map_does_not_fill(grid):
    """By default what is missing is zeros, so that every pixel is read; the authors leave such cells out."""
    m = recursive(recursions=1)
    x = data(1, *grid, 12).requires_grad_()
    (seen,) = torch.autograd.grad(m._small(x, None)[0].sum(), x)
    assert (seen != 0).all()
    full = F.pad(x, (0, 0, 0, -grid[1] % 4, 0, -grid[0] % 4))
    torch.testing.assert_close(m(x), m(full)[:, : grid[0], : grid[1]])
    theirs = recursive(recursions=1, compat="authors")
    small, _ = theirs._small(x, None)
    assert small.shape[1:3] == tuple(max(1, n // 4) for n in grid)
    if min(grid) >= 4:
        (seen,) = torch.autograd.grad(small.sum(), x)
        assert not seen[:, grid[0] // 4 * 4 :].any() and not seen[:, :, grid[1] // 4 * 4 :].any()


def test_rectangles_one_query_at_a_time():
    m, grid = rectangles(shift=True), (8, 4)
    x = data(1, *grid, 96)
    q, k, v = (t.unflatten(-1, (4, 24)) for t in m.qkv(x).chunk(3, -1))
    out = torch.zeros_like(q)
    for half, (a, b) in enumerate(((2, 4), (4, 2))):
        table = m.rel_bias[half]((a, b))
        heads = slice(2 * half, 2 * half + 2)
        s, t = a // 2, b // 2

        def window(i, j, a=a, b=b, s=s, t=t):  # of a window that is shifted, and which end of the map it is
            y, z = (i - s) % grid[0], (j - t) % grid[1]
            return y // a, z // b, i < s, j < t

        for i in range(grid[0]):
            for j in range(grid[1]):
                keys = [(y, z) for y in range(grid[0]) for z in range(grid[1]) if window(y, z) == window(i, j)]
                scores = torch.stack(
                    [
                        (q[0, i, j, heads] * k[0, y, z, heads]).sum(-1) * 24**-0.5
                        + table[:, y - i + a - 1, z - j + b - 1]
                        for y, z in keys
                    ]
                )
                weights = scores.softmax(0)[..., None]
                out[0, i, j, heads] = (weights * torch.stack([v[0, y, z, heads] for y, z in keys])).sum(0)
    around = F.conv2d(v.flatten(-2).movedim(-1, 1), m.local.weight, m.local.bias, padding=1, groups=96).movedim(1, -1)
    torch.testing.assert_close(m(x), m.proj(out.flatten(-2) + around), atol=1e-12, rtol=0)


def test_windows_as_large_as_the_map_are_dense_attention_in_each_half():
    m, x = rectangles(split_size=(4, 4)), data(1, 4, 4, 96)
    with torch.no_grad():
        for bias in m.rel_bias:
            bias.fc3.weight.zero_()
            bias.fc3.bias.zero_()
    q, k, v = (t.flatten(1, 2).unflatten(-1, (4, 24)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    dense = attnlib.attention(q, k, v, backend="eager").transpose(1, 2).reshape(1, 4, 4, 96)
    around = m.local(m.qkv(x)[..., 192:])
    torch.testing.assert_close(m(x), m.proj(dense + around))


def test_what_fills_the_map_up():
    m, x = rectangles(), data(1, 3, 5, 96)
    full = F.pad(x, (0, 0, 0, 3, 0, 1))
    valid = torch.zeros(1, 4, 8, dtype=torch.bool)
    valid[:, :3, :5] = True
    torch.testing.assert_close(m(x), m(full, valid=valid)[:, :3, :5])
    assert not torch.allclose(rectangles(compat="authors")(x), m(x))
    even = data(1, 4, 8, 96)
    torch.testing.assert_close(rectangles(compat="authors")(even), m(even))


def test_deployed_rectangles_have_their_biases_laid_out():
    m, x = rectangles(), data(1, 6, 7, 96)
    d = attnlib.deploy(m)
    assert d.rel_bias is None and d.table.shape == (2, 2, 8, 8)
    torch.testing.assert_close(d(x), m(x))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (recursive, dict(c_ratio=1.5), "c_ratio"),
        (recursive, dict(c_ratio=0.25), "c_ratio=0.25 makes keys of 3 channels"),
        (recursive, dict(recursions=-1), "recursions"),
        (recursive, dict(num_heads=5), "num_heads"),
        (recursive, dict(compat="theirs"), "compat="),
        (rectangles, dict(split_size=(2, 4, 8)), "split_size="),
        (rectangles, dict(split_size=(0, 4)), "split_size"),
        (rectangles, dict(num_heads=3), "halves"),
        (rectangles, dict(compat="theirs"), "compat="),
    ],
)
def test_bad_settings(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
