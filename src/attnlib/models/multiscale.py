"""Scaling on scales: one frozen vision model on several sizes of an image, tile by tile, instead of a larger model.

Shi et al., 2024, "When Do We Not Need Larger Vision Models?", arXiv 2403.13043. For every scale ``s_k`` the image is
resized, cut into equal tiles no larger than the model's own size, read tile by tile, and stitched; larger maps are
averaged to the cells of one of them, and channels are put side by side:

    ``y = concat_k area(stitch(f(tiles(resize(x, s_k)))))``.

Nothing is learned. Scales (1, 2) cost 5 times the model, (1, 2, 3) 14 times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_flag, check_float, check_int, check_rank, check_real, checked, to_tuple

LAYOUTS = ("tokens", "channels_last", "channels_first")


class MultiScale(nn.Module):
    """A model of images that reads several scales of them; its output has K times the channels.

    Args:
        model: from images (B, C, H, W) to features: tokens (B, P + h w, D), the map (B, h, w, D), or the map
            (B, D, h, w).
        scales: of the image, as factors of its size; ``[1]`` is the model itself.
        layout: of the features: ``"tokens"``, ``"channels_last"`` or ``"channels_first"``; also of the answer.
        num_prefix_tokens: P tokens that stand before those of the grid (class, registers). Those of the tiles are
            averaged.
        max_split_size: largest side of a tile in pixels, one number or (height, width); by default that of the image.
        resize_to: number of the scale whose cells all others are averaged to.
        split_forward: run the model on as many tiles at a time as there are images, which takes the memory of one
            scale of 1 whatever the scales, instead of on all tiles of a scale.
        multiple: the sides of a tile must be multiples of this (the patch size), where the model itself would drop
            what is left without a word.

    What differs from the authors' code: images need not be square; sizes are rounded, not cut (``int(size * scale)``);
    a scale that leaves the size does not resize; tiles that the model cannot take are refused.

    Reference: Shi et al., 2024, arXiv 2403.13043, section 3.1.

    >>> model = nn.Conv2d(3, 8, 4, 4)
    >>> MultiScale(model, (1, 2), layout="channels_first")(torch.randn(1, 3, 16, 24)).shape
    torch.Size([1, 16, 4, 6])
    """

    @checked
    def __init__(
        self,
        model: Callable[[Tensor], Any],
        scales: Sequence[float] = (1, 2),
        layout: str = "tokens",
        num_prefix_tokens: int = 0,
        max_split_size: int | tuple[int, int] | None = None,
        resize_to: int = 0,
        split_forward: bool = False,
        multiple: int = 1,
    ):
        super().__init__()
        check_choice("layout", layout, LAYOUTS)
        if not len(scales):
            raise ValueError("scales must hold at least one factor, such as (1, 2)")
        self.scales = tuple(check_real("scales", scale, above=0) for scale in scales)
        self.num_prefix_tokens = check_int("num_prefix_tokens", num_prefix_tokens, least=0)
        if num_prefix_tokens and layout != "tokens":
            raise ValueError(f"num_prefix_tokens={num_prefix_tokens} needs layout='tokens', got layout={layout!r}")
        self.max_split_size = None if max_split_size is None else to_tuple("max_split_size", max_split_size, 2)
        for side in self.max_split_size or ():
            check_int("max_split_size", side, least=1)
        self.resize_to = check_int("resize_to", resize_to, least=0, most=len(self.scales) - 1)
        self.split_forward = check_flag("split_forward", split_forward)
        self.multiple = check_int("multiple", multiple, least=1)
        self.model, self.layout = model, layout

    def tiles(self, height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Of every scale: the size of the image, and how many tiles it has down and across.

        Raises:
            ValueError: a size that does not split into equal tiles, or tiles that are no multiples of ``multiple``.
        """
        found = []
        for scale in self.scales:
            size = (round(height * scale), round(width * scale))
            most = (height, width) if self.max_split_size is None else self.max_split_size
            counts = tuple(math.ceil(side / m) for side, m in zip(size, most, strict=True))
            for axis, side, n in zip(("height", "width"), size, counts, strict=True):
                if not side or side % n or (side // n) % self.multiple:
                    raise ValueError(
                        f"scales: {scale} gives a {axis} of {side} pixels in {n} tiles of {side / n:g}, which must be "
                        f"whole multiples of {self.multiple}; choose another scale or max_split_size"
                    )
            found.append((size, (counts[0], counts[1])))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Features of all scales side by side.

        Args:
            x: (B, C, H, W) images.

        Returns:
            In ``layout``, with K times the channels and the grid of scale ``resize_to``.

        Raises:
            ValueError: tiles that the model cannot take, or features that are no grid.
        """
        check_rank("x", x, 4, "(B, C, H, W)")
        check_float("x", x)
        maps, prefixes = [], []
        for size, counts in self.tiles(*x.shape[2:]):
            grid, prefix = self._scale(x, size, counts)
            maps.append(grid)
            prefixes.append(prefix)
        cells = tuple(maps[self.resize_to].shape[2:])
        y = torch.cat([_area(m, cells) for m in maps], 1)
        if self.layout == "channels_first":
            return y
        y = y.movedim(1, -1)
        if self.layout == "channels_last":
            return y
        return torch.cat([torch.cat(prefixes, -1), y.flatten(1, 2)], 1)

    def _scale(self, x: Tensor, size: tuple[int, int], counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The stitched map (B, D, h, w) of one scale, and its prefix tokens (B, P, D)."""
        batch, own = x.shape[0], tuple(x.shape[2:])
        if size != own:
            x = F.interpolate(x.float(), size=size, mode="bicubic").to(x.dtype)
        down, across = counts
        tile = (size[0] // down, size[1] // across)
        tiles = x.unflatten(3, (across, -1)).unflatten(2, (down, -1)).permute(2, 4, 0, 1, 3, 5).flatten(0, 2)
        parts = tiles.split(batch) if self.split_forward and batch else (tiles,)
        try:
            read = [self.model(part) for part in parts]
        except (ValueError, RuntimeError, AssertionError) as error:
            if tile == own:
                raise
            raise ValueError(f"the model cannot take tiles of {tile[0]} x {tile[1]} pixels: {error}") from error
        grids, prefixes = zip(*(self._grid(f, tile) for f in read), strict=True)
        grid, prefix = torch.cat(grids), torch.cat(prefixes)
        grid = grid.unflatten(0, (down, across, batch)).permute(2, 3, 0, 4, 1, 5).flatten(4, 5).flatten(2, 3)
        return grid, prefix.unflatten(0, (down * across, batch)).mean(0)

    def _grid(self, features: Any, tile: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Features of tiles as maps (n, D, h, w), and their prefix tokens."""
        rank = 3 if self.layout == "tokens" else 4
        check_rank("the model's features", features, rank, f"that of layout={self.layout!r}, with {rank} axes")
        if self.layout == "channels_first":
            return features, features.new_zeros(len(features), 0, features.shape[1])
        if self.layout == "channels_last":
            return features.movedim(-1, 1), features.new_zeros(len(features), 0, features.shape[-1])
        prefix, tokens = features[:, : self.num_prefix_tokens], features[:, self.num_prefix_tokens :]
        count = tokens.shape[1]
        rows = round(math.sqrt(count * tile[0] / tile[1]))
        if not rows or count % rows or abs(count // rows * tile[0] - rows * tile[1]) > max(tile):
            raise ValueError(
                f"{count} tokens behind num_prefix_tokens={self.num_prefix_tokens} are no grid of a tile of "
                f"{tile[0]} x {tile[1]} pixels"
            )
        return tokens.transpose(1, 2).unflatten(2, (rows, -1)), prefix


def _area(x: Tensor, cells: Sequence[int]) -> Tensor:
    """Means over cells of a map (B, D, h, w), in float32."""
    if tuple(x.shape[2:]) == tuple(cells):
        return x
    return F.interpolate(x.float(), size=tuple(cells), mode="area").to(x.dtype)
