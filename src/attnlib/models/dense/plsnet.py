"""PLS-Net: a light network for volumes, of separable convolutions that dilate within dense residual blocks.

Lee et al., 2019, "Efficient 3D Fully Convolutional Networks for Pulmonary Lobe Segmentation in CT Images", arXiv
1909.07474, as it lies beside AGUNet and DAUNet in their release (dbouget/mri_brain_tumor_segmentation), in PyTorch.
``sep`` is a depthwise convolution of 3, a pointwise one, BatchNorm and ReLU. Every level of the encoder is
``[sep_stride 2(x), the image at that size]`` and blocks

    ``h_0 = x``,  ``h_i = [sep_dilation i(h_{i-1}), h_{i-1}]``,  ``y = x + W h_4``;

the way up is ``sep`` to twice as many channels as classes, twice as large, beside the skip through one more ``sep``.

Differs from the release: logits instead of shares; volumes and images of any size, which come back at theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_ints, describe
from ...nn.released import Released, Rule
from ..build import register_models
from ..losses import dice_loss
from ..protocol import TaskModel
from ..tiles import tiled
from .context import CONV, NORM, resized_maps


def _separable(rank: int, dim: int, out_dim: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Depthwise, pointwise, BatchNorm, ReLU."""
    depthwise = CONV[rank](dim, dim, 3, stride, dilation, dilation, dim, bias=False)
    return nn.Sequential(depthwise, CONV[rank](dim, out_dim, 1, bias=False), NORM[rank](out_dim), nn.ReLU())


class DenseDilated(nn.Module):
    """Separable convolutions that see 1, 2, 3 and so on places far, each beside all before it, and a residual.

    Args:
        rank: axes of the grid.
        dim: channels in and out.
        growth: channels of each.
        depth: how many.

    >>> DenseDilated(3, 6, 2).eval()(torch.zeros(1, 6, 4, 5, 3)).shape
    torch.Size([1, 6, 4, 5, 3])
    """

    def __init__(self, rank: int, dim: int, growth: int = 12, depth: int = 4):
        super().__init__()
        check_choice("rank", rank, (2, 3))
        for name, value in (("dim", dim), ("growth", growth), ("depth", depth)):
            check_int(name, value, least=1)
        self.layers = nn.ModuleList(_separable(rank, dim + i * growth, growth, dilation=i + 1) for i in range(depth))
        self.out = CONV[rank](dim + depth * growth, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, *grid) to the same."""
        held = x
        for layer in self.layers:
            held = torch.cat([layer(held), held], 1)
        made: Tensor = x + self.out(held)
        return made


class PLSNet(TaskModel):
    """Images or volumes (B, in_chans, *grid) to logits (B, num_classes, *grid), for any grid.

    Args:
        in_chans: channels of images.
        num_classes: with the background, 2 or more.
        dims: channels of the levels, without those of the image.
        depths: blocks of the levels.
        growth: channels that each layer of a block adds.
        rank: axes of the grid, 2 or 3.
        ignore_index: the label of places that have none.

    >>> PLSNet(dims=(4, 8, 8), growth=2).eval()(torch.zeros(1, 1, 9, 12, 8)).shape
    torch.Size([1, 2, 9, 12, 8])
    """

    head_names: Sequence[str] = ("head.",)

    def __init__(
        self, in_chans: int = 1, num_classes: int = 2, dims: Sequence[int] = (16, 64, 128),
        depths: Sequence[int] = (1, 2, 4), growth: int = 12, rank: int = 3, ignore_index: int = 255,
    ):  # fmt: skip
        super().__init__()
        check_choice("rank", rank, (2, 3))
        self.rank, self.in_chans = rank, check_int("in_chans", in_chans, least=1)
        self.num_classes = check_int("num_classes", num_classes, least=2)
        self.ignore_index = check_int("ignore_index", ignore_index)
        dims, depths = check_ints("dims", dims, least=1), check_ints("depths", depths, least=1)
        if len(depths) != len(dims) or not dims:
            raise ValueError(f"depths must hold one for each of dims={tuple(dims)}, got {tuple(depths)}")
        widths = [d + in_chans for d in dims]
        self.down = nn.ModuleList(
            _separable(rank, before, dim, 2) for before, dim in zip([in_chans, *widths], dims, strict=False)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(*(DenseDilated(rank, width, growth) for _ in range(depth)))
            for width, depth in zip(widths, depths, strict=True)
        )
        few = 2 * num_classes
        self.skips = nn.ModuleList(_separable(rank, width, few) for width in widths[:-1])
        self.up = nn.ModuleList(
            _separable(rank, widths[-1] if i == len(dims) - 1 else 2 * few, few) for i in range(len(dims))
        )
        self.head = CONV[rank](few, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, *grid)."""
        if not isinstance(x, Tensor) or x.dim() != 2 + self.rank or x.shape[1] != self.in_chans:
            axes = "H, W" if self.rank == 2 else "D, H, W"
            raise ValueError(f"x must be (B, {self.in_chans}, {axes}), got {describe(x)}")
        if not x.is_floating_point() or not x.shape[2:].numel():
            raise ValueError(f"x must be floating point with at least one pixel, got {describe(x)}")
        maps, y = [], x
        for down, block in zip(self.down, self.blocks, strict=True):
            y = down(y)
            y = block(torch.cat([y, resized_maps(x, y.shape[2:])], 1))
            maps.append(y)
        grids = [x.shape[2:], *(m.shape[2:] for m in maps[:-1])]
        for i in reversed(range(len(self.up))):
            y = resized_maps(self.up[i](y), grids[i])
            if i:
                y = torch.cat([y, self.skips[i - 1](maps[i - 1])], 1)
        logits: Tensor = self.head(y)
        return logits

    def loss(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """``dice`` of the foreground.

        Args:
            prediction: of :meth:`forward`.
            target: (B, *grid) classes; ``ignore_index`` where there is none.
        """
        return {"dice": dice_loss(prediction, target, ignore_index=self.ignore_index)}

    def predict(self, x: Tensor, *, tile: int | Sequence[int] | None = None, overlap: int = 32) -> Tensor:
        """Classes (B, *grid).

        Args:
            x: (B, in_chans, *grid).
            tile, overlap: of :func:`attnlib.models.tiles.tiled`, where it does not fit memory.
        """
        return tiled(self, x, tile, overlap=overlap, align=2 ** len(self.up)).argmax(1)


def convert(state_dict: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the release's ``PLS``."""
    theirs = Released(state_dict, "the release's PLS")
    held = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    parts = {"dConv": 0, "conv": 1, "norm": 2}

    def rules(before: str, ours: str) -> dict[str, Rule]:
        return {rf"{before}\.{name}\.{held}": f"{ours}.{at}.\\g<1>" for name, at in parts.items()}

    found: dict[str, Rule] = {r"decoder_l0\.(weight|bias)": r"head.\1"}
    for i, depth in enumerate(map(len, model.blocks), 1):
        found |= rules(f"ds_conv_{i}", f"down.{i - 1}") | rules(rf"decoder_l{i}\.ds_conv", f"up.{i - 1}")
        found |= rules(f"ds_bridge_l{i}", f"skips.{i - 1}")
        for j in range(depth):
            block = f"drdb_{i}" if depth == 1 else f"drdb_{i}_{j + 1}"
            found[rf"{block}\.conv\.(weight|bias)"] = rf"blocks.{i - 1}.{j}.out.\1"
            for k in range(len(model.blocks[i - 1][j].layers)):
                found |= rules(rf"{block}\.ds_conv_{k + 1}", f"blocks.{i - 1}.{j}.layers.{k}")
    return theirs.close(theirs.renamed(found))


register_models(
    "meningioma-agunet-daunet",
    PLSNet,
    {"plsnet": dict(in_chans=1)},
    source="dbouget/mri_brain_tumor_segmentation",
    convert=convert,
    task="segment",
)
