"""MambaOut: hierarchical models of gated convolutions alone, Mamba's blocks without their scans.

Yu and Wang, 2024, "MambaOut: Do We Really Need Mamba for Vision?", arXiv 2405.07992. Two 3 x 3 convolutions of stride 2
make tokens, one more stands between stages; each block is a norm and a gated convolution, without an MLP. The head is
an MLP with a norm before its last map. timm's ``_rw`` models differ in the norms of stem, merging and head, and have
learned scales.

Differs from the authors' code: tokens that do not exist enter no convolution and no mean.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag
from ...nn.layers import DepthwiseConv, Patchify
from ...nn.modulation.mambaout import ACTIVATIONS, GatedCNN
from ...nn.released import Released, Rule
from ..blocks import Block, Make, Place, TwoConvStem, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)


def mambaout(
    embed_dims: Sequence[int] = (96, 192, 384, 576),
    depths: Sequence[int] = (3, 3, 9, 3),
    expansion: float = 8 / 3,
    kernel_size: int = 7,
    conv_ratio: float = 1.0,
    activation: str = "gelu",
    stem_activation: str | None = None,
    stem_mid_norm: bool = True,
    downsample_norm_first: bool = False,
    head_norm: bool = True,
    layer_scale: float | None = None,
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A MambaOut.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        expansion, kernel_size, conv_ratio, activation: of :class:`attnlib.nn.modulation.mambaout.GatedCNN`.
        stem_activation: between the convolutions of the stem; ``activation`` by default, as in timm's models.
        stem_mid_norm: a norm between the convolutions of the stem.
        downsample_norm_first: norms stand before the convolutions between stages.
        head_norm: a norm behind the hidden layer of the head.
        layer_scale: start of the learned scales.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_flag("head_norm", head_norm)
    check_choice("activation", activation, ACTIVATIONS)
    stem_activation = activation if stem_activation is None else stem_activation
    check_choice("stem_activation", stem_activation, ACTIVATIONS)
    dim = embed_dims[-1]

    def own(place: Place) -> nn.Module:
        return GatedCNN(place.dim, expansion, kernel_size, conv_ratio, activation)

    make = mechanism or own
    heads = [max(1, d // 32) for d in embed_dims] if num_heads is None else num_heads
    reductions = [4 * 2**i for i in range(len(embed_dims))]
    stages = []
    for row in places(embed_dims, depths, heads, reductions, drop_path_rate):
        between: nn.Module | None = None
        if row[0].stage:
            last = embed_dims[row[0].stage - 1]
            between = Patchify(last, row[0].dim, 3, 2, 1, LayerNorm, downsample_norm_first)
        blocks = [
            Block(p.dim, make(p), mlp_ratio=0, norm=LayerNorm, drop_path=p.drop_path, layer_scale=layer_scale)
            for p in row
        ]
        stages.append(Stage(blocks, between))
    hidden = 4 * dim
    head = Head(
        dim, num_classes, global_pool, LayerNorm, drop_rate, hidden,
        activation=(lambda: nn.Sequential(nn.GELU(), LayerNorm(hidden))) if head_norm else nn.GELU,
    )  # fmt: skip
    stem = TwoConvStem(in_chans, embed_dims[0], LayerNorm, stem_mid_norm, ACTIVATIONS[stem_activation])
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    model.input_name = "stem.first.proj.weight"
    init_weights(model, also=(GatedCNN,))
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, DepthwiseConv)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``MambaOut`` and timm's."""
    theirs = Released(state_dict, "the authors' or timm's MambaOut")
    timm = "stem.conv1.weight" in theirs
    block = r"stages\.(\d+)\.blocks\.(\d+)" if timm else r"stages\.(\d+)\.(\d+)"
    between = r"stages\.(\d+)\.downsample" if timm else r"downsample_layers\.([1-9]\d*)"
    stem = "stem" if timm else r"downsample_layers\.0"
    inside = r"stages.\1.blocks.\2.mixer"
    out = theirs.parts(block + r"\.((?:fc1|conv|fc2)\..+)", inside + ".inner", GatedCNN.convert_state_dict)
    rules: dict[str, Rule] = {
        block + r"\.norm\.(weight|bias)": inside + r".norm.\3",
        block + r"\.ls\.gamma": inside + ".scale.gamma",
        between + r"\.conv\.(weight|bias)": r"stages.\1.downsample.proj.\2",
        between + r"\.norm\.(weight|bias)": r"stages.\1.downsample.norm.\2",
        stem + r"\.conv1\.(weight|bias)": r"stem.first.proj.\1",
        stem + r"\.norm1\.(weight|bias)": r"stem.first.norm.\1",
        stem + r"\.conv2\.(weight|bias)": r"stem.second.proj.\1",
        stem + r"\.norm2\.(weight|bias)": r"stem.second.norm.\1",
        r"head\.pre_logits\.norm\.(weight|bias)": r"head.act.1.\1",
        r"head\.(?:pre_logits\.fc|fc1)\.(weight|bias)": r"head.pre.\1",
        r"head\.fc2\.(weight|bias)": r"head.fc.\1",
    }
    if timm:
        rules |= {r"head\.norm\.(weight|bias)": r"head.norm.\1", r"head\.fc\.(weight|bias)": r"head.fc.\1"}
    else:
        rules |= {r"norm\.(weight|bias)": r"head.norm.\1", r"head\.norm\.(weight|bias)": r"head.act.1.\1"}
    return theirs.close(out | theirs.renamed(rules))


_NARROW, _WIDE, _BASE = (48, 96, 192, 288), (96, 192, 384, 576), (128, 256, 512, 768)
_RW: dict[str, Any] = dict(stem_mid_norm=False, downsample_norm_first=True, layer_scale=1e-6, head_norm=False)
_SIZES: dict[str, dict[str, Any]] = {
    "mambaout_femto": dict(embed_dims=_NARROW),
    "mambaout_kobe": dict(embed_dims=_NARROW, depths=(3, 3, 15, 3)),
    "mambaout_tiny": dict(embed_dims=_WIDE),
    "mambaout_small": dict(embed_dims=_WIDE, depths=(3, 4, 27, 3)),
    "mambaout_base": dict(embed_dims=_BASE, depths=(3, 4, 27, 3)),
    "mambaout_small_rw": dict(_RW, embed_dims=_WIDE, depths=(3, 4, 27, 3)),
    "mambaout_base_short_rw": dict(_RW, embed_dims=_BASE, depths=(3, 3, 25, 3), expansion=3.0, conv_ratio=1.25),
    "mambaout_base_tall_rw": dict(_RW, embed_dims=_BASE, depths=(3, 4, 30, 3), expansion=2.5, conv_ratio=1.25),
    "mambaout_base_wide_rw": dict(
        _RW, embed_dims=_BASE, depths=(3, 4, 27, 3), expansion=3.0, conv_ratio=1.5, activation="silu"
    ),
    "mambaout_base_plus_rw": dict(
        _RW, embed_dims=_BASE, depths=(3, 4, 30, 3), expansion=3.0, conv_ratio=1.5, activation="silu"
    ),
}
_HUB = {
    "small_rw": "sw_e450_in1k", "base_short_rw": "sw_e500_in1k", "base_tall_rw": "sw_e500_in1k",
    "base_wide_rw": "sw_e500_in1k", "base_plus_rw": "sw_e150_in12k_ft_in1k",
}  # fmt: skip


register_models(
    "mambaout",
    mambaout,
    _SIZES,
    params={
        "mambaout_femto": 7_304_536, "mambaout_kobe": 9_141_208, "mambaout_tiny": 26_545_096,
        "mambaout_small": 48_488_072, "mambaout_base": 84_813_092, "mambaout_small_rw": 48_495_560,
        "mambaout_base_short_rw": 88_827_688, "mambaout_base_tall_rw": 86_481_448, "mambaout_base_wide_rw": 94_448_104,
        "mambaout_base_plus_rw": 101_656_552,
    },
    license="Apache-2.0",
    source="yuweihao/MambaOut",
    weights={
        name: (f"timm/{name}.{_HUB.get(name.removeprefix('mambaout_'), 'in1k')}", "model.safetensors")
        for name in _SIZES
    },
    convert=convert,
    data={"crop_pct": 1.0},
    data_of={name: {"crop_pct": 0.95} for name in _SIZES if name.endswith(("short_rw", "tall_rw", "wide_rw"))},
)  # fmt: skip
