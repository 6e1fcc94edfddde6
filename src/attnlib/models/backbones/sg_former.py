"""SG-Former: pairs of blocks, of which the first finds out which tokens matter and the second merges the others.

Ren et al., 2023, "SG-Former: Self-guided Transformer with Evolving Token Reallocation", arXiv 2308.12216. Convolutions
with GroupNorm of one group make tokens of 4 x 4 pixels and lie between stages; sine and cosine positions are added
once. In the first stages hybrid-scale and self-guided attention
(:class:`attnlib.nn.reduced.sg_former.SelfGuidedAttention`) alternate, with ratios 8, 4 and 2; the last stage is dense.
MLPs have a 3 x 3 depthwise convolution beside their hidden layer, and a norm ends every stage.

Differs from the authors' code: any size, where theirs takes images of 224 x 224 alone; the table of positions, which is
trained in spite of its name, is interpolated. A map of significance does not outlive its stage.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_ints
from ...grids import coordinates
from ...nn.layers import ConvGroupNorm, DepthwiseConv, Mlp, PositionTable, strided_valid
from ...nn.reduced.sg_former import SelfGuidedAttention
from ...nn.released import Released
from ...positions import sincos
from ..blocks import Block, Chain, Make, Place, places
from ..build import register_models
from .stages import Backbone, Head, Stage
from .vit import grid_of


class Convolutions(nn.Module):
    """Convolutions with GroupNorm one after another, a GELU between them, and a norm of tokens behind the last.

    Args:
        convs: the convolutions.
        norm: of tokens; ``None`` for none.
    """

    def __init__(self, convs: Sequence[ConvGroupNorm], norm: nn.Module | None = None):
        super().__init__()
        self.convs, self.norm = nn.ModuleList(convs), norm

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, H', W', C'), and which of these exist."""
        for i, conv in enumerate(self.convs):
            x = conv(nn.functional.gelu(x) if i else x, valid)
            valid = strided_valid(valid, conv.stride)  # type: ignore[arg-type]
        return (x if self.norm is None else self.norm(x)), valid


def sg_former(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 4, 16, 1),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    mlp_ratios: Sequence[float] = (4, 4, 4, 4),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    window_size: int = 7,
    qkv_bias: bool = True,
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An SG-Former.

    Args:
        embed_dims: width per stage; the first is a multiple of 4.
        depths: blocks per stage.
        num_heads: heads per stage, even numbers but where attention is dense.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        sr_ratios: reduction ratio per stage: 8, 4 or 2; 1 for dense attention, which the last stage has whatever its
            ratio.
        window_size: sides of windows.
        qkv_bias: biases of the query, key and value projections.
        compat: of :class:`attnlib.nn.reduced.sg_former.SelfGuidedAttention`.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(embed_dims)
    for name, given in (("mlp_ratios", mlp_ratios), ("sr_ratios", sr_ratios)):
        if isinstance(given, (int, float)) or len(given) != count:
            raise ValueError(f"{name}={given!r} must have one number for each of {count} stages")
    ratios = check_ints("sr_ratios", sr_ratios, least=1)
    image = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)

    def own(place: Place) -> nn.Module:
        ratio = ratios[place.stage]
        role = ("hybrid", "guided")[place.block % 2]
        if ratio == 1 or place.stage == count - 1:
            role = "global"
        return SelfGuidedAttention(
            place.dim, place.num_heads, role, ratio, window_size, qkv_bias=qkv_bias, compat=compat
        )  # fmt: skip

    make = mechanism or own
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    first = embed_dims[0]
    grid = -(-image[0] // 4), -(-image[1] // 4)
    table = PositionTable(first, grid)
    # Columns come first.
    with torch.no_grad():
        table.pos_embed.copy_(sincos(coordinates(grid).flip(-1), first).mT.unflatten(1, grid))
    convs = [
        ConvGroupNorm(in_chans, first, 3, 2), ConvGroupNorm(first, first, 3), ConvGroupNorm(first, first, 3, 2)
    ]  # fmt: skip
    stem = Chain(Convolutions(convs, nn.LayerNorm(first)), table)
    reductions = [4 * 2**i for i in range(count)]
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        i, dim = row[0].stage, row[0].dim
        between: nn.Module | None = None
        if i:
            between = Convolutions(
                [
                    ConvGroupNorm(embed_dims[i - 1], dim),
                    ConvGroupNorm(dim, dim, 3, 2, groups=dim),
                    ConvGroupNorm(dim, dim),
                ]
            )
        blocks = [
            Block(
                p.dim, make(p), Mlp(p.dim, mlp_ratios[i], depthwise=3, skip=True), norm=norm, drop_path=p.drop_path
            )
            for p in row
        ]  # fmt: skip
        stages.append(Stage(blocks, between, norm(dim) if i < count - 1 else None))
    head = Head(embed_dims[-1], num_classes, global_pool, None, drop_rate)
    model = Backbone(
        stem, stages, embed_dims, reductions, norm(embed_dims[-1]), head, num_classes, in_chans, (image[0], image[1])
    )  # fmt: skip
    model.input_name = "stem.0.convs.0.conv.weight"
    _start(model)
    return model


def _start(model: nn.Module) -> None:
    """Linear maps narrow, convolutions at unit gain over their fan-out; other mechanisms as they start."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, (nn.Conv2d, DepthwiseConv)):
            groups = module.groups if isinstance(module, nn.Conv2d) else module.dim
            fan_out = math.prod(module.weight.shape[2:]) * module.weight.shape[0] // groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``SGFormer``."""
    theirs = Released(state_dict, "SG-Former")
    norms = [int(name[4:].partition(".")[0]) for name in theirs if name.startswith("norm")]
    last = max(norms, default=0)

    def at(stage: str) -> str:
        return "stem.0" if stage == "1" else f"stages.{int(stage) - 1}.downsample"

    def block(ours: str) -> Any:
        return lambda m, value: {f"stages.{int(m[1]) - 1}.blocks.{m[2]}.{m.expand(ours)}": value}

    part = {"c": "conv", "bn": "norm"}
    held: dict[str, Tensor] = {
        f"{int(m[1]) - 1}.{m[2]}.{m[3]}": value for m, value in theirs.matching(r"block(\d+)\.(\d+)\.attn\.(.+)")
    }
    out: dict[str, Tensor] = {}
    if held:
        attention = Released(held, "attention of SG-Former")
        out = attention.parts(
            r"(\d+)\.(\d+)\.(.+)", r"stages.\1.blocks.\2.mixer.inner", SelfGuidedAttention.convert_state_dict
        )
    b = r"block(\d+)\.(\d+)"
    out |= theirs.renamed(
        {
            rf"{b}\.norm1\.(weight|bias)": block(r"mixer.norm.\3"),
            rf"{b}\.norm2\.(weight|bias)": block(r"mlp.norm.\3"),
            rf"{b}\.mlp\.(fc[12])\.(weight|bias)": block(r"mlp.inner.\3.\4"),
            rf"{b}\.mlp\.dwconv\.dwconv\.(weight|bias)": block(r"mlp.inner.dwconv.\3"),
            r"patch_embed(1)\.conv\.([024])\.(c|bn)\.(weight|bias)": lambda m, value: {
                f"{at(m[1])}.convs.{int(m[2]) // 2}.{part[m[3]]}.{m[4]}": value
            },
            r"patch_embed1\.norm\.(weight|bias)": r"stem.0.norm.\1",
            r"patch_embed(\d+)\.conv([123])\.(c|bn)\.(weight|bias)": lambda m, value: {
                f"{at(m[1])}.convs.{int(m[2]) - 1}.{part[m[3]]}.{m[4]}": value
            },
            r"pos_embed": lambda m, value: {"stem.1.pos_embed": grid_of(value, 0)[1]},
            r"norm(\d+)\.(weight|bias)": lambda m, value: {
                f"norm.{m[2]}" if int(m[1]) == last else f"stages.{int(m[1]) - 1}.norm.{m[2]}": value
            },
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out)


_WIDE: dict[str, Any] = dict(embed_dims=(96, 192, 384, 768), num_heads=(4, 6, 12, 24))

register_models(
    "sg-former",
    sg_former,
    {
        "sgformer_s": dict(depths=(2, 4, 16, 1), drop_path_rate=0.1),
        "sgformer_m": dict(depths=(2, 6, 28, 2), drop_path_rate=0.2),
        "sgformer_b": dict(**_WIDE, depths=(4, 6, 24, 2), drop_path_rate=0.4),
    },
    params={"sgformer_s": 22_545_981, "sgformer_m": 38_689_316, "sgformer_b": 77_950_293},
    source="OliverRensu/SG-Former",
    convert=convert,
)
