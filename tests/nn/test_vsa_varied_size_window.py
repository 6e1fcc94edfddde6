"""vsa-varied-size-window: an oracle, what the card asks for, any size, bad input."""

import pytest
import torch
from torch import nn

import attnlib
from attnlib.nn.partition.maxvit import PartitionAttention
from attnlib.nn.sampled.vsa_varied_size_window import VariedSizeWindowAttention
from attnlib.ops.sampled import sample_crossings


def make(zero=False, **settings):
    torch.manual_seed(0)
    m = VariedSizeWindowAttention(**{"dim": 8, "num_heads": 2, "window_size": 3, **settings})
    for name, p in m.named_parameters():
        if not (zero and name.startswith(("offsets", "scales"))):
            nn.init.normal_(p, std=0.4)
    return m.double()


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read_at(t, y, x):
    """(N, D) map by rows and columns; bilinear, zeros beyond the border, and how much of the map is there."""
    (height, width, _), out, share = t.shape, 0.0, 0.0
    top, left = int(torch.floor(y)), int(torch.floor(x))
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                weight = (1 - (y - i).abs()) * (1 - (x - j).abs())
                out, share = out + weight * t[i, j], share + weight
    return out + torch.zeros_like(t[0, 0]), float(torch.as_tensor(share).detach())


def oracle(m, x):
    """One query at a time."""
    batch, height, width, dim = x.shape
    h, w = m.window_size
    rows, columns = -(-height // h), -(-width // w)
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)) for t in m.qkv(x).chunk(3, -1))
    out = torch.zeros_like(q)
    for b in range(batch):
        for a in range(rows):
            for c in range(columns):
                inside = x[b, a * h : (a + 1) * h, c * w : (c + 1) * w].flatten(0, 1)
                seen = nn.functional.leaky_relu(inside.sum(0) / (h * w))
                move, stretch = (f(seen).view(-1, 2) for f in (m.offsets, m.scales))
                for head in range(m.num_heads):
                    keys, values, shares = [], [], []
                    for i in range(h):
                        for j in range(w):
                            y = a * h + i + (i - (h - 1) / 2) * stretch[head, 1]
                            y = y + move[head, 1] / max(1, height // h) * (rows * h - 1) / 2
                            z = c * w + j + (j - (w - 1) / 2) * stretch[head, 0]
                            z = z + move[head, 0] / max(1, width // w) * (columns * w - 1) / 2
                            key, share = read_at(k[b, :, :, head], y, z)
                            keys.append(key)
                            values.append(read_at(v[b, :, :, head], y, z)[0])
                            shares.append(share)
                    for i in range(min(h, height - a * h)):
                        for j in range(min(w, width - c * w)):
                            at = b, a * h + i, c * w + j, head
                            scores = (torch.stack(keys) * q[at]).sum(-1) * m.scale
                            if m.rel_bias is not None:
                                bias = [
                                    m.rel_bias[head, r - i + h - 1, s - j + w - 1] for r in range(h) for s in range(w)
                                ]
                                scores = scores + torch.stack(bias)
                            if m.border == "mask":
                                gone = torch.tensor(shares) <= 1e-4
                                scores = scores.masked_fill(gone, float("-inf"))
                                if gone.all():
                                    continue
                            out[at] = (scores.softmax(0)[:, None] * torch.stack(values)).sum(0)
    return m.proj(out.flatten(3))


@pytest.mark.parametrize("border", ["zeros", "mask"])
@pytest.mark.parametrize(
    ("settings", "grid"), [(dict(window_size=2), (4, 4)), (dict(window_size=(2, 3)), (5, 4)), (dict(), (2, 2))]
)
def test_it_equals_the_oracle(settings, grid, border):
    """Also on maps that windows do not divide, and on maps smaller than a window."""
    m, x = make(border=border, **settings), data(1, *grid, 8).requires_grad_()
    y, expected = m(x), oracle(m, x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)
    g, leaves = data(*y.shape, seed=2), [x, m.offsets.weight, m.scales.bias, m.rel_bias, m.qkv.weight]
    ours, theirs = (torch.autograd.grad(t, leaves, g) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


@pytest.mark.parametrize("grid", [(6, 9), (7, 5), (2, 4)])
def test_zero_regressors_are_windows_with_a_bias(grid):
    m, x = make(zero=True, border="mask"), data(2, *grid, 8)
    windows = PartitionAttention(8, 2, 3).double()
    windows.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith(("offsets", "scales"))})
    torch.testing.assert_close(m(x), windows(x), atol=1e-11, rtol=0)
    if grid == (6, 9):
        torch.testing.assert_close(make(zero=True)(x), windows(x), atol=1e-11, rtol=0)


def test_an_offset_of_one_window_reads_the_next_window():
    m, x = make(zero=True, window_size=3), data(1, 6, 12, 8)
    reach = (12 - 1) / (2 * (12 // 3))
    with torch.no_grad():
        m.offsets.bias.view(2, 2)[:, 0] = 3 / reach  # columns come first
    y, (q, k, v) = m(x), (t.unflatten(-1, (2, 4)) for t in m.qkv(x).chunk(3, -1))
    bias = attnlib.positions.dense_window_bias(m.rel_bias, (3, 3))
    for a in range(2):
        for c in range(3):
            own = (slice(None), slice(3 * a, 3 * a + 3), slice(3 * c, 3 * c + 3))
            other = (slice(None), slice(3 * a, 3 * a + 3), slice(3 * c + 3, 3 * c + 6))
            parts = (t.flatten(1, 2).transpose(1, 2) for t in (q[own], k[other], v[other]))
            qw, kw, vw = parts
            out = ((qw @ kw.mT) * m.scale + bias).softmax(-1) @ vw
            torch.testing.assert_close(y[own].flatten(1, 2), m.proj(out.transpose(1, 2).flatten(2)))


def test_keys_beyond_the_border_weigh_as_zeros_or_not_at_all():
    """All windows look far away: the mean of nothing, or nothing."""
    x = data(1, 6, 6, 8)
    for border in ("zeros", "mask"):
        m = make(zero=True, border=border)
        with torch.no_grad():
            m.offsets.bias.fill_(50.0)
        torch.testing.assert_close(m(x), m.proj.bias.expand_as(x))


def test_it_moves_with_the_image():
    """By whole windows, where neither border is in sight."""
    m, x = make(), data(1, 24, 24, 8)
    with torch.no_grad():
        for f in (m.offsets, m.scales):
            f.weight.mul_(0.05)
            f.bias.mul_(0.05)
    moved = m(x.roll((3, 3), (1, 2)))
    torch.testing.assert_close(moved[:, 6:-6, 6:-6], m(x).roll((3, 3), (1, 2))[:, 6:-6, 6:-6])


def test_tokens_that_do_not_exist_are_as_what_lies_beyond_the_border():
    m, x = make(zero=True), data(2, 6, 6, 8)
    valid = torch.zeros(2, 6, 6, dtype=torch.bool)
    valid[0, :4, :5] = valid[1] = True
    y = m(x.masked_fill(~valid.unsqueeze(-1), float("nan")), valid=valid)
    torch.testing.assert_close(y[:1, :4, :5], m(x[:1, :4, :5]))
    torch.testing.assert_close(y[1:], m(x[1:]))


def test_regressors_start_at_zero_or_as_the_authors():
    zero, theirs = VariedSizeWindowAttention(256, 8), VariedSizeWindowAttention(256, 8, zero_init=False)
    for f in (zero.offsets, zero.scales):
        assert not f.weight.any() and not f.bias.any()
    for f in (theirs.offsets, theirs.scales):  # uniform up to dim ** -0.5
        assert 0.9 / 16 < f.weight.abs().max() <= 1 / 16 and 0.5 / 16 < f.weight.std() < 0.65 / 16
    assert 0.018 < theirs.rel_bias.std() < 0.022


def test_crossings_are_samples_everywhere():
    """Against torch's kernel, with gradients."""
    value, at = data(2, 3, 20, 4).requires_grad_(), [data(2, 3, 5, n, seed=n).mul(3).requires_grad_() for n in (2, 3)]
    out = sample_crossings(value, (4, 5), at[0] + 1.5, at[1] + 2)
    y, x = torch.broadcast_tensors((at[0] + 1.5)[..., :, None], (at[1] + 2)[..., None, :])
    grid = torch.stack([2 * (x + 0.5) / 5 - 1, 2 * (y + 0.5) / 4 - 1], -1).flatten(0, 1).flatten(1, 3)[:, :, None]
    maps = value.mT.reshape(6, 4, 4, 5)
    expected = nn.functional.grid_sample(maps, grid, align_corners=False)[..., 0].mT.view(2, 3, 5, 6, 4)
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(t, [value, *at], g) for t in (out, expected)), strict=True):
        torch.testing.assert_close(a, b)
    square = sample_crossings(value[:, :, :16], (4, 4), at[0], at[0])
    torch.testing.assert_close(square, sample_crossings(value[:, :, :16], (4, 4), at[0], torch.cat([at[0]] * 2, -1))
                               .unflatten(3, (2, 4))[:, :, :, :, :2].flatten(3, 4))  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(grid=(3, 5)), "grid="),
        (dict(rows=torch.zeros(1, 1, 2)), "rows"),
        (dict(rows=torch.zeros(1, 1, 3, 2)), "rows and columns"),
        (dict(valid=torch.ones(1, 4, dtype=torch.bool)), "valid"),
    ],
)
def test_crossings_refuse_what_does_not_fit(call, message):
    given = dict(grid=(4, 4), rows=torch.zeros(1, 1, 2, 2), columns=torch.zeros(1, 1, 2, 3), valid=None) | call
    with pytest.raises(ValueError, match=message):
        sample_crossings(torch.zeros(1, 1, 16, 4), given["grid"], given["rows"], given["columns"], valid=given["valid"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(window_size=0), "window_size"),
        (dict(window_size=(2, 2, 2)), "window_size"),
        (dict(num_heads=3), "num_heads"),
        (dict(border="clamp"), "border='clamp' is not possible"),
        (dict(out_dim=9), "num_heads"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VariedSizeWindowAttention(**{"dim": 8, "num_heads": 2, **settings})
