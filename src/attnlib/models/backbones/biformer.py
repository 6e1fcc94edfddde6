"""BiFormer: regions route to regions in the first stages, every token reads every other in the last.

Zhu et al., 2023, "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810. Two 3 x 3
convolutions of stride 2 make tokens, one lies between stages, each with a BatchNorm. A block is ``x + conv(x)``,
attention and an MLP; regions are 1/7 of the map a side and read 1, 4 and 16 of them in the three stages that route. The
STL models have the layout of Swin-T: 4 x 4 patches, 2 x 2 convolutions behind a BatchNorm, no convolutions in blocks.

Differs from the authors' code: any size. Maps that regions do not divide are padded with tokens that count for nothing,
where theirs refuse them; ``compat="authors"`` is their ``auto_pad``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice
from ...nn.dense.attention_lepe import AttentionLePE
from ...nn.layers import ConvNorm, MapNorm, Mlp, Patchify, strided_valid
from ...nn.released import Released, Rule
from ...nn.sparse.biformer import BiLevelRoutingAttention
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage

LAYOUTS = ("conv", "stl", "stl-nchw")


class Convolutions(nn.Module):
    """Strided convolutions with BatchNorm one after another, an activation between them."""

    def __init__(self, widths: Sequence[int], kernel_size: int = 3, stride: int = 2, padding: int = 1):
        super().__init__()
        last = len(widths) - 2
        self.convs = nn.ModuleList(
            ConvNorm(a, b, kernel_size, stride, padding, bias=True, activation=None if i == last else nn.GELU)
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.stride = stride

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        for conv in self.convs:
            x, valid = conv(x, valid), strided_valid(valid, self.stride)
        return x, valid


def biformer(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 8, 2),
    topks: Sequence[int] = (1, 4, 16, -2),
    n_win: int | Sequence[int] = 7,
    head_dim: int = 32,
    dense_heads: int = 8,
    side_dwconv: int = 5,
    mlp_ratio: float = 3.0,
    mlp_dwconv: bool = False,
    layer_scale: float | None = None,
    layout: str = "conv",
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A BiFormer.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        topks: regions that a region reads, per stage; -1 for dense attention, -2 for that with LePE.
        n_win: regions per side.
        head_dim: width of a head where regions route.
        dense_heads: heads where attention is dense.
        side_dwconv: side of LePE's convolution.
        mlp_ratio: hidden width of MLPs over the width.
        mlp_dwconv: a depthwise 3 x 3 convolution in MLPs.
        layer_scale: start of the learned scales; ``None`` for none.
        layout: ``"conv"``; ``"stl"`` for that of Swin-T; ``"stl-nchw"``, whose dense attention always has LePE, of
            values.
        compat: of :class:`attnlib.nn.sparse.biformer.BiLevelRoutingAttention`, for maps that regions do not divide.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_choice("layout", layout, LAYOUTS)
    if len(topks) != len(embed_dims) or any(k < -2 or k == 0 for k in topks):
        raise ValueError(
            f"topks={tuple(topks)} must have one number for each of {len(embed_dims)} stages: 1 or more, -1 or -2"
        )
    for dim in embed_dims:
        if dim % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide embed_dims={tuple(embed_dims)}")
    reductions = [4 * 2**i for i in range(len(embed_dims))]
    nchw = layout == "stl-nchw"

    def own(place: Place) -> nn.Module:
        topk = topks[place.stage]
        if topk > 0:
            return BiLevelRoutingAttention(
                place.dim, place.num_heads, n_win, topk, side_dwconv=side_dwconv, compat=compat
            )  # fmt: skip
        if nchw:
            return AttentionLePE(place.dim, dense_heads)
        return AttentionLePE(place.dim, dense_heads, side_dwconv if topk == -2 else 0, lepe="input")

    make = mechanism or own
    swin = layout != "conv"
    stem = (
        Convolutions((in_chans, embed_dims[0]), 4, 4, 0)
        if swin
        else Convolutions((in_chans, embed_dims[0] // 2, embed_dims[0]))
    )
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    stages = []
    for row in places(embed_dims, depths, [d // head_dim for d in embed_dims], reductions, drop_path_rate):
        between: nn.Module | None = None
        if row[0].stage:
            before = embed_dims[row[0].stage - 1]
            between = (
                Patchify(before, row[0].dim, 2, norm=MapNorm, norm_first=True)
                if swin
                else Convolutions((before, row[0].dim))
            )
        blocks = [
            Block(
                p.dim, make(p), Mlp(p.dim, mlp_ratio, depthwise=3 if mlp_dwconv else 0), norm=norm,
                drop_path=p.drop_path, layer_scale=layer_scale, position=0 if swin else 3,
            )
            for p in row
        ]  # fmt: skip
        stages.append(Stage(blocks, between))
    head = Head(embed_dims[-1], num_classes, global_pool, None, drop_rate)
    model = Backbone(
        stem, stages, embed_dims, reductions, MapNorm(embed_dims[-1]), head, num_classes, in_chans, img_size
    )
    model.input_name = "stem.convs.0.conv.weight"
    if not nchw:  # its linear maps are convolutions, which the authors leave as they start
        init_weights(model, also=(BiLevelRoutingAttention, AttentionLePE))
    return model


def _attention(held: dict[str, Tensor]) -> dict[str, Tensor]:
    routes = any(name.startswith(("qkv.qkv.", "qkv_linear.", "wo.", "output_linear.")) for name in held)
    cls: Any = BiLevelRoutingAttention if routes else AttentionLePE
    return dict(cls.convert_state_dict(held))


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``BiFormer``, ``BiFormerSTL`` and ``nchwBiFormerSTL``."""
    theirs = Released(state_dict, "BiFormer")
    swin = any(name.startswith("stages.0.blocks.") for name in theirs)
    block = r"stages\.(\d+)\.blocks\.(\d+)" if swin else r"stages\.(\d+)\.(\d+)"
    ours = r"stages.\1.blocks.\2"

    def flat(to: str) -> Rule:
        return lambda match, value: {match.expand(to): value.flatten(1) if value.dim() == 4 else value}

    out = theirs.parts(rf"{block}\.attn\.(.+)", f"{ours}.mixer.inner", _attention)
    last = r"\.mlp\.2" if swin else r"\.mlp\.3"
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    rules: dict[str, Rule] = {
        rf"{block}\.pos_embed\.(weight|bias)": rf"{ours}.position.conv.\3",
        rf"{block}\.norm1\.(weight|bias)": rf"{ours}.mixer.norm.\3",
        rf"{block}\.norm2\.(weight|bias)": rf"{ours}.mlp.norm.\3",
        rf"{block}\.gamma1": f"{ours}.mixer.scale.gamma",
        rf"{block}\.gamma2": f"{ours}.mlp.scale.gamma",
        rf"{block}\.mlp\.0\.(weight|bias)": flat(rf"{ours}.mlp.inner.fc1.\3"),
        rf"{block}\.mlp\.1\.dwconv\.(weight|bias)": rf"{ours}.mlp.inner.dwconv.\3",
        rf"{block}{last}\.(weight|bias)": flat(rf"{ours}.mlp.inner.fc2.\3"),
        r"downsample_layers\.0\.0\.(weight|bias)": r"stem.convs.0.conv.\1",
        rf"downsample_layers\.0\.1\.{norm}": r"stem.convs.0.norm.\1",
        rf"norm\.{norm}": r"norm.norm.\1",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    if swin:
        rules[rf"downsample_layers\.([1-9])\.0\.{norm}"] = r"stages.\1.downsample.norm.norm.\2"
        rules[r"downsample_layers\.([1-9])\.1\.(weight|bias)"] = r"stages.\1.downsample.proj.\2"
    else:
        rules[r"downsample_layers\.0\.3\.(weight|bias)"] = r"stem.convs.1.conv.\1"
        rules[rf"downsample_layers\.0\.4\.{norm}"] = r"stem.convs.1.norm.\1"
        rules[r"downsample_layers\.([1-9])\.0\.(weight|bias)"] = r"stages.\1.downsample.convs.0.conv.\2"
        rules[rf"downsample_layers\.([1-9])\.1\.{norm}"] = r"stages.\1.downsample.convs.0.norm.\2"
    return theirs.close(out | theirs.renamed(rules))


_STL: dict[str, Any] = dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), mlp_ratio=4.0)

register_models(
    "biformer",
    biformer,
    {
        "biformer_tiny": dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 8, 2)),
        "biformer_small": dict(embed_dims=(64, 128, 256, 512), depths=(4, 4, 18, 4)),
        "biformer_base": dict(embed_dims=(96, 192, 384, 768), depths=(4, 4, 18, 4)),
        "biformer_stl": dict(**_STL, layout="stl"),
        "biformer_stl_nchw": dict(**_STL, topks=(1, 4, 16, -1), layout="stl-nchw"),
    },
    params={"biformer_tiny": 13_142_760, "biformer_small": 25_536_232, "biformer_base": 56_804_968},
    license="MIT",
    source="rayleizhu/BiFormer",
    convert=convert,
)
