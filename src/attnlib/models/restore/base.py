"""What restoration models share: any size, tiles with overlap, and the last layers that make pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_real, describe
from ...grids import mirrored_places
from ...nn.recompute import checkpointed
from ...nn.released import Rule
from ..protocol import TaskModel, answering
from ..tiles import tiled

#: Mean colour of DIV2K, which super-resolution models subtract.
RGB_MEAN = (0.4488, 0.4371, 0.4040)


class Blocks(nn.ModuleList):
    """Blocks on (B, H, W, C) one behind the other, each recomputed in the backward pass when ``checkpointing``."""

    checkpointing = False

    def run(self, x: Tensor) -> Tensor:
        for block in self:
            made = checkpointed(block, x, when=self.checkpointing)
            x = made[0] if isinstance(made, tuple) else made
        return x


class Restorer(TaskModel):
    """Images ``(B, in_chans, H, W)`` to images ``scale`` times as large, for any H and W.

    A subclass computes :meth:`body` on sides that are multiples of ``step``; others are padded by reflection at the
    bottom and on the right (repeated where one reflection is too short), and what that adds is cut off.

    Args:
        scale: pixels a side that come out for one that goes in.
        in_chans: channels of images.
        step: what sides must be multiples of.
        img_range: largest value of a pixel.
        align: pixels after which what the model lays over an image (windows) begins anew; ``step`` by default. Tiles
            begin and end there, so that they are cut as the whole image is.
    """

    #: First convolution, which depends on the number of channels.
    input_name: str | None = None

    def __init__(self, scale: int, in_chans: int, step: int, img_range: float = 1.0, align: int | None = None):
        super().__init__()
        self.scale, self.in_chans, self.step = scale, in_chans, step
        self.img_range = check_real("img_range", img_range, above=0)
        self.align = step if align is None else check_int("align", align, least=1)
        self.mean = RGB_MEAN if in_chans == 3 else (0.0,) * in_chans

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the insides of blocks in the backward pass instead of keeping them."""
        check_flag("enable", enable)
        for module in self.modules():
            if isinstance(module, Blocks):
                module.checkpointing = enable

    def body(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W), mean subtracted, to (B, in_chans, scale * H, scale * W)."""
        raise NotImplementedError

    def _check(self, name: str, x: Any) -> None:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise ValueError(f"{name} must be images (B, {self.in_chans}, H, W) of floating point, got {describe(x)}")
        if not x.shape[2:].numel():
            raise ValueError(f"{name} must hold at least one pixel, got shape {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, in_chans, scale * H, scale * W)."""
        self._check("x", x)
        height, width = x.shape[2:]
        x = reflected(x, (-height % self.step, -width % self.step))
        mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        y = self.body((x - mean) * self.img_range) / self.img_range + mean
        return y[..., : self.scale * height, : self.scale * width]

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``{"l1": mean absolute difference}`` of images (B, in_chans, scale * H, scale * W)."""
        self._check("prediction", prediction)
        if not isinstance(target, Tensor) or target.shape != prediction.shape:
            raise ValueError(f"target must be images {tuple(prediction.shape)}, got {describe(target)}")
        return {"l1": F.l1_loss(prediction, target.to(prediction.dtype))}

    def predict(self, x: Tensor, **settings: Any) -> Tensor:
        """:meth:`restore`."""
        return self.restore(x, **settings)

    @answering
    def restore(
        self,
        image: Tensor,
        *,
        scale: int | None = None,
        tile: int | None = None,
        overlap: int = 32,
        blend: int | None = None,
    ) -> Tensor:
        """An image made larger, in tiles where it would not fit memory.

        Every tile is read with ``overlap`` pixels around it, and more up to the next multiple of ``align``. Over the
        inner ``blend`` of these, neighbours fade into each other. Where no pixel reads further than ``overlap - blend``
        pixels in the model, the tiles are exactly the whole image.

        Args:
            image: (B, in_chans, H, W).
            scale: what is expected of the restorer; an error if it was built for another.
            tile: side of a tile in pixels of ``image``; ``None``: the whole image at once.
            overlap: pixels of context on every side of a tile.
            blend: pixels over which neighbours fade, on each side of their border; half of ``overlap`` by default,
                0 cuts.

        Returns:
            (B, in_chans, scale * H, scale * W), without a gradient.

        Raises:
            ValueError: no images, another scale than the restorer was built for, a tile of no pixels, or
                ``blend`` beyond ``overlap``.
        """
        self._check("image", image)
        if scale is not None and check_int("scale", scale, least=1) != self.scale:
            raise ValueError(f"scale={scale} is not possible: this restorer was built for scale={self.scale}")
        return tiled(self, image, tile, overlap=overlap, blend=blend, align=self.align, scale=self.scale)


def reflected(x: Tensor, more: tuple[int, int]) -> Tensor:
    """(B, C, H, W) with ``more`` rows and columns, mirrored at the last ones, again where one is too short."""
    return _mirrored(x, [(0, count) for count in more])


def mirrored(x: Tensor, pad: int) -> Tensor:
    """(B, C, H, W) with ``pad`` pixels mirrored on each side, again and again where the image is smaller than that."""
    return _mirrored(x, [(pad, pad)] * 2)


def _mirrored(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    """With so many rows and columns more, before and behind."""
    if all(max(pad) < n for pad, n in zip(pads, x.shape[2:], strict=True)):
        return F.pad(x, (*pads[1], *pads[0]), mode="reflect") if any(map(any, pads)) else x
    for axis, (before, behind) in enumerate(pads, 2):
        n = x.shape[axis]
        x = x.index_select(axis, mirrored_places(-before, n + behind, n, x.device))
    return x


class PixelShuffleHead(nn.Module):
    """Features (B, dim, H, W) to pixels: convolution, LeakyReLU, convolutions and pixel shuffles, convolution.

    Args:
        dim: width of the features.
        out_chans: channels of images.
        scale: a power of two, or 3.
        width: width of the layers between.
    """

    #: From the names that restorers of BasicSR have for it.
    RULES: ClassVar[dict[str, Rule]] = {
        r"conv_before_upsample\.0\.(weight|bias)": r"head.before.\1",
        r"upsample\.(\d+)\.(weight|bias)": lambda m, t: {f"head.up.{int(m[1]) // 2}.{m[2]}": t},
        r"conv_last\.(weight|bias)": r"head.last.\1",
    }

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
