"""HAT: windows with channel attention beside them, and overlapping windows at the end of every group.

Chen et al., 2023, "HAT: Hybrid Attention Transformer for Image Restoration", arXiv 2309.05239. A block is

    ``u = norm(x);  x <- x + attention(u) + alpha CAB(u);  x <- x + MLP(norm(x))``

with attention in windows, shifted by half a window in every second block, and ``CAB`` two 3 x 3 convolutions with a
squeeze in between and channel gates behind. After the blocks of a group come :mod:`attnlib.nn.local.hat` and an MLP of
their own, and a convolution; groups are residual. The image is super-resolved by pixel shuffles.

Differs from the authors' code: any size (padded by reflection, as in their scripts), tiles with overlap that are
blended; no absolute position embedding (no released model has one).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...nn.layers import ConvNorm, DropPath, Mlp, SqueezeExcite
from ...nn.local.hat import OverlappingCrossAttention
from ...nn.partition.maxvit import PartitionAttention
from ...nn.released import Released
from ..blocks import Make, Place, Residual, init_weights, mix, places
from ..build import register_models
from .base import Blocks, PixelShuffleHead, Restorer


class ConvChannelAttention(nn.Module):
    """CAB: 3 x 3 convolution to ``dim / compress``, GELU, 3 x 3 convolution back, channel gates."""

    def __init__(self, dim: int, compress: int = 3, squeeze: int = 30):
        super().__init__()
        self.down = ConvNorm(dim, dim // compress, 3, norm=False, bias=True, activation=nn.GELU)
        self.up = ConvNorm(dim // compress, dim, 3, norm=False, bias=True)
        self.gate = SqueezeExcite(dim, dim // squeeze)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.up(self.down(x)))


class HybridBlock(nn.Module):
    """Window attention and channel attention of the same normed map, then an MLP."""

    def __init__(
        self, dim: int, attention: nn.Module, cab: ConvChannelAttention, alpha: float, mlp_ratio: float,
        drop_path: float = 0.0, drop: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.norm, self.attention, self.cab, self.alpha = nn.LayerNorm(dim), attention, cab, alpha
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.mlp = Residual(dim, Mlp(dim, mlp_ratio, drop=drop, drop_hidden=True), drop_path=drop_path)

    def forward(self, x: Tensor) -> Tensor:
        u = self.norm(x)
        x = x + self.drop_path(mix(self.attention, u)[0]) + self.alpha * self.cab(u)
        return self.mlp(x)[0]


class HybridGroup(nn.Module):
    """Blocks, overlapping windows, convolution; residual."""

    def __init__(self, blocks: Sequence[nn.Module], overlap: nn.Module, dim: int, mlp_ratio: float, convolve: bool):
        super().__init__()
        self.blocks = Blocks(blocks)
        self.overlap = Residual(dim, overlap)
        self.overlap_mlp = Residual(dim, Mlp(dim, mlp_ratio))
        self.conv = ConvNorm(dim, dim, 3, norm=False, bias=True) if convolve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks.run(x)
        y = self.overlap_mlp(self.overlap(y)[0])[0]
        return x + self.conv(y)


class HAT(Restorer):
    """A HAT: images ``(B, in_chans, H, W)`` to images ``scale`` times as large.

    Args:
        scale: 1, 2, 3, 4 or another power of two.
        embed_dim: width.
        depths: blocks per group.
        num_heads: heads per group.
        window_size: side of windows.
        compress_ratio: of the convolutions of channel attention.
        squeeze_factor: of its gates.
        alpha: weight of channel attention.
        overlap_ratio: of the overlapping windows.
        mlp_ratio: hidden width of MLPs over the width.
        residual_conv: convolutions at the end of groups and of the body.
        compat: ``"authors"``: keys outside the map are zeros that take part, as released weights know it.
        mechanism: takes the place of attention in windows.
        in_chans: channels of images.
        img_range: largest value of a pixel.
        drop_path_rate: stochastic depth of the last block.
        drop_rate: dropout of the first map and in MLPs.
    """

    input_name = "first.conv.weight"

    def __init__(
        self,
        scale: int = 4,
        embed_dim: int = 180,
        depths: Sequence[int] = (6,) * 6,
        num_heads: Sequence[int] = (6,) * 6,
        window_size: int = 16,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        alpha: float = 0.01,
        overlap_ratio: float = 0.5,
        mlp_ratio: float = 2.0,
        residual_conv: bool = True,
        compat: str | None = None,
        mechanism: Make | None = None,
        in_chans: int = 3,
        img_range: float = 1.0,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
    ):
        super().__init__(scale, in_chans, window_size, img_range)
        self.window_size, self.overlap_ratio = window_size, overlap_ratio
        count = len(depths)
        rows = places([embed_dim] * count, depths, num_heads, [1] * count, drop_path_rate)

        def own(place: Place) -> nn.Module:
            shift = window_size // 2 if place.block % 2 else 0
            return PartitionAttention(place.dim, place.num_heads, window_size, rank=2, shift=shift)

        make, groups = mechanism or own, []
        for row in rows:
            blocks = [
                HybridBlock(
                    embed_dim, make(p), ConvChannelAttention(embed_dim, compress_ratio, squeeze_factor), alpha,
                    mlp_ratio, p.drop_path, drop_rate,
                )
                for p in row
            ]  # fmt: skip
            heads = row[0].num_heads
            overlap = OverlappingCrossAttention(embed_dim, heads, window_size, overlap_ratio, compat=compat)
            groups.append(HybridGroup(blocks, overlap, embed_dim, mlp_ratio, residual_conv))
        self.first = ConvNorm(in_chans, embed_dim, 3, norm=False, bias=True)
        self.norm_in = nn.LayerNorm(embed_dim)
        self.drop = nn.Dropout(drop_rate)
        self.groups = nn.ModuleList(groups)
        self.norm = nn.LayerNorm(embed_dim)
        self.after = ConvNorm(embed_dim, embed_dim, 3, norm=False, bias=True) if residual_conv else nn.Identity()
        self.head = PixelShuffleHead(embed_dim, in_chans, scale)
        init_weights(self)

    def body(self, x: Tensor) -> Tensor:
        first = self.first(x.permute(0, 2, 3, 1))
        y = self.drop(self.norm_in(first))
        for group in self.groups:
            y = group(y)
        y = self.after(self.norm(y)) + first
        return self.head(y.permute(0, 3, 1, 2))


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``HAT``."""
    theirs = Released(state_dict, "the authors' HAT")
    theirs.leave(r"relative_position_index_(?:SA|OCA)", because="constants")
    group, block = r"layers\.(\d+)\.residual_group\.", r"blocks\.(\d+)\."

    def overlap(part: dict[str, Tensor]) -> dict[str, Tensor]:
        return OverlappingCrossAttention.convert_state_dict(part, model.window_size, model.overlap_ratio)

    def windows(part: dict[str, Tensor]) -> dict[str, Tensor]:
        part["rel_pos.relative_position_bias_table"] = part.pop("relative_position_bias_table")
        return PartitionAttention.convert_state_dict(part)

    out = theirs.parts(group + block + r"attn\.(.+)", r"groups.\1.blocks.\2.attention", windows)
    out |= theirs.parts(
        group + r"overlap_attn\.((?:qkv|proj)\..+|relative_position_bias_table)", r"groups.\1.overlap.inner", overlap
    )

    def gates(name: str) -> Any:
        # 1 x 1 convolutions are linear maps here
        return lambda m, t: {f"groups.{m[1]}.blocks.{m[2]}.cab.gate.{name}.{m[3]}": t.flatten(1) if t.dim() > 1 else t}

    cab = group + block + r"conv_block\.cab\."
    out |= theirs.renamed(
        {
            cab + r"0\.(weight|bias)": r"groups.\1.blocks.\2.cab.down.conv.\3",
            cab + r"2\.(weight|bias)": r"groups.\1.blocks.\2.cab.up.conv.\3",
            cab + r"3\.attention\.1\.(weight|bias)": gates("fc1"),
            cab + r"3\.attention\.3\.(weight|bias)": gates("fc2"),
            group + block + r"norm1\.(weight|bias)": r"groups.\1.blocks.\2.norm.\3",
            group + block + r"norm2\.(weight|bias)": r"groups.\1.blocks.\2.mlp.norm.\3",
            group + block + r"mlp\.(fc[12]\.\w+)": r"groups.\1.blocks.\2.mlp.inner.\3",
            group + r"overlap_attn\.norm1\.(weight|bias)": r"groups.\1.overlap.norm.\2",
            group + r"overlap_attn\.norm2\.(weight|bias)": r"groups.\1.overlap_mlp.norm.\2",
            group + r"overlap_attn\.mlp\.(fc[12]\.\w+)": r"groups.\1.overlap_mlp.inner.\2",
            r"layers\.(\d+)\.conv\.(weight|bias)": r"groups.\1.conv.conv.\2",
            r"conv_first\.(weight|bias)": r"first.conv.\1",
            r"patch_embed\.norm\.(weight|bias)": r"norm_in.\1",
            r"norm\.(weight|bias)": r"norm.\1",
            r"conv_after_body\.(weight|bias)": r"after.conv.\1",
            **PixelShuffleHead.RULES,
        }
    )
    return theirs.close(out)


_SMALL: dict[str, Any] = dict(embed_dim=144, compress_ratio=24, squeeze_factor=24)
_LARGE: dict[str, Any] = dict(depths=(6,) * 12, num_heads=(6,) * 12)
_SIZES: dict[str, dict[str, Any]] = {
    f"{name}_x{scale}": {**size, "scale": scale, "compat": "authors"}
    for name, size in (("hat_s", _SMALL), ("hat", {}), ("hat_l", _LARGE))
    for scale in (2, 3, 4)
}

register_models(
    "hat",
    HAT,
    _SIZES,
    params={"hat_s_x4": 9_621_183, "hat_x4": 20_772_507, "hat_l_x4": 40_846_575},
    license="Apache-2.0",
    source="XPixelGroup/HAT",
    convert=convert,
    img_size=64,
    task="restore",
)
