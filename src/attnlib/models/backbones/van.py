"""VAN: a hierarchy of large kernel attention.

Guo et al., 2022, "Visual Attention Network", arXiv 2202.09741. Overlapping convolutions make tokens and halve the map
between stages; blocks are large kernel attention and an MLP with a depthwise convolution, BatchNorms before both and
learned scales behind; a LayerNorm ends every stage.

Differs from the authors' code: tokens that do not exist enter no convolution, mean or statistic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...nn.layers import ConvNorm, MapNorm, Mlp, init_fan_out
from ...nn.layers import DepthwiseConv as Depthwise
from ...nn.modulation.van import LargeKernelAttention
from ...nn.released import Released, Rule
from ..blocks import Block, ConvStem, Make, Place, check_stages, places
from ..build import register_models
from .stages import Backbone, Head, Stage

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


def van(
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 3, 12, 3),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    kernel_size: int = 21,
    dilation: int = 3,
    layer_scale: float = 1e-2,
    num_heads: Sequence[int] | None = None,
    proj_drop_rate: float = 0.0,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A VAN.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        kernel_size, dilation: of :class:`attnlib.nn.modulation.van.LargeKernelAttention`.
        layer_scale: start of the learned scales.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        proj_drop_rate: dropout in MLPs.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_stages(len(depths), embed_dims=embed_dims, mlp_ratios=mlp_ratios)

    def own(place: Place) -> nn.Module:
        return LargeKernelAttention(place.dim, kernel_size, dilation)

    make = mechanism or own
    reductions = [4 * 2**i for i in range(len(depths))]
    heads = [max(1, d // 32) for d in embed_dims] if num_heads is None else num_heads
    stages = []
    for row in places(embed_dims, depths, heads, reductions, drop_path_rate):
        i = row[0].stage
        between = ConvStem(ConvNorm(embed_dims[i - 1], embed_dims[i], 3, 2, bias=True)) if i else None
        blocks = [
            Block(
                p.dim, make(p), Mlp(p.dim, mlp_ratios[i], drop=proj_drop_rate, depthwise=3, drop_hidden=True),
                norm=MapNorm, drop_path=p.drop_path, layer_scale=layer_scale,
            )
            for p in row
        ]  # fmt: skip
        stages.append(Stage(blocks, between, LayerNorm(embed_dims[i])))
    stem = ConvStem(ConvNorm(in_chans, embed_dims[0], 7, 4, bias=True))
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    for stage in (stem, *stages):
        for module in stage.modules():
            if isinstance(module, (nn.Conv2d, Depthwise)):
                init_fan_out(module)
            elif isinstance(module, nn.Linear) and mechanism is None:  # 1 x 1 convolutions in the authors' code
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.out_features))
                nn.init.zeros_(module.bias)
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    model.input_name = "stem.0.conv.weight"
    return model


_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``VAN``."""
    theirs = Released(state_dict, "the authors' VAN")
    # Their stages count from 1.
    theirs = Released({_from_zero(name): theirs.peek(name) for name in theirs}, "the authors' VAN")
    block, to = r"block(\d)\.(\d+)", r"stages.\1.blocks.\2"
    out = theirs.parts(block + r"\.attn\.(.+)", to + ".mixer.inner", LargeKernelAttention.convert_state_dict)
    rules: dict[str, Rule] = {
        rf"{block}\.norm1\.{_NORM}": to + r".mixer.norm.norm.\3",
        rf"{block}\.norm2\.{_NORM}": to + r".mlp.norm.norm.\3",
        rf"{block}\.layer_scale_1": to + ".mixer.scale.gamma",
        rf"{block}\.layer_scale_2": to + ".mlp.scale.gamma",
        rf"{block}\.mlp\.dwconv\.dwconv\.(weight|bias)": to + r".mlp.inner.dwconv.\3",
        rf"{block}\.mlp\.(fc[12])\.(weight|bias)": lambda m, t: {
            m.expand(to + r".mlp.inner.\3.\4"): t.flatten(1) if t.dim() == 4 else t
        },
        r"patch_embed0\.proj\.(weight|bias)": r"stem.0.conv.\1",
        rf"patch_embed0\.norm\.{_NORM}": r"stem.0.norm.\1",
        r"patch_embed(\d)\.proj\.(weight|bias)": r"stages.\1.downsample.0.conv.\2",
        rf"patch_embed(\d)\.norm\.{_NORM}": r"stages.\1.downsample.0.norm.\2",
        r"norm(\d)\.(weight|bias)": r"stages.\1.norm.\2",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


def _from_zero(name: str) -> str:
    part, dot, rest = name.partition(".")
    return f"{part[:-1]}{int(part[-1]) - 1}{dot}{rest}" if part[-1:].isdigit() else name


_NARROW, _WIDE = (64, 128, 320, 512), (96, 192, 480, 768)
_SIZES: dict[str, dict[str, Any]] = {
    "van_b0": dict(embed_dims=(32, 64, 160, 256), depths=(3, 3, 5, 2)),
    "van_b1": dict(embed_dims=_NARROW, depths=(2, 2, 4, 2)),
    "van_b2": dict(embed_dims=_NARROW, depths=(3, 3, 12, 3)),
    "van_b3": dict(embed_dims=_NARROW, depths=(3, 5, 27, 3)),
    "van_b4": dict(embed_dims=_NARROW, depths=(3, 6, 40, 3)),
    "van_b5": dict(embed_dims=_WIDE, depths=(3, 3, 24, 3)),
    "van_b6": dict(embed_dims=(96, 192, 384, 768), depths=(6, 6, 90, 6)),
}
_HUB = {"van_b0": ("Tiny", "tiny_754"), "van_b1": ("Small", "small_811"), "van_b2": ("Base", "base_828"),
        "van_b3": ("Large", "large_839")}  # fmt: skip

register_models(
    "van-large-kernel-attention",
    van,
    _SIZES,
    params={
        "van_b0": 4_105_800, "van_b1": 13_861_800, "van_b2": 26_578_472, "van_b3": 44_765_608, "van_b4": 60_283_176,
        "van_b5": 89_967_688, "van_b6": 199_829_416,
    },
    license="Apache-2.0",
    source="Visual-Attention-Network/VAN-Classification",
    weights={
        name: (f"Visual-Attention-Network/VAN-{size}-original", f"van_{file}.pth.tar")
        for name, (size, file) in _HUB.items()
    },
    convert=convert,
)  # fmt: skip
