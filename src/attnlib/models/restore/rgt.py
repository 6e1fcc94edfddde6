"""RGT: rectangular windows, and attention to a map that one convolution made small again and again, by turns.

Chen et al., 2023, "Recursive Generalization Transformer for Image Super-Resolution", arXiv 2303.06373. A block is

    ``y = x + attention(norm(x));  y <- y + MLP(norm(y));  y + gamma x``

where the last term, hybrid adaptive integration, has one learned number per channel. Even blocks attend in
:mod:`attnlib.nn.partition.rgt`, odd ones in :mod:`attnlib.nn.reduced.rgt`. In the middle of the MLP half of the
channels are multiplied by a 3 x 3 depthwise convolution of the normed other half. Groups of blocks end in a convolution
and are residual; the image is super-resolved by pixel shuffles.

Windows are shifted in blocks 2, 6, ... of the groups with an even number, and in blocks 0, 4, ... of the others.

Differs from the authors' code: tiles with overlap are blended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_ints
from ...grids import Layout
from ...nn.base import Mechanism
from ...nn.layers import DepthwiseConv, LayerScale, zero_invalid
from ...nn.partition.rgt import RectangularAttention
from ...nn.reduced.rgt import RecursiveGeneralization
from ...nn.released import Released
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .base import Blocks, PixelShuffleHead, Restorer


class SpatialGateMlp(nn.Module):
    """``fc2(a * DWConv_3x3(norm(b)))`` with ``[a, b] = GELU(fc1(x))`` on (B, H, W, dim).

    Args:
        dim: width.
        ratio: width of ``a`` and ``b`` together over ``dim``.
    """

    def __init__(self, dim: int, ratio: float = 2.0):
        super().__init__()
        hidden = int(dim * ratio)
        if hidden < 2 or hidden % 2:
            raise ValueError(f"mlp_ratio={ratio} makes {hidden} hidden channels of {dim}; two halves are needed")
        self.fc1, self.act = nn.Linear(dim, hidden), nn.GELU()
        self.norm, self.conv = nn.LayerNorm(hidden // 2), DepthwiseConv(hidden // 2, 3)
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same; tokens outside ``valid`` are zeros to the convolution."""
        a, b = self.act(self.fc1(x)).chunk(2, -1)
        return self.fc2(a * self.conv(zero_invalid(self.norm(b), valid)))


class IntegratedBlock(Block):
    """A block that adds what it reads once more, by one learned number per channel."""

    def __init__(self, dim: int, mixer: nn.Module, gamma: float = 1e-4, **options: Any):
        super().__init__(dim, mixer, **options)
        self.again = LayerScale(dim, gamma)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, H, W, C) -> the same, and the carry for the next block."""
        y, carry = super().forward(x, valid, carry, losses, layout)
        return y + self.again(x), carry


class MapConv(nn.Sequential):
    """A 3 x 3 convolution of (B, H, W, dim), or three with a narrow middle (``"3conv"``)."""

    def __init__(self, dim: int, kind: str):
        check_choice("residual_conv", kind, ("1conv", "3conv"))
        if kind == "1conv":
            super().__init__(nn.Conv2d(dim, dim, 3, 1, 1))
        else:
            slope = 0.2
            super().__init__(
                nn.Conv2d(dim, dim // 4, 3, 1, 1), nn.LeakyReLU(slope), nn.Conv2d(dim // 4, dim // 4, 1),
                nn.LeakyReLU(slope), nn.Conv2d(dim // 4, dim, 3, 1, 1),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ResidualGroup(nn.Module):
    """Blocks and a convolution; residual."""

    def __init__(self, blocks: Sequence[nn.Module], conv: nn.Module):
        super().__init__()
        self.blocks, self.conv = Blocks(blocks), conv

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.blocks.run(x))


class RGT(Restorer):
    """An RGT: images ``(B, in_chans, H, W)`` to images ``scale`` times as large.

    Args:
        scale: 1, 2, 3, 4 or another power of two.
        embed_dim: width. Norms of the position bias have ``embed_dim / 32`` channels: below 96 they are of little use.
        depths: blocks per group.
        num_heads: heads per group, even numbers.
        split_size: sides of the rectangular windows.
        c_ratio: width of queries and keys of the recursive attention over ``embed_dim``.
        recursions: how often its convolution is applied; ``None``: by the size of the map.
        gamma: at the start, of what a block reads in what it gives.
        mlp_ratio: hidden width of MLPs, both halves, over the width.
        qkv_bias: bias of the query, key and value projections.
        residual_conv: at the end of groups and of the body: ``"1conv"`` or ``"3conv"``.
        compat: ``"authors"``: maps that windows or recursions do not divide are treated as released weights know it.
        mechanism: takes the place of both kinds of attention.
        in_chans: channels of images.
        img_range: largest value of a pixel.
        drop_path_rate: stochastic depth of the last block.
        drop_rate: dropout of what attention gives.
        attn_drop: dropout of attention weights.
    """

    input_name = "first.weight"

    def __init__(
        self,
        scale: int = 4,
        embed_dim: int = 180,
        depths: Sequence[int] = (6,) * 8,
        num_heads: Sequence[int] = (6,) * 8,
        split_size: Sequence[int] = (8, 32),
        c_ratio: float = 0.5,
        recursions: int | None = None,
        gamma: float = 1e-4,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = True,
        residual_conv: str = "1conv",
        compat: str | None = None,
        mechanism: Make | None = None,
        in_chans: int = 3,
        img_range: float = 1.0,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        attn_drop: float = 0.0,
    ):
        super().__init__(scale, in_chans, 1, img_range, align=math.lcm(*check_ints("split_size", split_size, least=1)))
        count = len(depths)
        shared: dict[str, Any] = dict(qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=drop_rate, compat=compat)

        def own(place: Place) -> Mechanism:
            if place.block % 2:
                return RecursiveGeneralization(place.dim, place.num_heads, c_ratio, recursions, **shared)
            shift = place.block % 4 == (0 if place.stage % 2 else 2)
            return RectangularAttention(place.dim, place.num_heads, split_size, shift, **shared)

        make = mechanism or own
        groups = []
        for row in places([embed_dim] * count, depths, num_heads, [1] * count, drop_path_rate):
            blocks = [
                IntegratedBlock(
                    embed_dim, make(p), gamma, mlp=SpatialGateMlp(embed_dim, mlp_ratio), drop_path=p.drop_path
                )
                for p in row
            ]
            groups.append(ResidualGroup(blocks, MapConv(embed_dim, residual_conv)))
        self.first = nn.Conv2d(in_chans, embed_dim, 3, 1, 1)
        self.norm_in = nn.LayerNorm(embed_dim)
        self.groups = nn.ModuleList(groups)
        self.norm = nn.LayerNorm(embed_dim)
        self.after = MapConv(embed_dim, residual_conv)
        self.head = PixelShuffleHead(embed_dim, in_chans, scale)
        init_weights(self, also=(RectangularAttention, RecursiveGeneralization))

    def body(self, x: Tensor) -> Tensor:
        first = self.first(x).permute(0, 2, 3, 1)
        y = self.norm_in(first)
        for group in self.groups:
            y = group(y)
        y = self.after(self.norm(y)) + first
        return self.head(y.permute(0, 3, 1, 2))


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``RGT``."""
    theirs = Released(state_dict, "the authors' RGT")
    block, ours = r"layers\.(\d+)\.blocks\.(\d+)\.", r"groups.\1.blocks.\2"

    def attention(part: dict[str, Tensor]) -> dict[str, Tensor]:
        made = RecursiveGeneralization if "reduction1.weight" in part else RectangularAttention
        return made.convert_state_dict(part)

    out = theirs.parts(block + r"attn\.(.+)", ours + ".mixer.inner", attention)
    out |= theirs.renamed(
        {
            block + r"norm1\.(weight|bias)": ours + r".mixer.norm.\3",
            block + r"norm2\.(weight|bias)": ours + r".mlp.norm.\3",
            block + r"mlp\.(fc[12])\.(weight|bias)": ours + r".mlp.inner.\3.\4",
            block + r"mlp\.sg\.(norm|conv)\.(weight|bias)": ours + r".mlp.inner.\3.\4",
            block + r"gamma": ours + r".again.gamma",
            r"layers\.(\d+)\.conv\.(weight|bias)": r"groups.\1.conv.0.\2",
            r"layers\.(\d+)\.conv\.(\d)\.(weight|bias)": r"groups.\1.conv.\2.\3",
            r"conv_first\.(weight|bias)": r"first.\1",
            r"before_RG\.1\.(weight|bias)": r"norm_in.\1",
            r"norm\.(weight|bias)": r"norm.\1",
            r"conv_after_body\.(weight|bias)": r"after.0.\1",
            r"conv_after_body\.(\d)\.(weight|bias)": r"after.\1.\2",
            **PixelShuffleHead.RULES,
        }
    )
    return theirs.close(out)


_SIZES: dict[str, dict[str, Any]] = {
    f"{name}_x{scale}": {**size, "scale": scale, "compat": "authors"}
    for name, size in (("rgt_s", dict(depths=(6,) * 6, num_heads=(6,) * 6)), ("rgt", {}))
    for scale in (2, 3, 4)
}

register_models(
    "rgt",
    RGT,
    _SIZES,
    params={"rgt_s_x4": 10_198_767, "rgt_x4": 13_365_543},
    license="Apache-2.0",
    source="zhengchen1999/RGT",
    convert=convert,
    img_size=64,
    task="restore",
)
