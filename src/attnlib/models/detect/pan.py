"""Maps for detectors: blocks that keep every stage of what they compute, a backbone of them, and a neck up and down.

- :class:`CSPBlock`: Wang et al., 2020, "CSPNet", arXiv 1911.11929, in the form that keeps the output of every
  bottleneck (Wang et al., 2022, "ELAN", arXiv 2211.04800).
- :class:`PoolPyramid`: He et al., 2015, "Spatial Pyramid Pooling", arXiv 1406.4729, by one pool thrice.
- :class:`PAN`: Liu et al., 2018, "Path Aggregation Network", arXiv 1803.01534.

All on (B, H, W, C), any size: what is halved rounds up, and what comes back is brought to the size that stood there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_divides, check_int, check_ints, check_real, describe
from ...nn.layers import ConvNorm, resize_map
from ...nn.multimodal.deyolo import HELD, conv_rules
from ...nn.released import Rule


def conv(dim: int, out_dim: int, kernel_size: int = 1, stride: int = 1, **norm: Any) -> ConvNorm:
    """Convolution, BatchNorm, SiLU."""
    return ConvNorm(dim, out_dim, kernel_size, stride, activation=nn.SiLU, **norm)


class Bottleneck(nn.Module):
    """``conv_3(conv_3(x))``, plus x where there is a shortcut; the second convolution may have ``groups``."""

    def __init__(self, dim: int, shortcut: bool, groups: int = 1, **norm: Any):
        super().__init__()
        self.convs = nn.Sequential(conv(dim, dim, 3, **norm), conv(dim, dim, 3, groups=groups, **norm))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x) if self.shortcut else self.convs(x)


class CSPBlock(nn.Module):
    """``[a, b] = conv_1(x)``, bottlenecks ``b_i`` one after the other from b on, ``conv_1([a, b, b_1, ... b_n])``.

    Args:
        dim: channels in.
        out_dim: channels out.
        depth: bottlenecks.
        shortcut: past each of them.
        groups: of the second convolution of each.
        expansion: channels in between, as a share of those out.
        norm: ``eps`` and ``momentum`` of the norms.

    >>> CSPBlock(8, 12, 2, True).eval()(torch.randn(1, 5, 6, 8)).shape
    torch.Size([1, 5, 6, 12])
    """

    def __init__(
        self, dim: int, out_dim: int, depth: int = 1, shortcut: bool = False, groups: int = 1, expansion: float = 0.5,
        **norm: Any,
    ):  # fmt: skip
        super().__init__()
        check_int("dim", dim, least=1)
        check_int("out_dim", out_dim, least=2)
        check_int("depth", depth, least=0)
        half = int(out_dim * check_real("expansion", expansion, above=0))
        if not half:
            raise ValueError(f"expansion={expansion} of out_dim={out_dim} leaves no channels in between")
        check_divides("groups", check_int("groups", groups, least=1), "the channels in between", half)
        self.split = conv(dim, 2 * half, **norm)
        self.blocks = nn.ModuleList(Bottleneck(half, shortcut, groups, **norm) for _ in range(depth))
        self.join = conv((2 + depth) * half, out_dim, **norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, out_dim)."""
        parts = list(self.split(x).chunk(2, -1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        return self.join(torch.cat(parts, -1))


class PoolPyramid(nn.Module):
    """``conv_1([y, p(y), p(p(y)), p(p(p(y)))])`` with ``y = conv_1(x)`` of half the channels, p the maximum nearby.

    Args:
        dim: channels in.
        out_dim: channels out.
        side: of the pool, odd.
        norm: ``eps`` and ``momentum`` of the norms.
    """

    def __init__(self, dim: int, out_dim: int, side: int = 5, **norm: Any):
        super().__init__()
        if check_int("side", side, least=1) % 2 == 0:
            raise ValueError(f"side must be odd, got {side}")
        check_int("dim", dim, least=2)
        self.side = side
        self.reduce = conv(dim, dim // 2, **norm)
        self.join = conv(dim // 2 * 4, out_dim, **norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, dim) -> (B, H, W, out_dim)."""
        parts = [self.reduce(x).permute(0, 3, 1, 2)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], self.side, 1, self.side // 2))
        return self.join(torch.cat(parts, 1).permute(0, 2, 3, 1))


class CSPBackbone(nn.Module):
    """(B, in_chans, H, W) -> maps (B, H / s, W / s, C) of strides 8, 16 and 32.

    Args:
        dims: channels at the strides 2, 4, 8, 16 and 32.
        depths: bottlenecks at the strides 4 to 32.
        in_chans: channels of images.
        first: makes what stands at stride 4 from channels and depth; a :class:`CSPBlock` by default.
        norm: ``eps`` and ``momentum`` of the norms.
    """

    def __init__(
        self, dims: Sequence[int], depths: Sequence[int], in_chans: int = 3,
        first: Callable[[int, int], nn.Module] | None = None, **norm: Any,
    ):  # fmt: skip
        super().__init__()
        dims, depths = check_ints("dims", dims, least=1), check_ints("depths", depths, least=1)
        if len(dims) != 5 or len(depths) != 4:
            raise ValueError(f"dims must be 5 numbers and depths 4, got {dims} and {depths}")
        self.in_chans, self.dims = check_int("in_chans", in_chans, least=1), dims
        self.stem = conv(in_chans, dims[0], 3, 2, **norm)
        self.downs = nn.ModuleList(conv(a, b, 3, 2, **norm) for a, b in zip(dims, dims[1:], strict=False))
        blocks: list[nn.Module] = [CSPBlock(d, d, n, True, **norm) for d, n in zip(dims[1:], depths, strict=True)]
        if first is not None:
            blocks[0] = first(dims[1], depths[0])
        self.blocks = nn.ModuleList(blocks)
        self.pool = PoolPyramid(dims[-1], dims[-1], **norm)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Finest first."""
        check_images("x", x, self.in_chans)
        if self.training and len(x) * math.prod(-(-side // 32) for side in x.shape[2:]) == 1:
            raise ValueError(
                f"x {tuple(x.shape)} leaves one pixel at stride 32, whose norm has no statistics; train on several "
                "images, or on larger ones"
            )
        x = self.stem(x.permute(0, 2, 3, 1))
        maps = []
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(down(x))
            maps.append(x)
        return [*maps[1:-1], self.pool(x)]


class PAN(nn.Module):
    """Maps of three strides -> the same, each having seen the others: down from the coarsest, and up again.

    Args:
        dims: channels of the maps, finest first.
        depth: bottlenecks of each block, without a shortcut.
        norm: ``eps`` and ``momentum`` of the norms.

    >>> maps = [torch.randn(1, 9, 12, 8), torch.randn(1, 5, 6, 12), torch.randn(1, 3, 3, 16)]
    >>> [tuple(y.shape) for y in PAN((8, 12, 16)).eval()(maps)]
    [(1, 9, 12, 8), (1, 5, 6, 12), (1, 3, 3, 16)]
    """

    def __init__(self, dims: Sequence[int], depth: int = 1, **norm: Any):
        super().__init__()
        self.dims = check_ints("dims", dims, least=2)
        if len(self.dims) != 3:
            raise ValueError(f"dims must be of three maps, finest first, got {self.dims}")
        fine, middle, coarse = self.dims
        self.top_down = nn.ModuleList(
            [CSPBlock(coarse + middle, middle, depth, **norm), CSPBlock(middle + fine, fine, depth, **norm)]
        )
        self.downs = nn.ModuleList([conv(fine, fine, 3, 2, **norm), conv(middle, middle, 3, 2, **norm)])
        self.bottom_up = nn.ModuleList(
            [CSPBlock(fine + middle, middle, depth, **norm), CSPBlock(middle + coarse, coarse, depth, **norm)]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Three maps, each of half the side of the one before, rounded up."""
        if len(maps) != 3 or any(x.dim() != 4 or x.shape[-1] != c for x, c in zip(maps, self.dims, strict=True)):
            raise ValueError(f"maps must be (B, H, W, C) with C={self.dims}, got {[tuple(x.shape) for x in maps]}")
        fine, middle, coarse = maps
        middle = self.top_down[0](torch.cat([resize_map(coarse, middle.shape[1:3], "nearest"), middle], -1))
        out = [self.top_down[1](torch.cat([resize_map(middle, fine.shape[1:3], "nearest"), fine], -1))]
        for down, block, held in zip(self.downs, self.bottom_up, (middle, coarse), strict=True):
            below = down(out[-1])
            if below.shape[1:3] != held.shape[1:3]:
                raise ValueError(
                    f"maps must each have half the side of the one before, rounded up; got "
                    f"{[tuple(x.shape[1:3]) for x in maps]}"
                )
            out.append(block(torch.cat([below, held], -1)))
        return out


def check_images(name: str, x: Tensor, channels: int) -> None:
    """Images (B, channels, H, W) of floating point, with a pixel at least."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"{name} must be images (B, {channels}, H, W) of floating point, got {describe(x)}")
    if not (x.shape[2] and x.shape[3]):
        raise ValueError(f"{name} must have a pixel at least, got {tuple(x.shape)}")


def block_rules(theirs: str, ours: str) -> dict[str, Rule]:
    """Names of a :class:`CSPBlock`, with any number of bottlenecks."""
    out = conv_rules(rf"{theirs}\.cv1", f"{ours}.split") | conv_rules(rf"{theirs}\.cv2", f"{ours}.join")
    for j in (1, 2):
        into = rf"{ours}.blocks.\1.convs.{j - 1}"
        out[rf"{theirs}\.m\.(\d+)\.cv{j}\.conv\.weight"] = f"{into}.conv.weight"
        out[rf"{theirs}\.m\.(\d+)\.cv{j}\.bn\.{HELD}"] = rf"{into}.norm.\2"
    return out


__all__ = [
    "PAN", "Bottleneck", "CSPBackbone", "CSPBlock", "PoolPyramid", "block_rules", "check_images", "conv", "conv_rules"
]  # fmt: skip
