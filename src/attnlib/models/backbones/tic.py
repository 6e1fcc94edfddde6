"""TiC: stages of attention that goes over the map as a convolution does, on images of any size.

Zhang et al., 2023, "TiC: Exploring Vision Transformer in Convolution", arXiv 2310.04134. A block is attention under a
kernel and the convolution behind it, which is the MLP and, with a stride, the downsampling:

    y = ReLU(norm(conv_k(attend(x) + x)))

Nothing depends on the size of the image: keys beyond the border are zeros, and there is no table of places.

The authors released the operator of a block (:class:`attnlib.nn.local.tic_msa_conv.MSAConv`), not the network. What
stands around it here is our reading, each part an option: stages of halving maps, BatchNorm behind convolutions
(``norm``; the released block has none), the multi-directional cyclic shift of three quarters of the heads by half of
the map (``shift``) and inter-pooling, means of 3 x 3 tokens between blocks that keep the size of the map
(``inter_pool``, ``pool_every``). Widths and depths are ours as well, so that there are no weights to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int
from ...nn.base import Mechanism
from ...nn.layers import ConvNorm, DropPath, Patchify, init_fan_out, strided_valid, zero_invalid
from ...nn.local.tic_msa_conv import MSAConv
from ..blocks import Make, Place, add_losses, init_weights, mix, places
from ..build import register_models
from .convs import ConvStage, Relu
from .stages import Backbone, Head


class NearMeans(nn.Module):
    """Means of ``side x side`` tokens around every token, of those that exist and lie on the map.

    >>> import torch
    >>> NearMeans(3)(torch.tensor([0.0, 3.0, 9.0]).view(1, 1, 3, 1)).flatten().tolist()
    [1.5, 4.0, 6.0]
    """

    def __init__(self, side: int):
        super().__init__()
        self.side = check_int("inter_pool", side, least=1)
        if side % 2 == 0:
            raise ValueError(f"inter_pool={side} is not possible; choose an odd number, or 0 for none")

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, C) -> the same."""
        exists = x.new_ones(1, 1, *x.shape[1:3]) if valid is None else valid.unsqueeze(1).to(x.dtype)
        window: Any = (self.side, 1, self.side // 2)
        sums = F.avg_pool2d(zero_invalid(x, valid).permute(0, 3, 1, 2), *window)
        shares = F.avg_pool2d(exists, *window)
        return (sums / shares.masked_fill(shares == 0, 1.0)).permute(0, 2, 3, 1)


class TiCBlock(nn.Module):
    """``[near means], mixer + x, convolution with norm and ReLU``; a block of a :class:`.convs.ConvStage`.

    Args:
        dim: channels in.
        out_dim: channels out.
        mixer: the mechanism.
        kernel_size: side of the convolution.
        stride: of the convolution.
        norm: BatchNorm behind the convolution.
        inter_pool: side of the near means before the block; 0 for none.
        drop_path: stochastic depth of the mixer.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        mixer: nn.Module,
        kernel_size: int = 3,
        stride: int = 1,
        norm: bool = True,
        inter_pool: int = 0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.stride = stride
        self.pool = NearMeans(inter_pool) if inter_pool else None
        self.mixer = mixer
        self.conv = ConvNorm(dim, out_dim, kernel_size, stride, norm=norm, activation=Relu)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """(B, H, W, dim) -> (B, ceil(H / s), ceil(W / s), out_dim), which of these exist, and the carry."""
        x = zero_invalid(x, valid)
        if self.pool is not None:
            x = self.pool(x, valid)
        if isinstance(self.mixer, Mechanism):
            y, carry, own = mix(self.mixer, x, None, carry, valid)
            add_losses(losses, own)
        else:
            y = self.mixer(x, valid)
        if self.stride > 1:  # what is carried belongs to the finer grid
            carry = None
        return self.conv(x + self.drop_path(y), valid), strided_valid(valid, self.stride), carry


def tic(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (4, 4, 8, 16),
    kernel_size: int = 3,
    dilation: int = 1,
    shift: float = 0.5,
    inter_pool: int = 3,
    pool_every: int = 2,
    norm: bool = True,
    border: str = "zeros",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A TiC.

    Args:
        embed_dims, depths, num_heads: width, blocks and heads per stage; the first block of a stage after the first
            strides, with the width and heads of the stage before.
        kernel_size: side of the kernels of attention and of the convolutions, odd.
        dilation, shift, border: of :class:`attnlib.nn.local.tic_msa_conv.MSAConv`.
        inter_pool: side of the near means between blocks; 0 for none.
        pool_every: every so many blocks of a stage there is one, none before its first.
        norm: BatchNorm behind the convolutions.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_int("inter_pool", inter_pool, least=0)
    check_int("pool_every", pool_every, least=1)
    check_flag("norm", norm)
    reductions = [4 * 2**i for i in range(len(embed_dims))]

    def own(place: Place) -> nn.Module:
        settings: dict[str, Any] = dict(dilation=dilation, border=border, shift=shift, conv=False)
        return MSAConv(place.dim, place.num_heads, kernel_size, **settings)

    make = mechanism or own
    stages, before = [], Place(embed_dims[0], num_heads[0], stride=4)
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        blocks: list[nn.Module] = []
        for place in row:
            strides = place.stage > 0 and place.block == 0
            # A striding block mixes the map of the stage before.
            at = replace(place, dim=before.dim, num_heads=before.num_heads, stride=before.stride) if strides else place
            pooled = inter_pool if place.block and place.block % pool_every == 0 else 0
            blocks.append(
                TiCBlock(at.dim, place.dim, make(at), kernel_size, 2 if strides else 1, norm, pooled, place.drop_path)
            )
        stages.append(ConvStage(blocks))
        before = row[-1]
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    stem = Patchify(in_chans, embed_dims[0], 4)
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    init_weights(model, also=(MSAConv,))
    for module in model.modules():
        if isinstance(module, TiCBlock):
            init_fan_out(module.conv.conv)
    return model


_SIZES: dict[str, dict[str, Any]] = {
    "tic_tiny": dict(embed_dims=(32, 64, 128, 256), num_heads=(4, 4, 4, 8), depths=(2, 2, 4, 2)),
    "tic_small": dict(embed_dims=(64, 128, 256, 512), num_heads=(4, 4, 8, 16), depths=(2, 2, 6, 2)),
    "tic_base": dict(embed_dims=(96, 192, 384, 768), num_heads=(4, 8, 12, 24), depths=(2, 2, 6, 2)),
}

register_models("tic-msa-conv", tic, _SIZES, source="zs670980918/MSA-Conv")
