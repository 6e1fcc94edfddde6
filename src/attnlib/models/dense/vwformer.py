"""VWFormer: a head that reads one map through windows with contexts of several sizes.

Yan et al., 2024, "Multi-Scale Representations by Varying Window Attention for Semantic Segmentation", arXiv 2404.16573.
All maps but the finest become one ``F`` at 1/8 of the image, as in SegFormer's head. Beside it stand its mean over the
image and, for each ratio ``R``, the varying window attention of ``F``
(:mod:`attnlib.nn.partition.vwformer`):

    ``y = conv[conv(F), conv(mean F), A_2(F), A_4(F), A_8(F)]``,  ``A_R(F) = VWA_R(F) [+ F]``

Then ``y`` is resized to 1/4, a linear map of the finest map to 48 channels stands beside it, and one 1 x 1 convolution
puts the two together. Every convolution is 1 x 1 with BatchNorm and ReLU.

The authors' head for Cityscapes (``variant="city"``) has no mean over the image, convolutions with BatchNorm and ReLU
instead of linear maps of the levels, nearest resizing of coarse levels, and no BatchNorm behind attention.

Differs from the authors' code: any size of maps; sums of parts instead of convolutions of what stands side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints
from ...nn.layers import ConvNorm, masked_mean, zero_invalid
from ...nn.partition.vwformer import VaryingWindowAttention
from ...nn.released import Released, Rule
from .heads import DenseHead, FuseMaps, start_convs

VARIANTS = ("ade", "city")


class VWFormerHead(DenseHead):
    """Varying windows over the maps of any backbone.

    Args:
        in_dims: channels of the maps, finest first, at least two.
        dim: channels of the fused map; a multiple of the square of every ratio.
        num_classes: classes.
        drop: dropout of channels in training.
        num_heads: heads of every attention; the authors have 1 on ADE20K, 16 on Cityscapes.
        ratios: how many times as large as their windows contexts are.
        num_windows: windows a side.
        window_size: tokens a side of a window, instead of ``num_windows``.
        short_cut: add the map to every attention of it.
        low_dim: channels of the finest map.
        variant: ``"ade"`` or ``"city"``.
        compat: as of :class:`attnlib.nn.partition.vwformer.VaryingWindowAttention`.

    >>> import torch
    >>> head = VWFormerHead([8, 16], dim=16, num_classes=3, ratios=(2, 4), num_windows=2)
    >>> head([torch.randn(2, 8, 16, 16), torch.randn(2, 16, 8, 8)]).shape
    torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        dim: int = 512,
        num_classes: int = 150,
        drop: float = 0.1,
        num_heads: int = 1,
        ratios: Sequence[int] = (2, 4, 8),
        num_windows: int = 8,
        window_size: int | None = None,
        short_cut: bool = True,
        low_dim: int = 48,
        variant: str = "ade",
        compat: str | None = None,
    ):
        super().__init__(in_dims, dim, num_classes, drop)
        check_choice("variant", variant, VARIANTS)
        if len(self.in_dims) < 2:
            raise ValueError(
                f"in_dims={self.in_dims} must name at least two maps: the finest, and those that are fused"
            )
        self.ratios = check_ints("ratios", ratios, least=1)
        self.short_cut = check_flag("short_cut", short_cut)
        check_int("low_dim", low_dim, least=1)
        ade = variant == "ade"
        self.mode = "bilinear" if ade else "nearest"
        widths = [low_dim] + [dim] * (len(self.in_dims) - 1)
        make: Any = nn.Linear if ade else lambda c, d: ConvNorm(c, d, activation=nn.ReLU)
        self.linears = nn.ModuleList(make(c, d) for c, d in zip(self.in_dims, widths, strict=True))
        self.linear_fuse = FuseMaps([dim] * (len(self.in_dims) - 1), dim, activation=nn.ReLU)
        self.attn = nn.ModuleList(
            VaryingWindowAttention(dim, num_heads, r, num_windows, window_size, norm=ade, compat=compat)
            for r in self.ratios
        )
        self.short_path = ConvNorm(dim, dim, activation=nn.ReLU)
        self.image_pool = ConvNorm(dim, dim, activation=nn.ReLU) if ade else None
        self.cat = FuseMaps([dim] * (1 + ade + len(self.ratios)), dim, activation=nn.ReLU)
        self.low_level_fuse = FuseMaps([dim, low_dim], dim, activation=nn.ReLU)
        start_convs(self)
        nn.init.normal_(self.classifier.weight, std=0.01)
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def _level(self, i: int, x: Tensor, valid: Tensor | None) -> Tensor:
        layer = self.linears[i]
        return zero_invalid(layer(x, valid) if isinstance(layer, ConvNorm) else layer(x), valid)

    def fuse(self, maps: list[Tensor], valid: list[Tensor | None]) -> Tensor:
        levels = [self._level(i, x, v) for i, (x, v) in enumerate(zip(maps, valid, strict=True))]
        exists = valid[1]
        size = maps[1].shape[1:3]
        f = zero_invalid(self.linear_fuse(levels[:0:-1], size, exists, self.mode), exists)
        parts = [self.short_path(f, exists)]
        if self.image_pool is not None:
            parts.append(self.image_pool(masked_mean(f, exists)[:, None, None]))
        for attn in self.attn:
            y = attn(f, valid=exists)
            parts.append(y + f if self.short_cut else y)
        y = zero_invalid(self.cat(parts, size, exists), exists)
        return self.low_level_fuse([y, levels[0]], maps[0].shape[1:3], valid[0])

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``VWHead`` or ``VWCityHead``, four maps and three ratios."""
        theirs = Released(state_dict, "the authors' VWHead or VWCityHead", wrappers=("decode_head.",))
        # Their pre-scaling lies beside attention, ours in it.
        moved = {f"attn.{m[1]}.ds.{m[2]}": value for m, value in theirs.matching(r"ds\.(\d+)\.(.+)")}
        parts = {m[0]: value for m, value in theirs.matching(r"attn\.(\d+)\.(.+)")} | moved
        out: dict[str, Tensor] = {}
        if parts:
            held = Released(parts, "the authors' VWA")
            out = held.parts(r"attn\.(\d+)\.(.+)", r"attn.\1", VaryingWindowAttention.convert_state_dict)
        conv = r"conv\.(weight|bias)"
        norm = r"bn\.(weight|bias|running_mean|running_var|num_batches_tracked)"

        def level(name: str) -> Rule:
            return lambda m, value: {f"linears.{int(m[1]) - 1}.{name}{m[2]}": value}

        rules: dict[str, Rule] = {
            r"linear_c(\d)\.proj\.(weight|bias)": level(""),
            rf"linear_c(\d)\.{conv}": level("conv."),
            rf"linear_c(\d)\.{norm}": level("norm."),
            rf"image_pool\.1\.{conv}": r"image_pool.conv.\1",
            rf"image_pool\.1\.{norm}": r"image_pool.norm.\1",
            rf"(linear_fuse|short_path|cat|low_level_fuse)\.{conv}": r"\1.conv.\2",
            rf"(linear_fuse|short_path|cat|low_level_fuse)\.{norm}": r"\1.norm.\2",
            r"conv_seg\.(weight|bias)": r"classifier.\1",
        }
        return theirs.close(out | theirs.renamed(rules))
