"""Deformable convolution: every tap of a kernel reads the map where a learned offset has moved it.

``y[p] = b + sum_k W_k m[p, k] x(s p - pad + d k + offset[p, k])`` with bilinear samples, and zeros beyond the border.
Places are counted in pixels, so that offsets of zero read pixels as they are, and their gradient is that of the side to
which places are rounded down: right and below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_device, check_divides, check_float, check_int, check_rank, to_tuple
from ..types import exactly, stats_dtype
from .sampled import _axis, _sum_rows


def deformable_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    modulation: Tensor | None = None,
) -> Tensor:
    """A convolution of (B, H, W, C) whose taps are moved, and weighed if ``modulation`` says so.

    Args:
        x: (B, H, W, C).
        offset: (B, H', W', G * kh * kw * 2): for each of G groups of channels, for each tap in row-major order, how far
            it is moved down and to the right, in pixels. The output has this grid.
        weight: (O, C / groups, kh, kw).
        bias: (O,).
        stride: pixels between outputs.
        padding: how far outputs begin above and left of the map.
        dilation: pixels between taps.
        groups: of the convolution.
        modulation: (B, H', W', G * kh * kw) factors of the samples, as in the second version of the paper.

    Returns:
        (B, H', W', O), differentiable in all tensors.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: tensors that are not of floating point.

    Reference: Dai et al., 2017, arXiv 1703.06211, eq. 2; Zhu et al., 2019, arXiv 1811.11168, eq. 1.

    >>> y = deformable_conv2d(torch.ones(1, 4, 4, 2), torch.zeros(1, 2, 2, 8), torch.ones(3, 2, 2, 2), stride=2)
    >>> y.shape, y[0, 0, 0].tolist()
    (torch.Size([1, 2, 2, 3]), [8.0, 8.0, 8.0])
    """
    check_rank("x", x, 4, "(B, H, W, C)")
    check_rank("offset", offset, 4, "(B, H', W', G * taps * 2)")
    check_rank("weight", weight, 4, "(O, C / groups, kh, kw)")
    for name, t in (("x", x), ("offset", offset), ("weight", weight)):
        check_float(name, t)
    check_device(x=x, offset=offset, weight=weight, bias=bias, modulation=modulation)
    batch, height, width, dim = x.shape
    out_dim, own, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    check_int("groups", groups, least=1)
    if own * groups != dim or out_dim % groups:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, which does not fit groups={groups} of {dim} channels"
        )
    if offset.shape[0] != batch or offset.shape[3] % (2 * taps) or not offset.shape[3]:
        raise ValueError(
            f"offset must have shape ({batch}, H', W', G * {2 * taps}) for {taps} taps, got {tuple(offset.shape)}"
        )
    rows, columns = offset.shape[1:3]
    parts = offset.shape[3] // (2 * taps)
    check_divides("groups of offset", parts, "channels of x", dim)
    if modulation is not None and modulation.shape != (batch, rows, columns, parts * taps):
        raise ValueError(
            f"modulation must have shape {(batch, rows, columns, parts * taps)}, got {tuple(modulation.shape)}"
        )
    high = stats_dtype(x.dtype)
    with exactly(x):
        moved = offset.to(high).unflatten(3, (parts, taps, 2))
        places = []
        for axis, count in enumerate((rows, columns)):
            step, pad, apart = (to_tuple(n, v, 2)[axis] for n, v in (
                ("stride", stride), ("padding", padding), ("dilation", dilation),
            ))  # fmt: skip
            start = torch.arange(count, device=x.device, dtype=high) * step - pad
            tap = torch.arange(kernel[axis], device=x.device, dtype=high) * apart
            tap = tap.repeat_interleave(kernel[1]) if axis == 0 else tap.repeat(kernel[0])
            start = start[:, None, None, None] if axis == 0 else start[:, None, None]
            places.append((moved[..., axis] + (start + tap)).permute(0, 3, 1, 2, 4).flatten(2))  # (B, G, N taps)
        wy0, wy1, y0, y1 = _axis(places[0], height)
        wx0, wx1, x0, x1 = _axis(places[1], width)
        y0, y1 = y0 * width, y1 * width
        numbers = torch.stack([y0 + x0, y0 + x1, y1 + x0, y1 + x1], -1)
        shares = torch.stack([wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1], -1)
        if modulation is not None:
            factors = modulation.to(high).unflatten(3, (parts, taps)).permute(0, 3, 1, 2, 4).flatten(2)
            shares = shares * factors.unsqueeze(-1)
        value = x.to(high).flatten(1, 2).unflatten(2, (parts, dim // parts)).transpose(1, 2)
        samples = _sum_rows(value, numbers, shares)  # (B, G, N taps, C / G)
        columns_of = samples.unflatten(2, (rows, columns, taps)).permute(0, 2, 3, 4, 1, 5).flatten(4)
        columns_of = columns_of.to(x.dtype)
    if groups == 1:
        return F.linear(columns_of.flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias)
    cut = columns_of.unflatten(4, (groups, own))
    kernels = weight.unflatten(0, (groups, out_dim // groups)).flatten(3)
    y = torch.einsum("bhwtgc,goct->bhwgo", cut, kernels).flatten(3)
    return y if bias is None else y + bias
