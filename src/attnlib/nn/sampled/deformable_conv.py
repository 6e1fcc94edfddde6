"""Deformable convolution as a layer: a convolution of the map says how far each tap of another one is moved."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...checks import check_divides, check_flag, check_int
from ...ops.deformable_conv import deformable_conv2d
from ..layers import MapNorm, conv_any_size, normed, strided_valid, zero_invalid


class DeformableConv(nn.Module):
    """``conv(x, offset(x))`` on (B, H, W, C), with offsets that start at zero: a plain convolution then.

    Any size: the output has ``ceil(side / stride)`` tokens a side; beyond the border there are zeros. Parameters:
    ``weight``, ``bias``, ``offset.*``.

    Args:
        dim: channels in.
        out_dim: channels out.
        kernel_size: side of the kernel.
        stride: of the convolution.
        padding: zeros on every side.
        dilation: of the convolution.
        groups: of the convolution.
        offset_groups: groups of channels that are moved each on their own.
        modulated: the same convolution also gives a factor for each tap, ``2 sigmoid(.)``, which starts at 1.
        bias: of the convolution.

    Reference: Dai et al., 2017, arXiv 1703.06211; Zhu et al., 2019, arXiv 1811.11168.

    >>> DeformableConv(8, 16, 2, 2)(torch.randn(1, 5, 4, 8)).shape
    torch.Size([1, 3, 2, 16])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            check_int(name, value, least=1)
        for name, count in (("groups", groups), ("offset_groups", offset_groups)):
            check_divides(name, count, "dim", dim)
        check_divides("groups", groups, "out_dim", out_dim)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.modulated, self.taps = check_flag("modulated", modulated), offset_groups * kernel_size**2
        self.weight = nn.Parameter(torch.empty(out_dim, dim // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.offset = nn.Conv2d(
            dim, self.taps * (3 if modulated else 2), kernel_size, stride, padding, dilation, bias=True
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As torch's own convolutions start; nothing is moved."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[1:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> (B, ceil(H / s), ceil(W / s), out_dim); tokens outside ``valid`` are zeros."""
        x = zero_invalid(x, valid)
        moved, factors = conv_any_size(self.offset, x, self.offset.weight, self.offset.bias), None
        if self.modulated:
            moved, factors = moved.split([2 * self.taps, self.taps], -1)
            factors = 2 * factors.sigmoid()
        return deformable_conv2d(
            x, moved, self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.groups, modulation=factors,
        )  # fmt: skip


class DeformableMerging(nn.Module):
    """Patches between stages by a deformable convolution of stride 2: ``act(BatchNorm(conv(x)))``.

    Args:
        dim: channels in.
        out_dim: channels out; twice ``dim`` by default.
        kernel_size: side of the kernel.
        norm: makes the norm from a width.
        activation: makes the activation behind the norm.

    Reference: Pan et al., 2021, "Less is More: Pay Less Attention in Vision Transformers", arXiv 2105.14217.
    """

    stride = 2

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        kernel_size: int = 2,
        norm: Callable[[int], nn.Module] = MapNorm,
        activation: Callable[[], nn.Module] = nn.GELU,
    ):
        super().__init__()
        out_dim = 2 * dim if out_dim is None else out_dim
        self.conv, self.norm, self.act = DeformableConv(dim, out_dim, kernel_size, 2), norm(out_dim), activation()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim), and which of these exist."""
        x, valid = self.conv(x, valid), strided_valid(valid, 2)
        return self.act(normed(self.norm, x, valid)), valid
