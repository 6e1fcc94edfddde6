"""DPT: maps of one stride from four depths of a ViT, brought to four scales and fused from coarse to fine.

Ranftl et al., 2021, "Vision Transformers for Dense Prediction", arXiv 2103.13413, in the form that MultiMAE and CroCo
have it: maps at strides 4, 8, 16 and 32 (in patches of 16) of widths ``layer_dims``, all brought to ``feature_dim``;
``x <- up(unit(x + unit(map)))`` from the last to the first, with ``unit(x) = x + conv relu conv relu x``; then a head
of three convolutions that doubles once more. Any size: maps are brought to the size of the next, where the release
only doubles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_int, check_ints
from ...nn.released import Released


class ResidualUnit(nn.Module):
    """``x + conv(relu(conv(relu(x))))`` on (B, C, H, W)."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class FuseUp(nn.Module):
    """A coarse map and the next finer one, at the size that is asked for."""

    def __init__(self, dim: int, finer: bool):
        super().__init__()
        self.skip = ResidualUnit(dim) if finer else None
        self.unit = ResidualUnit(dim)
        self.out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, finer: Tensor | None, size: Sequence[int]) -> Tensor:
        if self.skip is not None:
            x = x + self.skip(finer)
        return self.out(F.interpolate(self.unit(x), size=tuple(size), mode="bilinear", align_corners=True))


class DPTHead(nn.Module):
    """Four maps of patches to a map of pixels.

    Args:
        dims: widths of the four maps, one for all or four.
        out_channels: of the answer.
        layer_dims: widths at the four scales.
        feature_dim: width of the fusion.
        last_dim: width before the last convolution.

    Shape:
        four (B, dims, h, w) and the size (H, W) of the answer, (B, out_channels, H, W); what the patches cover beyond
        it is cut.

    >>> import torch
    >>> head = DPTHead(8, layer_dims=(4, 4, 8, 8), feature_dim=8, last_dim=4)
    >>> head([torch.randn(1, 8, 3, 5)] * 4, (45, 80)).shape
    torch.Size([1, 1, 45, 80])
    """

    def __init__(
        self, dims: int | Sequence[int], out_channels: int = 1, layer_dims: Sequence[int] = (96, 192, 384, 768),
        feature_dim: int = 256, last_dim: int = 32,
    ):  # fmt: skip
        super().__init__()
        widths = check_ints("dims", (dims,) * 4 if isinstance(dims, int) else dims, least=1)
        layer_dims = check_ints("layer_dims", layer_dims, least=1)
        if len(widths) != 4 or len(layer_dims) != 4:
            raise ValueError(f"dims and layer_dims must be four widths each, got {widths} and {layer_dims}")
        check_int("out_channels", out_channels, least=1)
        check_int("feature_dim", feature_dim, least=2)
        a, b, c, d = layer_dims
        self.scales = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(widths[0], a, 1), nn.ConvTranspose2d(a, a, 4, 4)),
                nn.Sequential(nn.Conv2d(widths[1], b, 1), nn.ConvTranspose2d(b, b, 2, 2)),
                nn.Sequential(nn.Conv2d(widths[2], c, 1)),
                nn.Sequential(nn.Conv2d(widths[3], d, 1), nn.Conv2d(d, d, 3, 2, 1)),
            ]
        )
        self.lateral = nn.ModuleList(nn.Conv2d(dim, feature_dim, 3, padding=1, bias=False) for dim in layer_dims)
        self.fuse = nn.ModuleList(FuseUp(feature_dim, i < 3) for i in range(4))
        half = feature_dim // 2
        self.conv1 = nn.Conv2d(feature_dim, half, 3, padding=1)
        self.conv2 = nn.Conv2d(half, check_int("last_dim", last_dim, least=1), 3, padding=1)
        self.conv3 = nn.Conv2d(last_dim, out_channels, 1)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        if len(maps) != 4:
            raise ValueError(f"maps must be four, got {len(maps)}")
        h, w = maps[0].shape[-2:]
        at = [conv(scale(x)) for conv, scale, x in zip(self.lateral, self.scales, maps, strict=True)]
        x = self.fuse[3](at[3], None, at[2].shape[-2:])
        for i in (2, 1, 0):
            x = self.fuse[i](x, at[i], at[i - 1].shape[-2:] if i else (8 * h, 8 * w))
        x = F.interpolate(self.conv1(x), size=(16 * h, 16 * w), mode="bilinear", align_corners=True)
        return self.conv3(F.relu(self.conv2(x)))[..., : size[0], : size[1]]


def from_dpt(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the ``DPTOutputAdapter`` of MultiMAE and CroCo, which names its layers twice.

    The unit of the coarsest fusion that would read a finer map never runs and is left out.
    """
    theirs = Released(state_dict, "the authors' DPTOutputAdapter")
    theirs.leave(r"scratch\.layer\d_rn\..*|act_\d_postprocess\..*", "the same tensors as in the lists")
    theirs.leave(r"scratch\.refinenet4\.resConfUnit1\..*", "nothing finer than nothing: it never runs")
    out = theirs.renamed(
        {
            r"act_postprocess\.(\d\.\d\..*)": r"scales.\1",
            r"scratch\.layer_rn\.(\d\..*)": r"lateral.\1",
            r"head\.0\.(.*)": r"conv1.\1",
            r"head\.2\.(.*)": r"conv2.\1",
            r"head\.4\.(.*)": r"conv3.\1",
        }
    )
    for name, ours in (("resConfUnit1", "skip"), ("resConfUnit2", "unit"), ("out_conv", "out")):
        for match, value in theirs.matching(rf"scratch\.refinenet(\d)\.{name}\.(.*)"):
            out[f"fuse.{int(match[1]) - 1}.{ours}.{match[2]}"] = value
    return theirs.close(out)
