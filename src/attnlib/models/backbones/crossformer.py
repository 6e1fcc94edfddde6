"""CrossFormer: tokens of patches of several sizes, attention in near groups and in far groups by turns.

Wang et al., 2021, "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", arXiv 2108.00154;
2023, "CrossFormer++", arXiv 2303.06908. A token is made of patches of 4, 8, 16 and 32 pixels with one centre, between
stages of 2 and 4 tokens behind a norm. Every block is attention and an MLP, each behind a norm; in every stage the
first block has near groups, the second far ones. CrossFormer++ begins with small groups and, behind every third block
but the last of a stage, puts a cooling layer in the place of what it reads: a depthwise 3 x 3 convolution and a norm,
without a shortcut.

Differs from the authors' classification class: any size. What a group is follows each map as that class sets it for the
size it was built for; odd maps get a row or column of zeros before patches are merged, where theirs stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_ints
from ...grids import Layout
from ...nn.layers import CrossScale, DepthwiseConv, zero_invalid
from ...nn.partition.crossformer import LongShortAttention
from ...nn.released import Released
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage


class CooledBlock(Block):
    """A block and, behind it, ``norm(conv(x))`` in the place of ``x``: a depthwise 3 x 3 convolution."""

    def __init__(self, dim: int, mixer: nn.Module, **options: Any):
        super().__init__(dim, mixer, **options)
        self.cooling, self.cooling_norm = DepthwiseConv(dim, 3), nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:
        """(B, H, W, C) -> the same, and the carry for the next block."""
        x, carry = super().forward(x, valid, carry, losses, layout)
        return self.cooling_norm(self.cooling(zero_invalid(x, valid))), carry


def _per_stage(name: str, given: int | Sequence[int], count: int) -> tuple[int, ...]:
    sizes = (given,) * count if isinstance(given, int) else tuple(given)
    if len(sizes) != count:
        raise ValueError(f"{name}={given} must have one number for each of {count} stages")
    return check_ints(name, sizes, least=1)


def crossformer(
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    group_size: int | Sequence[int] = 7,
    interval: int | Sequence[int] | None = (8, 4, 2, 1),
    patch_sizes: Sequence[int] = (4, 8, 16, 32),
    merge_sizes: Sequence[int] = (2, 4),
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    cooling: bool = False,
    pad: str = "mask",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A CrossFormer.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        group_size: tokens per side of a group, the same or per stage.
        interval: how far apart tokens of far groups lie, the same or per stage; ``None``: as far as one group reaches
            over the map.
        patch_sizes: pixels per side of the patches that make a token; the first is the stride.
        merge_sizes: the same between stages, in tokens; the stride is 2.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: bias of the query, key and value projections.
        cooling: layers of CrossFormer++ that replace what the residual branches add up to.
        pad: of maps that groups do not divide, as of :class:`attnlib.nn.partition.crossformer.LongShortAttention`.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(embed_dims)
    patches, merged = (
        check_ints(n, g, least=1) for n, g in (("patch_sizes", patch_sizes), ("merge_sizes", merge_sizes))
    )
    groups = _per_stage("group_size", group_size, count)
    intervals = (None,) * count if interval is None else _per_stage("interval", interval, count)
    reductions = [patches[0] * 2**i for i in range(count)]

    def own(place: Place) -> nn.Module:
        return LongShortAttention(
            place.dim, place.num_heads, groups[place.stage], ("near", "far")[place.block % 2], intervals[place.stage],
            qkv_bias=qkv_bias, pad=pad,
        )  # fmt: skip

    make = mechanism or own
    stem = CrossScale(in_chans, embed_dims[0], patches)
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        between: nn.Module | None = None
        if row[0].stage:
            between = CrossScale(embed_dims[row[0].stage - 1], row[0].dim, merged, 2, norm_first=True)
        blocks = []
        for p in row:
            cooled = cooling and p.block % 3 == 2 and p.block < p.stage_depth - 1
            blocks.append(
                (CooledBlock if cooled else Block)(p.dim, make(p), mlp_ratio=mlp_ratio, drop_path=p.drop_path)
            )
        stages.append(Stage(blocks, between))
    head = Head(embed_dims[-1], num_classes, global_pool, None, drop_rate)
    model = Backbone(
        stem, stages, embed_dims, reductions, nn.LayerNorm(embed_dims[-1]), head, num_classes, in_chans, img_size
    )
    model.input_name = "stem.projs.0.weight"
    model.more_inputs = tuple(f"stem.projs.{i}.weight" for i in range(1, len(patches)))
    init_weights(model, also=(LongShortAttention,))
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``CrossFormer``, also that of CrossFormer++."""
    theirs = Released(state_dict, "CrossFormer")
    block = r"layers\.(\d+)\.blocks\.(\d+)"
    theirs.leave(rf"{block}\.attn_mask", because="a constant of one size of images")
    ours = r"stages.\1.blocks.\2"
    out = theirs.parts(rf"{block}\.attn\.(.+)", f"{ours}.mixer.inner", LongShortAttention.convert_state_dict)
    out |= theirs.renamed(
        {
            rf"{block}\.norm1\.(weight|bias)": rf"{ours}.mixer.norm.\3",
            rf"{block}\.norm2\.(weight|bias)": rf"{ours}.mlp.norm.\3",
            rf"{block}\.mlp\.(fc[12])\.(weight|bias)": rf"{ours}.mlp.inner.\3.\4",
            rf"{block}\.ex_conv\.(weight|bias)": rf"{ours}.cooling.\3",
            rf"{block}\.ex_ln\.(weight|bias)": rf"{ours}.cooling_norm.\3",
            r"patch_embed\.(.+)": r"stem.\1",
            # Theirs end a stage with what ours begin the next one with.
            r"layers\.(\d+)\.downsample\.(?:reductions\.(\d+)|norm)\.(weight|bias)": lambda match, value: {
                f"stages.{int(match[1]) + 1}.downsample."
                + (f"projs.{match[2]}" if match[2] else "norm")
                + f".{match[3]}": value
            },
            r"norm\.(weight|bias)": r"norm.\1",
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out)


def _widths(first: int) -> dict[str, Any]:
    return dict(embed_dims=tuple(first * 2**i for i in range(4)), num_heads=tuple(first // 32 * 2**i for i in range(4)))


_PP: dict[str, Any] = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), cooling=True)
_SIZES: dict[str, dict[str, Any]] = {
    "crossformer_tiny": dict(**_widths(64), depths=(1, 1, 8, 6), drop_path_rate=0.1),
    "crossformer_small": dict(**_widths(96), depths=(2, 2, 6, 2), drop_path_rate=0.2),
    "crossformer_base": dict(**_widths(96), depths=(2, 2, 18, 2), drop_path_rate=0.3),
    "crossformer_large": dict(**_widths(128), depths=(2, 2, 18, 2), drop_path_rate=0.5),
    "crossformer_pp_small": dict(**_widths(64), **_PP, depths=(2, 2, 18, 2), drop_path_rate=0.2),
    "crossformer_pp_base": dict(**_widths(96), **_PP, depths=(2, 2, 18, 2), drop_path_rate=0.3),
    "crossformer_pp_large": dict(**_widths(128), **_PP, depths=(2, 2, 18, 2), drop_path_rate=0.5),
    "crossformer_pp_huge": dict(**_widths(128), **_PP, depths=(6, 6, 18, 2), drop_path_rate=0.5),
}

register_models(
    "crossformer",
    crossformer,
    _SIZES,
    params={
        "crossformer_tiny": 27_776_794, "crossformer_small": 30_657_394, "crossformer_base": 51_971_554,
        "crossformer_large": 91_971_184, "crossformer_pp_small": 23_325_340, "crossformer_pp_base": 51_994_594,
        "crossformer_pp_large": 92_001_904, "crossformer_pp_huge": 95_962_944,
    },
    license="MIT",
    source="cheerss/CrossFormer",
    convert=convert,
)  # fmt: skip
