"""What restoration models share: any size, tiles with overlap, and the last layers that make pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, describe

#: Mean colour of DIV2K, which super-resolution models subtract.
RGB_MEAN = (0.4488, 0.4371, 0.4040)


class Restorer(nn.Module):
    """Images ``(B, in_chans, H, W)`` to images ``scale`` times as large, for any H and W.

    A subclass computes :meth:`restore` on sides that are multiples of ``step``; others are padded by reflection at the
    bottom and on the right (repeated where one reflection is too short), and what that adds is cut off.

    Args:
        scale: pixels a side that come out for one that goes in.
        in_chans: channels of images.
        step: what sides must be multiples of.
        img_range: largest value of a pixel.
    """

    #: First convolution, which depends on the number of channels.
    input_name: str | None = None

    def __init__(self, scale: int, in_chans: int, step: int, img_range: float = 1.0):
        super().__init__()
        self.scale, self.in_chans, self.step, self.img_range = scale, in_chans, step, img_range
        self.mean = RGB_MEAN if in_chans == 3 else (0.0,) * in_chans

    def restore(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W), mean subtracted, to (B, in_chans, scale * H, scale * W)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, in_chans, scale * H, scale * W)."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"x must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        height, width = x.shape[2:]
        if not (height and width):
            raise ValueError(f"x must hold at least one pixel, got shape {tuple(x.shape)}")
        x = reflected(x, (-height % self.step, -width % self.step))
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        y = self.restore((x - mean) * self.img_range) / self.img_range + mean
        return y[..., : self.scale * height, : self.scale * width]

    @torch.no_grad()
    def tiled(self, x: Tensor, tile: int, overlap: int = 16) -> Tensor:
        """The same in tiles, for images that do not fit memory: each is restored with ``overlap`` pixels around it.

        Args:
            x: (B, in_chans, H, W).
            tile: side of a tile in pixels of ``x``.
            overlap: pixels of context on every side.

        Returns:
            (B, in_chans, scale * H, scale * W), where no tile sees further than its context.
        """
        tile, overlap = check_int("tile", tile, least=1), check_int("overlap", overlap, least=0)
        height, width = x.shape[2:]
        out = x.new_empty(*x.shape[:2], height * self.scale, width * self.scale)
        s = self.scale
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                bottom, right = min(top + tile, height), min(left + tile, width)
                y0, x0 = max(0, top - overlap), max(0, left - overlap)
                part = self(x[..., y0 : bottom + overlap, x0 : right + overlap])
                inner = part[..., (top - y0) * s : (bottom - y0) * s, (left - x0) * s : (right - x0) * s]
                out[..., top * s : bottom * s, left * s : right * s] = inner
        return out


def reflected(x: Tensor, more: tuple[int, int]) -> Tensor:
    """(B, C, H, W) with ``more`` rows and columns, mirrored at the last ones, again where one is too short."""
    for axis, count in zip((2, 3), more, strict=True):
        while count > 0:
            step = min(count, x.shape[axis] - 1)
            if step == 0:  # one pixel has no mirror image but itself
                x, count = torch.cat([x, x.narrow(axis, 0, 1).expand(*_with(x, axis, count))], axis), 0
                continue
            pads = [0, step, 0, 0] if axis == 3 else [0, 0, 0, step]
            x, count = F.pad(x, pads, mode="reflect"), count - step
    return x


def _with(x: Tensor, axis: int, size: int) -> list[int]:
    return [size if i == axis else n for i, n in enumerate(x.shape)]


class PixelShuffleHead(nn.Module):
    """Features (B, dim, H, W) to pixels: convolution, LeakyReLU, convolutions and pixel shuffles, convolution.

    Args:
        dim: width of the features.
        out_chans: channels of images.
        scale: a power of two, or 3.
        width: width of the layers between.
    """

    def __init__(self, dim: int, out_chans: int, scale: int, width: int = 64):
        super().__init__()
        if scale < 1 or (scale & (scale - 1) and scale != 3):
            raise ValueError(f"scale={scale} is not possible; choose a power of two, or 3")
        factors = [3] if scale == 3 else [2] * int(math.log2(scale))
        self.before = nn.Conv2d(dim, width, 3, 1, 1)
        self.up = nn.ModuleList(nn.Conv2d(width, f * f * width, 3, 1, 1) for f in factors)
        self.factors = factors
        self.last = nn.Conv2d(width, out_chans, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.before(x))
        for conv, factor in zip(self.up, self.factors, strict=True):
            x = F.pixel_shuffle(conv(x), factor)
        return self.last(x)
