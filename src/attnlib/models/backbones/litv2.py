"""LITv2: early stages without attention, HiLo attention in later ones, patches merged by deformable convolutions.

Pan et al., 2022, "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213. Patches of 4 x 4 pixels and a norm
make tokens. A block is attention and an MLP with a depthwise 3 x 3 convolution in its middle, each behind a norm; the
blocks of the first two stages have that MLP alone. Between stages lies a deformable 2 x 2 convolution of stride 2 with
a BatchNorm and a GELU. With windows of one token, in the last stage, HiLo is plain attention.

Differs from the authors' code: any size, where their classification class wants the one it was built for; tokens that
do not exist enter no window, no mean, no convolution and no statistic. Their training gives the convolutions that
predict offsets a hundredth of the learning rate, which is up to the optimizer here: their names end in
``conv.offset.weight`` and ``conv.offset.bias``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_flag, check_ints
from ...nn.layers import Mlp, Patchify, init_fan_out
from ...nn.reduced.hilo import HiLoAttention
from ...nn.released import Released
from ...nn.sampled.deformable_conv import DeformableMerging
from ..blocks import Block, Make, Place, Residual, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage


def litv2(
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_sizes: Sequence[int] = (0, 0, 2, 1),
    alpha: float = 0.9,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    pad: str = "mask",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A LITv2.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        window_sizes: sides of HiLo's windows per stage; 0 for a stage without attention.
        alpha: share of HiLo's heads that read means of windows.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: bias of the query, key and value projections.
        pad: of maps that windows do not divide, as of :class:`attnlib.nn.reduced.hilo.HiLoAttention`; ``"zeros"`` is
            what the authors' detection class does.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_flag("qkv_bias", qkv_bias)
    windows = check_ints("window_sizes", window_sizes, least=0)
    if len(windows) != len(embed_dims):
        raise ValueError(f"window_sizes={windows} must have one number for each of {len(embed_dims)} stages")
    reductions = [4 * 2**i for i in range(len(embed_dims))]

    def own(place: Place) -> nn.Module:
        return HiLoAttention(
            place.dim, place.num_heads, windows[place.stage], alpha, rank=2, qkv_bias=qkv_bias, pad=pad
        )

    make = mechanism or own

    def block(place: Place) -> nn.Module:
        mlp = Mlp(place.dim, mlp_ratio, depthwise=3)
        if not windows[place.stage]:
            return Residual(place.dim, mlp, drop_path=place.drop_path)
        return Block(place.dim, make(place), mlp, drop_path=place.drop_path)

    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        between = DeformableMerging(embed_dims[row[0].stage - 1], row[0].dim) if row[0].stage else None
        stages.append(Stage([block(p) for p in row], between))
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(
        Patchify(in_chans, embed_dims[0], 4), stages, embed_dims, reductions, nn.LayerNorm(embed_dims[-1]), head,
        num_classes, in_chans, img_size,
    )  # fmt: skip
    init_weights(model, also=(HiLoAttention,))
    for module in model.modules():
        if isinstance(module, Mlp) and module.dwconv is not None:
            init_fan_out(module.dwconv)
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``LITv2``, also that of their detection code."""
    theirs = Released(state_dict, "LITv2")
    block, ours = r"layers\.(\d+)\.blocks\.(\d+)", r"stages.\1.blocks.\2"
    alone = {
        int(name.split(".")[1])
        for name in theirs
        if name.startswith("layers.") and name.endswith(".blocks.0.mlp.fc1.weight")
        and name.replace("mlp.fc1", "norm1") not in theirs
    }  # fmt: skip
    out = theirs.parts(rf"{block}\.attn\.(.+)", f"{ours}.mixer.inner", HiLoAttention.convert_state_dict)

    def mlp(match: Any, value: Tensor) -> dict[str, Tensor]:
        part = "" if int(match[1]) in alone else "mlp."
        name = match[3].replace("norm2", "norm").replace("mlp.dwconv", "inner").replace("mlp.", "inner.")
        return {f"stages.{match[1]}.blocks.{match[2]}.{part}{name}": value}

    out |= theirs.renamed(
        {
            rf"{block}\.norm1\.(weight|bias)": rf"{ours}.mixer.norm.\3",
            rf"{block}\.((?:norm2|mlp\.(?:fc[12]|dwconv\.dwconv))\.(?:weight|bias))": mlp,
            r"patch_embed\.(.+)": r"stem.\1",
            # Theirs end a stage with what ours begin the next one with.
            r"layers\.(\d+)\.downsample\.(.+)": lambda match, value: {
                f"stages.{int(match[1]) + 1}.downsample."
                + match[2]
                .replace("dconv.conv_offset", "conv.offset")
                .replace("dconv.", "conv.")
                .replace("norm_layer", "norm.norm"): value
            },
            r"norm\.(weight|bias)": r"norm.\1",
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out)


def _widths(first: int) -> dict[str, Any]:
    return dict(embed_dims=tuple(first * 2**i for i in range(4)), num_heads=tuple(first // 32 * 2**i for i in range(4)))


_SIZES: dict[str, dict[str, Any]] = {
    "litv2_small": dict(**_widths(96), depths=(2, 2, 6, 2), drop_path_rate=0.2),
    "litv2_medium": dict(**_widths(96), depths=(2, 2, 18, 2), drop_path_rate=0.3),
    "litv2_base": dict(**_widths(128), depths=(2, 2, 18, 2), drop_path_rate=0.5),
    "litv2_base_384": dict(**_widths(128), depths=(2, 2, 18, 2), drop_path_rate=0.5, img_size=384),
}

register_models(
    "hilo-litv2",
    litv2,
    _SIZES,
    params={
        "litv2_small": 27_844_000, "litv2_medium": 48_830_368, "litv2_base": 86_520_704, "litv2_base_384": 86_520_704,
    },
    license="Apache-2.0",
    source="ziplab/LITv2",
    convert=convert,
    img_size={"litv2_base_384": 384},
)  # fmt: skip
