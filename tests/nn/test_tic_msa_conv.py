"""tic-msa-conv: against keys that are unfolded, what the card asks for, any size, bad input."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import attnlib
from attnlib.nn.local.tic_msa_conv import MSAConv, MSAConvDownsampling


def make(cls=MSAConv, **settings):
    torch.manual_seed(0)
    m = cls(**{"dim": 8, "num_heads": 2, **settings})
    for p in m.parameters():
        nn.init.normal_(p, std=0.4)
    return m.double()


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(m, x, qkv=None):
    """Keys and values unfolded as a convolution unfolds its input, as the authors validate their kernel."""
    batch, height, width, _ = x.shape
    (h, w), (r, s) = m.kernel_size, m.dilation
    q, k, v = (m.qkv(x) if qkv is None else qkv).permute(0, 3, 1, 2).chunk(3, 1)

    def unfolded(t):
        taps = F.unfold(t, (h, w), (r, s), (r * (h // 2), s * (w // 2)))
        return taps.view(batch, m.num_heads, -1, h * w, height * width)

    q = q.reshape(batch, m.num_heads, -1, 1, height * width)
    weights = ((q * unfolded(k)).sum(2) * m.scale).softmax(2)
    out = (weights.unsqueeze(2) * unfolded(v)).sum(3).reshape(batch, -1, height, width)
    if m.conv is not None:
        out = F.conv2d(out + x.permute(0, 3, 1, 2), m.conv.weight, m.conv.bias, padding=(h // 2, w // 2)).relu()
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("grid", [(6, 7), (2, 3), (1, 5)])
@pytest.mark.parametrize(
    "settings",
    [
        dict(num_heads=1),
        dict(kernel_size=5),
        dict(dilation=3, conv_bias=True),
        dict(kernel_size=(1, 3), dilation=(2, 1)),
    ],
)
def test_it_equals_attention_to_unfolded_keys(settings, grid):
    """Also with kernels larger than the map."""
    m, x = make(**settings), data(2, *grid, 8).requires_grad_()
    y, expected = m(x), oracle(m, x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)
    g, leaves = data(*y.shape, seed=2), [x, *m.parameters()]
    ours, theirs = (torch.autograd.grad(t, leaves, g) for t in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_a_kernel_of_one_gives_the_value():
    m, x = make(kernel_size=1, conv=False), data(1, 3, 4, 8)
    torch.testing.assert_close(m(x), m.qkv(x).chunk(3, -1)[2])


def test_a_kernel_over_the_whole_map_is_full_attention():
    m, x = make(kernel_size=9, conv=False, border="mask"), data(2, 4, 5, 8)
    q, k, v = (t.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for t in m.qkv(x).chunk(3, -1))
    out = ((q @ k.mT) * m.scale).softmax(-1) @ v
    torch.testing.assert_close(m(x), out.transpose(1, 2).reshape(x.shape))


def test_keys_of_zeros_take_part_at_the_border_alone():
    zeros, mask, x = make(conv=False), make(conv=False, border="mask"), data(1, 6, 6, 8)
    a, b = zeros(x), mask(x)
    torch.testing.assert_close(a[:, 1:-1, 1:-1], b[:, 1:-1, 1:-1])
    assert not torch.isclose(a[:, 0], b[:, 0]).any(-1).all()


def test_it_moves_with_the_image_and_parts_of_it_are_parts_of_the_answer():
    m, x = make(kernel_size=3, dilation=2), data(1, 16, 16, 8)
    y, out = m(x), 4  # one step of attention, one of the convolution
    torch.testing.assert_close(m(x.roll((1, 3), (1, 2)))[:, 6:-6, 6:-6], y.roll((1, 3), (1, 2))[:, 6:-6, 6:-6])
    torch.testing.assert_close(m(x[:, 2:, 3:])[:, out:-out, out:-out], y[:, 2:, 3:][:, out:-out, out:-out])


@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_a_padded_image_is_that_image(border):
    m, x = make(border=border), data(2, 6, 7, 8)
    valid = torch.zeros(2, 6, 7, dtype=torch.bool)
    valid[0, :4, :5] = valid[1] = True
    hidden = x.masked_fill(~valid.unsqueeze(-1), float("nan"))
    y = m(hidden, valid=valid)
    torch.testing.assert_close(y[:1, :4, :5], m(x[:1, :4, :5]))
    torch.testing.assert_close(y[1:], m(x[1:]))
    down = make(MSAConvDownsampling, out_dim=6, border=border)
    small, exists = down(hidden, valid)
    assert small.shape == (2, 3, 4, 6) and exists[0].sum() == 6 and exists[1].all()
    torch.testing.assert_close(small[:1, :2, :3], down(x[:1, :4, :5])[0])


def test_with_a_stride_it_is_every_second_token():
    m, down, x = make(out_dim=6), make(MSAConvDownsampling, out_dim=6), data(2, 5, 8, 8)
    down.inner.load_state_dict(m.state_dict())
    torch.testing.assert_close(down(x)[0], m(x)[:, ::2, ::2])


def test_gradients_are_right():
    m = make(num_heads=1, conv=False)
    assert torch.autograd.gradcheck(m, data(1, 3, 3, 8).requires_grad_())


def test_the_authors_weights_load():
    theirs = nn.ModuleDict({"qkv_conv": nn.Conv2d(8, 24, 1), "mlp": nn.Conv2d(8, 8, 3, padding=1, bias=False)}).double()
    m, x = make(num_heads=1), data(1, 4, 5, 8)
    m.load_state_dict(attnlib.convert_state_dict("tic-msa-conv", theirs.state_dict()))
    qkv = theirs["qkv_conv"](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), oracle(m, x, qkv))
    with pytest.raises(ValueError, match="mine"):
        MSAConv.convert_state_dict({**theirs.state_dict(), "mine": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kernel_size=4), "kernel_size=4 is not possible; choose odd"),
        (dict(kernel_size=0), "kernel_size"),
        (dict(dilation=0), "dilation"),
        (dict(num_heads=3), "num_heads"),
        (dict(border="clamp"), "border='clamp' is not possible"),
        (dict(conv=False, out_dim=4), "out_dim"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MSAConv(**{"dim": 8, "num_heads": 2, **settings})


@pytest.mark.parametrize(("shift", "steps"), [(2, (2, 2)), (0.5, (3, 3)), (9, (9, 9))])
@pytest.mark.parametrize("border", ["zeros", "mask"])
def test_shifted_heads_read_the_rolled_map(shift, steps, border):
    """A quarter of the heads reads the map as it is, the others rolled by rows, by columns and by both."""
    m, x = make(num_heads=4, shift=shift, conv=False, border=border), data(2, 6, 7, 8)
    valid = torch.ones(2, 6, 7, dtype=torch.bool)
    valid[:, 4:] = valid[1, :, 5:] = False
    for exists in (None, valid):
        y = m(x, valid=exists)
        shown = torch.ones_like(valid) if exists is None else exists
        for group, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            by = (-down * steps[0], -right * steps[1])
            given = x if exists is None else x * exists.unsqueeze(-1)
            q = m.qkv(given)[..., :8]
            expected = _reads(q, m, given.roll(by, (1, 2)), None if exists is None else exists.roll(by, (1, 2)))
            own = slice(2 * group, 2 * group + 2)
            torch.testing.assert_close(y[..., own][shown], expected[..., own][shown], atol=1e-12, rtol=0)


def _reads(q, m, source, valid):
    """Dense attention of queries (B, H, W, 8) to a map of keys, head by head, over the nine tokens around each."""
    batch, height, width, _ = source.shape
    k, v = (t.clone() for t in m.qkv(source)[..., 8:].chunk(2, -1))
    if valid is not None:
        k, v = k * valid.unsqueeze(-1), v * valid.unsqueeze(-1)
    out = torch.zeros_like(q)
    for i in range(height):
        for j in range(width):
            scores, values = [], []
            for a in (i - 1, i, i + 1):
                for b in (j - 1, j, j + 1):
                    inside = 0 <= a < height and 0 <= b < width
                    key = k[:, a, b] if inside else torch.zeros_like(k[:, 0, 0])
                    s = (q[:, i, j] * key).view(batch, 4, 2).sum(-1) * m.scale
                    if m.border == "mask":
                        absent = torch.ones(batch, dtype=torch.bool) if not inside else torch.zeros(batch).bool()
                        if inside and valid is not None:
                            absent = ~valid[:, a, b]
                        s = s.masked_fill(absent[:, None], float("-inf"))
                    scores.append(s)
                    values.append((v[:, a, b] if inside else torch.zeros_like(key)).view(batch, 4, 2))
            weights = torch.stack(scores, -1).softmax(-1).nan_to_num(0.0)
            out[:, i, j] = (weights.unsqueeze(-1) * torch.stack(values, 2)).sum(2).flatten(1)
    return out


def test_bad_shifts_are_refused():
    with pytest.raises(ValueError, match="shift"):
        MSAConv(8, 4, shift=-1)
    with pytest.raises(ValueError, match="shift"):
        MSAConv(8, 4, shift=1.5)
    with pytest.raises(ValueError, match="directions of the shift"):
        MSAConv(8, 2, shift=1)
