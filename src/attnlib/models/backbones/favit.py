"""FaViT: four stages of factorization self-attention in the frame of PVTv2.

Qin et al., 2023, "Factorization Vision Transformer", arXiv 2312.08614. A 7 x 7 convolution of
stride 4 makes tokens, 3 x 3 convolutions of stride 2 lie between stages, each with a norm behind it. A block is
attention and an MLP with a depthwise 3 x 3 convolution in its middle, each behind a norm; every stage ends in a norm,
and so the maps of all stages are normed.

Differs from the authors' code as :class:`attnlib.nn.reduced.favit.FactorizationAttention` does, and in any size.
Weights of the release were trained with ``compat="authors"``; into a model without it they are not loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...checks import check_ints
from ...nn.layers import Mlp, Patchify, init_fan_out
from ...nn.reduced.favit import FactorizationAttention
from ...nn.released import Released, Rule
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage

Norm = partial(nn.LayerNorm, eps=1e-6)


def favit(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (1, 2, 4, 8),
    mlp_ratios: Sequence[float] = (8, 6, 4, 4),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    window_size: int = 7,
    qkv_bias: bool = True,
    legacy_fusion: bool = False,
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A FaViT.

    Args:
        embed_dims: width per stage; multiples of 16, of 8 where ``sr_ratios`` has 1.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        sr_ratios: cells and dilations of attention, per stage.
        window_size, qkv_bias, legacy_fusion, compat: of
            :class:`attnlib.nn.reduced.favit.FactorizationAttention`.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    ratios = check_ints("sr_ratios", sr_ratios, least=1)
    for name, given in (("sr_ratios", ratios), ("mlp_ratios", mlp_ratios)):
        if len(given) != len(embed_dims):
            raise ValueError(f"{name}={tuple(given)} must have one number for each of {len(embed_dims)} stages")
    reductions = [4 * 2**i for i in range(len(embed_dims))]

    def own(place: Place) -> nn.Module:
        return FactorizationAttention(
            place.dim, place.num_heads, ratios[place.stage], window_size, qkv_bias, legacy_fusion, compat=compat
        )

    make = mechanism or own
    stem: nn.Module | None = None
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        stage, dim = row[0].stage, row[0].dim
        between = Patchify(embed_dims[stage - 1], dim, 3, 2, 1) if stage else Patchify(in_chans, dim, 7, 4, 3)
        blocks = [
            Block(dim, make(p), Mlp(dim, mlp_ratios[stage], depthwise=3), norm=Norm, drop_path=p.drop_path) for p in row
        ]
        stages.append(Stage(blocks, between if stage else None, Norm(dim)))
        stem = between if stem is None else stem
    assert stem is not None
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    init_weights(model)
    for module in model.modules():
        if isinstance(module, Patchify):
            init_fan_out(module.proj)
        elif isinstance(module, Mlp) and module.dwconv is not None:
            init_fan_out(module.dwconv)
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``FactorizationTransformer``.

    Raises:
        ValueError: a model that averages windows, where these weights average neighbouring channels.
    """
    theirs = Released(state_dict, "FaViT")
    own = [] if model is None else [m for m in model.modules() if isinstance(m, FactorizationAttention)]
    if any(name.startswith("block1.0.attn.fcs.") for name in theirs) and not all(m.legacy_fusion for m in own):
        raise ValueError(
            "released weights of FaViT average neighbouring channels where windows should be averaged: build the model "
            'with compat="authors" (or legacy_fusion=True)'
        )
    parts = {"norm1": "mixer.norm", "norm2": "mlp.norm", "mlp.fc1": "mlp.inner.fc1", "mlp.fc2": "mlp.inner.fc2"}
    parts["mlp.dwconv.dwconv"] = "mlp.inner.dwconv"
    out: dict[str, Tensor] = {}
    rules: dict[str, Rule] = {}
    for i in range(1, 10):  # theirs count stages from 1
        ours = f"stages.{i - 1}"
        out |= theirs.parts(
            rf"block{i}\.(\d+)\.attn\.(.+)", rf"{ours}.blocks.\1.mixer.inner", FactorizationAttention.convert_state_dict
        )
        for name, part in parts.items():
            rules[rf"block{i}\.(\d+)\.{re.escape(name)}\.(weight|bias)"] = rf"{ours}.blocks.\1.{part}.\2"
        rules[rf"patch_embed{i}\.(proj|norm)\.(weight|bias)"] = (f"{ours}.downsample" if i > 1 else "stem") + r".\1.\2"
        rules[rf"norm{i}\.(weight|bias)"] = rf"{ours}.norm.\1"
    rules[r"head\.(weight|bias)"] = r"head.fc.\1"
    out |= theirs.renamed(rules)
    return theirs.close(out)


_SIZES: dict[str, dict[str, Any]] = {
    "favit_b0": dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 6, 2), drop_path_rate=0.1),
    "favit_b1": dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), drop_path_rate=0.1),
    "favit_b2": dict(embed_dims=(64, 128, 256, 512), depths=(2, 3, 18, 3), drop_path_rate=0.1),
    "favit_b3": dict(embed_dims=(96, 192, 384, 768), depths=(2, 3, 14, 3), drop_path_rate=0.1),
}

register_models(
    "favit",
    favit,
    _SIZES,
    params={"favit_b0": 3_427_704, "favit_b1": 12_958_568, "favit_b2": 24_919_896, "favit_b3": 48_746_440},
    source="q2479036243/FaViT",
    convert=convert,
)
