"""RAVLT: a pyramid of rank-augmented linear attention in its first stages and softmax attention in its last.

Fan et al., 2024, "Breaking the Low-Rank Dilemma of Linear Attention", arXiv 2411.07635. A stem of four convolutions,
3 x 3 convolutions between stages, a positional convolution before every block, an MLP with a depthwise convolution
behind its activation, and learned scales per channel. The paper speaks of linear attention in all stages; the released
models have it in the first two.

Differs from the authors' code: an odd row or column before a strided convolution is completed with zeros; every layer
is told which pixels exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...nn.layers import ConvNorm, DepthwiseConv, Mlp
from ...nn.linear.rala import RankAugmentedLinearAttention
from ...nn.released import Released, Rule
from ..blocks import Block, ConvStem, Make, Place, places
from ..build import register_models
from .stages import Backbone, Head, Stage

Norm = partial(nn.LayerNorm, eps=1e-6)


def ravlt(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (1, 2, 4, 8),
    attention: Sequence[str] = ("linear", "linear", "softmax", "softmax"),
    layer_scales: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
    mlp_ratio: float = 3.5,
    features: int = 1024,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A RAVLT.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        attention: ``"linear"`` or ``"softmax"`` per stage.
        layer_scales: start of the learned scales of each stage; ``None`` for none.
        mlp_ratio: hidden width of MLPs over the width.
        features: channels of the last 1 x 1 convolution, before the pool.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_int("features", features, least=1)
    for name, given in (("attention", attention), ("layer_scales", layer_scales)):
        if isinstance(given, str) or len(given) != len(embed_dims):
            raise ValueError(f"{name}={given!r} must have one entry for each of {len(embed_dims)} stages")
    for kind in attention:
        check_choice("attention", kind, ("linear", "softmax"))
    reductions = [4 * 2**i for i in range(len(embed_dims))]

    def own(place: Place) -> nn.Module:
        return RankAugmentedLinearAttention(place.dim, place.num_heads, attention[place.stage])

    make = mechanism or own
    first, half = embed_dims[0], embed_dims[0] // 2
    conv: dict[str, Any] = dict(bias=True)
    stem = ConvStem(
        ConvNorm(in_chans, half, 3, 2, activation=nn.GELU, **conv), ConvNorm(half, half, 3, activation=nn.GELU, **conv),
        ConvNorm(half, half, 3, activation=nn.GELU, **conv), ConvNorm(half, first, 3, 2, **conv),
    )  # fmt: skip
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        stage, dim = row[0].stage, row[0].dim
        between = ConvStem(ConvNorm(embed_dims[stage - 1], dim, 3, 2, **conv)) if stage else None
        blocks = [
            Block(
                dim, make(p), Mlp(dim, mlp_ratio, depthwise=3, skip=True, act_first=True), norm=Norm,
                drop_path=p.drop_path, layer_scale=layer_scales[stage], position=3,
            )
            for p in row
        ]  # fmt: skip
        stages.append(Stage(blocks, between))
    norm = ConvNorm(embed_dims[-1], features, activation=nn.SiLU, **conv)
    head = Head(features, num_classes, global_pool, drop=drop_rate)
    model = Backbone(stem, stages, embed_dims, reductions, norm, head, num_classes, in_chans, img_size)
    model.num_features = model.head_hidden_size = features
    model.input_name = "stem.0.conv.weight"
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, DepthwiseConv)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``RAVLT``."""
    theirs = Released(state_dict, "RAVLT")
    theirs.leave(r"layers\.\d+\.RoPE\.angle", because="made from the base")
    block, ours = r"layers\.(\d+)\.blocks\.(\d+)", r"stages.\1.blocks.\2"
    convert_attention: Any = RankAugmentedLinearAttention.convert_state_dict
    out = theirs.parts(rf"{block}\.attn\.(.+)", f"{ours}.mixer.inner", convert_attention)
    held = r"(weight|bias|running_mean|running_var|num_batches_tracked)"

    def matrix(to: str) -> Rule:
        """A 1 x 1 convolution as a linear map."""
        return lambda match, value: {match.expand(to): value.flatten(1) if match[0].endswith("weight") else value}

    def stem(match: Any, value: Tensor) -> dict[str, Tensor]:
        number, part = divmod(int(match[1]), 3)
        return {f"stem.{number}.{('conv', 'norm')[part]}.{match[2]}": value}

    def scale(match: Any, value: Tensor) -> dict[str, Tensor]:
        part = "mixer" if match[3] == "1" else "mlp"
        return {f"stages.{match[1]}.blocks.{match[2]}.{part}.scale.gamma": value.flatten()}

    rules: dict[str, Rule] = {
        rf"patch_embed\.proj\.(\d+)\.{held}": stem,
        rf"{block}\.pos\.(weight|bias)": rf"{ours}.position.conv.\3",
        rf"{block}\.norm1\.norm\.(weight|bias)": rf"{ours}.mixer.norm.\3",
        rf"{block}\.norm2\.norm\.(weight|bias)": rf"{ours}.mlp.norm.\3",
        rf"{block}\.ffn\.(fc[12])\.(weight|bias)": matrix(rf"{ours}.mlp.inner.\3.\4"),
        rf"{block}\.ffn\.dwconv\.(weight|bias)": rf"{ours}.mlp.inner.dwconv.\3",
        rf"{block}\.gamma_([12])": scale,
        # Theirs end a stage with what ours begin the next one with.
        rf"layers\.(\d+)\.downsample\.(reduction|norm)\.{held}": lambda m, value: {
            f"stages.{int(m[1]) + 1}.downsample.0.{'conv' if m[2] == 'reduction' else 'norm'}.{m[3]}": value
        },
        r"proj\.(weight|bias)": r"norm.conv.\1",
        rf"norm\.{held}": r"norm.norm.\1",
        r"head\.(weight|bias)": matrix(r"head.fc.\1"),
    }
    return theirs.close(out | theirs.renamed(rules))


_SIZES: dict[str, dict[str, Any]] = {
    "ravlt_tiny": dict(drop_path_rate=0.1),
    "ravlt_small": dict(
        embed_dims=(64, 128, 320, 512), depths=(3, 5, 9, 3), num_heads=(1, 2, 5, 8), drop_path_rate=0.15
    ),
    "ravlt_base": dict(
        embed_dims=(96, 192, 384, 512), depths=(4, 6, 12, 6), num_heads=(1, 2, 6, 8), drop_path_rate=0.4,
        layer_scales=(1.0, 1.0, 1e-6, 1e-6),
    ),
    "ravlt_large": dict(
        embed_dims=(96, 192, 448, 640), depths=(4, 7, 19, 8), num_heads=(1, 2, 7, 10), drop_path_rate=0.55,
        layer_scales=(1e-6,) * 4,
    ),
}  # fmt: skip

register_models(
    "rala-ravlt",
    ravlt,
    _SIZES,
    params={
        "ravlt_tiny": 14_897_768, "ravlt_small": 25_591_208, "ravlt_base": 48_241_288, "ravlt_large": 95_242_440,
    },
    source="qhfan/RALA",
    convert=convert,
)  # fmt: skip
