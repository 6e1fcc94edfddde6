"""Deformable convolution: held to a loop over places, taps and corners in float64, and to torch's convolution."""

import math

import pytest
import torch
import torch.nn.functional as F

from attnlib.nn.sampled.deformable_conv import DeformableConv, DeformableMerging
from attnlib.ops.deformable_conv import deformable_conv2d

F64 = torch.float64


def pixel(image, y, x):
    """Bilinear sample of (H, W, C) at a place in pixels; zeros beyond the border."""
    out = torch.zeros(image.shape[2], dtype=image.dtype)
    low_y, low_x = math.floor(y.item()), math.floor(x.item())
    for i in (low_y, low_y + 1):
        for j in (low_x, low_x + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                out = out + (1 - (y - i).abs()) * (1 - (x - j).abs()) * image[i, j]
    return out


def oracle(x, offset, weight, bias, stride, padding, dilation, groups, modulation):
    (batch, rows, columns, _), (kh, kw) = offset.shape, weight.shape[2:]
    parts = offset.shape[3] // (2 * kh * kw)
    own, share = x.shape[3] // parts, weight.shape[0] // groups
    out = []
    for b in range(batch):
        for r in range(rows):
            for c in range(columns):
                y = [torch.zeros((), dtype=x.dtype)] * weight.shape[0] if bias is None else list(bias)
                moves = offset[b, r, c].view(parts, kh, kw, 2)
                for i in range(kh):
                    for j in range(kw):
                        read = []
                        for g in range(parts):
                            dy, dx = moves[g, i, j]
                            at = (r * stride - padding + i * dilation + dy, c * stride - padding + j * dilation + dx)
                            got = pixel(x[b][..., g * own : (g + 1) * own], *at)
                            if modulation is not None:
                                got = got * modulation[b, r, c].view(parts, kh, kw)[g, i, j]
                            read.append(got)
                        read = torch.cat(read)
                        width = len(read) // groups
                        for o in range(weight.shape[0]):
                            g = o // share
                            y[o] = y[o] + weight[o, :, i, j] @ read[g * width : (g + 1) * width]
                out.append(torch.stack(y))
    return torch.stack(out).view(batch, rows, columns, -1)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation", "groups", "parts", "modulated", "biased"),
    [
        ((4, 6), 2, 2, 0, 1, 1, 1, False, True),  # as patches are merged
        ((5, 3), 2, 2, 0, 1, 1, 2, False, True),
        ((4, 3), 3, 1, 1, 1, 2, 1, True, True),
        ((4, 4), 3, 2, 2, 2, 2, 2, True, False),
    ],
)
def test_output_and_gradients_equal_a_loop(size, kernel, stride, padding, dilation, groups, parts, modulated, biased):
    torch.manual_seed(0)
    out = [-(-n // stride) for n in size]
    x = torch.randn(2, *size, 4, dtype=F64)
    offset = 2 * torch.randn(2, *out, parts * kernel**2 * 2, dtype=F64)
    weight = torch.randn(6, 4 // groups, kernel, kernel, dtype=F64)
    bias = torch.randn(6, dtype=F64) if biased else None
    modulation = torch.rand(2, *out, parts * kernel**2, dtype=F64) if modulated else None
    given = [t for t in (x, offset, weight, bias, modulation) if t is not None]
    for t in given:
        t.requires_grad_()
    options = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, modulation=modulation)
    y, expected = deformable_conv2d(x, offset, weight, bias, **options), oracle(x, offset, weight, bias, **options)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad((y * g).sum(), given), torch.autograd.grad((expected * g).sum(), given), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_without_offsets_it_is_a_convolution():
    torch.manual_seed(0)
    conv = DeformableConv(4, 6, 3, 2, 1)
    x = torch.randn(2, 7, 8, 4)
    plain = F.conv2d(x.movedim(-1, 1), conv.weight, conv.bias, 2, 1).movedim(1, -1)
    torch.testing.assert_close(conv(x), plain)
    modulated = DeformableConv(4, 6, 3, 2, 1, modulated=True)
    modulated.load_state_dict(conv.state_dict() | {k: v for k, v in modulated.state_dict().items() if "offset" in k})
    torch.testing.assert_close(modulated(x), plain)


def test_whole_offsets_move_the_map():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 5, 6, 2, dtype=F64), torch.randn(3, 2, 1, 1, dtype=F64)
    offset = torch.tensor([1.0, -2.0], dtype=F64).expand(1, 5, 6, 2)
    moved = F.pad(x, (0, 0, 2, 0, 0, 1))[:, 1:, :6]
    torch.testing.assert_close(deformable_conv2d(x, offset, weight), moved @ weight[:, :, 0, 0].T)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 5)])
def test_merging_takes_any_size_and_reads_what_exists(size):
    torch.manual_seed(0)
    m = DeformableMerging(4)
    torch.nn.init.normal_(m.conv.offset.weight, std=0.3)
    x = torch.randn(2, *size, 4)
    y, none = m(x)
    assert y.shape == (2, *(-(-n // 2) for n in size), 8) and none is None
    valid = torch.rand(2, *size) < 0.6
    first, exists = m(x, valid)
    other, _ = m(x.masked_fill(~valid.unsqueeze(-1), float("nan")), valid)
    torch.testing.assert_close(first, other)
    assert exists.shape == y.shape[:3]


def test_second_derivatives_are_those_of_the_definition():
    torch.manual_seed(0)
    x, offset = torch.randn(1, 3, 3, 2, dtype=F64), torch.rand(1, 2, 2, 8, dtype=F64) * 0.8 + 0.1
    weight = torch.randn(2, 2, 2, 2, dtype=F64)
    for t in (x, offset, weight):
        t.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *a: deformable_conv2d(*a, stride=2), (x, offset, weight))


def test_bad_input_is_refused():
    x, offset, weight = torch.zeros(1, 4, 4, 4), torch.zeros(1, 2, 2, 8), torch.zeros(6, 4, 2, 2)
    with pytest.raises(ValueError, match="offset must have shape"):
        deformable_conv2d(x, torch.zeros(1, 2, 2, 6), weight)
    with pytest.raises(ValueError, match="weight has shape"):
        deformable_conv2d(x, offset, torch.zeros(6, 3, 2, 2))
    with pytest.raises(ValueError, match="groups of offset"):
        deformable_conv2d(x, torch.zeros(1, 2, 2, 24), weight)
    with pytest.raises(ValueError, match="modulation must have shape"):
        deformable_conv2d(x, offset, weight, modulation=torch.zeros(1, 2, 2, 8))
    with pytest.raises(ValueError, match="offset_groups"):
        DeformableConv(4, 6, offset_groups=3)
    with pytest.raises(ValueError, match="kernel_size"):
        DeformableConv(4, 6, 0)
