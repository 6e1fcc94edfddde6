"""HaloNet: ResNets whose 3 x 3 convolutions are halo attention, in all blocks or in some.

Vaswani et al., 2021, "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731. A block
is a 1 x 1 convolution, attention or a 3 x 3 convolution, a 1 x 1 convolution, each with a BatchNorm behind it, added
to its input. Where a stage begins, attention has every second query of its blocks. ``halonet_h0`` to ``h7`` have
attention in all blocks: of 64, 128, 256 and 512 channels for queries and keys, ``value_ratio`` times as many for
values. The others are timm's, with attention in some blocks of late stages, three 3 x 3 convolutions as a stem, SiLU
(names on ``s``) and squeeze-and-excitation beside the convolutions (``se``). ``halo2botnet50ts`` ends in attention of
blocks without a halo: on its 8 x 8 maps, everything reads everything (Srinivas et al., 2021, arXiv 2101.11605). The
maps to take are those of the stem and of the four stages.

No authors' code in PyTorch exists. ``halonet_h1`` is timm's, of eight heads in all stages; the others of its kind are
built by the paper's table, with ReLUs and keys of zeros outside the map as there, and displacements in tokens. No
weights of these exist. Those of the others are timm's ``ByobNet``'s, and by default models compute what these were
trained with: keys of zeros outside the map (``pad_mode="zero"``), and with a stride displacements as timm counts them
(``compat="authors"``; ``None`` counts them in tokens). Differs from timm: any size, where blocks must divide the map
there; tokens that do not exist enter no convolution, no attention, no maximum and no statistic.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...nn.layers import ConvNorm
from ...nn.local.halonet import HaloAttention, HaloDownsampling
from ...nn.released import Released
from ..blocks import ConvStem, Make, Place, places
from ..build import register_models
from .convs import (
    Activation,
    ConvBlock,
    ConvStage,
    MaxPool,
    Mixing,
    Relu,
    ResidualBlock,
    Silu,
    blocks_of,
    by_prefix,
    conv_names,
    divisible,
    init_convs,
)
from .resnet import stem_convs
from .stages import Backbone, Head

ACTIVATIONS: dict[str, Activation] = {"relu": Relu, "silu": Silu}


def per_stage(name: str, given: Any, count: int) -> list[Any]:
    """One value for all stages, or one for each.

    Raises:
        ValueError: another number of them.
    """
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name}={given} must be one value, or one for each of {count} stages")
    return list(given)


def halonet(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (3, 3, 10, 3),
    attention: Sequence[Sequence[int] | None] = (None, None, None, None),
    bottle_ratio: float | Sequence[float] = 1.0,
    value_ratio: float = 1.0,
    block_size: int | Sequence[int] = 8,
    halo_size: int | Sequence[int] = 3,
    num_heads: int | Sequence[int] = 8,
    head_dim: int | None = None,
    stem: str = "7x7",
    stem_dim: int = 64,
    stem_pool: bool = True,
    activation: str = "relu",
    squeeze: bool = False,
    num_features: int = 0,
    pad_mode: str = "zero",
    compat: str | None = "authors",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 256,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A HaloNet.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        attention: per stage, which blocks have attention, from 0; ``None`` for all.
        bottle_ratio: width inside the blocks over that of the stage; one, or one per stage.
        value_ratio: width of values over that inside the blocks; other than 1 with the model's own attention alone.
        block_size, halo_size, num_heads: as of :class:`attnlib.nn.local.halonet.HaloAttention`; one, or one per stage.
        head_dim, pad_mode: the same.
        stem: ``"7x7"``, ``"deep"`` or ``"tiered"``, as of :func:`attnlib.models.backbones.resnet.stem_convs`.
        stem_dim: width of the stem.
        stem_pool: a maximum of stride 2 behind the stem; otherwise its last convolution strides.
        activation: ``"relu"`` or ``"silu"``.
        squeeze: squeeze-and-excitation of a sixteenth of the width in blocks of convolutions.
        num_features: width of a 1 x 1 convolution behind the last stage; 0 for none.
        compat: with a stride, ``"authors"`` for displacements as timm counts them.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`; at a stride, another ``mechanism`` is followed by means of cells.

    Raises:
        ValueError: blocks that are not there, a stem that does not stride, not as many values as stages.
    """
    check_choice("activation", activation, tuple(ACTIVATIONS))
    check_flag("squeeze", squeeze)
    if check_real("value_ratio", value_ratio, above=0) != 1 and mechanism is not None:
        raise ValueError(f"value_ratio={value_ratio} needs the model's own attention; mechanisms keep their width")
    check_int("num_features", num_features, least=0)
    if not check_flag("stem_pool", stem_pool) and stem == "7x7":
        raise ValueError("stem_pool=False needs a stem of three convolutions, got stem='7x7'")
    count, act = len(embed_dims), ACTIVATIONS[activation]
    ratios, sides, halos, heads, chosen = (
        per_stage(name, given, count)
        for name, given in (
            ("bottle_ratio", bottle_ratio), ("block_size", block_size), ("halo_size", halo_size),
            ("num_heads", num_heads), ("attention", attention),
        )
    )  # fmt: skip
    for ratio in ratios:
        check_real("bottle_ratio", ratio, above=0)
    reductions = [4 * 2**i for i in range(count)]
    hidden = [divisible(dim * ratio) for dim, ratio in zip(embed_dims, ratios, strict=True)]

    def valued(dim: int) -> int:
        return int(dim * value_ratio)

    def mixer(place: Place, stride: int) -> nn.Module:
        if mechanism is not None:
            return mechanism(place)
        settings: dict[str, Any] = dict(
            num_heads=place.num_heads, block_size=sides[place.stage], halo_size=halos[place.stage], head_dim=head_dim,
            pad_mode=pad_mode,
        )  # fmt: skip
        if value_ratio != 1:  # as many queries and keys as without it
            settings |= dict(head_dim=head_dim or place.dim // place.num_heads, out_dim=valued(place.dim))
        elif stride == 1:
            return HaloAttention(place.dim, **settings)
        return HaloDownsampling(place.dim, stride=stride, compat=compat, **settings)

    convs = stem_convs(stem, in_chans, stem_dim, act, 1 if stem_pool else 2)
    first: nn.Module = MaxPool() if stem_pool else ConvStem(convs.pop())
    dim, stages = stem_dim, []
    for row, out in zip(places(hidden, depths, heads, reductions, drop_path_rate), embed_dims, strict=True):
        own = range(len(row)) if chosen[row[0].stage] is None else chosen[row[0].stage]
        if set(own) - set(range(len(row))):
            raise ValueError(f"attention={list(own)} names blocks that are not there; the stage has {len(row)}, from 0")
        blocks: list[nn.Module] = []
        for place in row:
            stride = 2 if place.stage and not place.block else 1
            inside = mixer(place, stride) if place.block in own else None
            narrow = max(8, int(place.dim / 16 + 4) // 8 * 8) if squeeze and inside is None else 0
            blocks.append(
                ResidualBlock(
                    dim, out, place.dim, stride, squeeze=narrow, mixer=inside,
                    mixed=valued(place.dim), activation=act, drop_path=place.drop_path,
                )
            )  # fmt: skip
            dim = out
        stages.append(ConvStage(blocks, None if row[0].stage else first))
    if num_features:
        stages[-1].blocks.append(ConvBlock(ConvNorm(dim, num_features, activation=act)))
        dim = num_features
    model = Backbone(
        ConvStem(*convs), stages, [*embed_dims[:-1], dim], reductions, None,
        Head(dim, num_classes, global_pool, drop=drop_rate), num_classes, in_chans, img_size,
        stem_level=(convs[-1].conv.out_channels, 2),
    )  # fmt: skip
    model.input_name = "stem.0.conv.weight"
    init_convs(model, lambda weight: nn.init.normal_(weight, std=0.01))
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From timm's ``ByobNet`` with halo attention."""
    theirs = Released(state_dict, "timm's ByobNet")
    names = {"head.fc": "head.fc"}
    for i in range(len(model.stem) + 1):
        ours = f"stem.{i}" if i < len(model.stem) else "stages.0.downsample.0"
        names |= conv_names(f"stem.conv{i + 1}.", ours)
    out: dict[str, Tensor] = {}
    for i, j, block in blocks_of(model):
        timm, ours = f"stages.{i}.{j}.", f"stages.{i}.blocks.{j}"
        if isinstance(block, ConvBlock):
            names |= conv_names("final_conv.", f"{ours}.conv")
            continue
        for part, where in (("shortcut.conv", "shortcut."), ("conv1", "conv1_1x1."), ("conv3", "conv3_1x1.")):
            names |= conv_names(timm + where, f"{ours}.{part}")
        if not isinstance(block.conv2, Mixing):
            names |= conv_names(f"{timm}conv2_kxk.", f"{ours}.conv2")
            names |= {f"{timm}attn.fc{n}": f"{ours}.squeeze.fc{n}" for n in (1, 2)}
            continue
        names[f"{timm}post_attn"] = f"{ours}.conv2.norm.norm"
        inner = block.conv2.inner
        if isinstance(inner, (HaloAttention, HaloDownsampling)):
            one = functools.partial(
                HaloAttention.convert_state_dict, num_heads=inner.halo.num_heads, head_dim=inner.halo.head_dim
            )
            out |= theirs.parts(re.escape(f"{timm}self_attn.") + "(.+)", f"{ours}.conv2.inner", one)
    return theirs.close(out | by_prefix(theirs, names, model))


def _paper(wide: float, third: int, block: int, halo: int, values: float = 1.0, features: int = 0) -> dict[str, Any]:
    """A row of the paper's table."""
    dims = (64, 128, 256, 512)
    return dict(
        embed_dims=tuple(int(dim * wide) for dim in dims), bottle_ratio=tuple(1 / wide for _ in dims),
        value_ratio=values, depths=(3, 3, third, 3), block_size=block, halo_size=halo, num_heads=(4, 8, 8, 8),
        num_features=features, compat=None,
    )  # fmt: skip


_50 = dict(embed_dims=(256, 512, 1024, 2048), bottle_ratio=0.25, stem="tiered")
_SIZES: dict[str, dict[str, Any]] = {
    "halonet_h1": {},
    "halonet26t": dict(**_50, depths=(2, 2, 2, 2), attention=((), (), (1,), None), halo_size=2),
    "halonet50ts": dict(
        **_50, depths=(3, 4, 6, 3), attention=((), (3,), (1, 3, 5), (1,)), num_heads=(8, 4, 8, 8), activation="silu"
    ),
    "sehalonet33ts": dict(
        embed_dims=(256, 512, 1024, 1536), depths=(2, 3, 3, 2), attention=((), (2,), (2,), None),
        bottle_ratio=(0.25, 0.25, 0.25, 0.333), stem="tiered", stem_pool=False, activation="silu", squeeze=True,
        num_features=1280,
    ),
    "halo2botnet50ts_256": dict(
        **_50, depths=(3, 4, 6, 3), attention=((), (1, 3), (1, 3, 5), (1,)), halo_size=(3, 3, 3, 0),
        num_heads=(8, 8, 8, 4), stem_pool=False, activation="silu",
    ),
}  # fmt: skip
_TAGS = {
    "halonet26t": "a1h_in1k", "halonet50ts": "a1h_in1k", "sehalonet33ts": "ra2_in1k", "halo2botnet50ts_256": "a1h_in1k",
}  # fmt: skip

register_models(
    "halonet",
    halonet,
    _SIZES,
    params={
        "halonet_h1": 8_100_056, "halonet26t": 12_480_288, "halonet50ts": 22_733_280, "sehalonet33ts": 13_691_712,
        "halo2botnet50ts_256": 22_635_360,
    },
    license="Apache-2.0",
    source="huggingface/pytorch-image-models",
    weights={name: (f"timm/{name}.{tag}", "model.safetensors") for name, tag in _TAGS.items()},
    convert=convert,
    img_size={name: 256 for name in _SIZES},
    data={"crop_pct": 0.95},
    data_of={name: {"crop_pct": 0.94} for name in ("halonet50ts", "sehalonet33ts")},
)  # fmt: skip
register_models(
    "halonet",
    halonet,
    {
        "halonet_h0": _paper(0.5, 7, 8, 3),
        "halonet_h2": _paper(1.25, 11, 8, 3),
        "halonet_h3": _paper(1.5, 12, 10, 3, features=1024),
        "halonet_h4": _paper(3, 12, 12, 2, features=1280),
        "halonet_h5": _paper(2, 23, 14, 2, 2.5, 1536),
        "halonet_h6": _paper(2.75, 24, 8, 4, 3, 1536),
        "halonet_h7": _paper(3.5, 26, 10, 3, 4, 2048),
    },
    params={
        "halonet_h0": 5_502_248, "halonet_h2": 9_405_608, "halonet_h3": 11_842_792, "halonet_h4": 19_103_464,
        "halonet_h5": 30_718_952, "halonet_h6": 43_458_280, "halonet_h7": 67_434_728,
    },
    convert=convert,
    img_size={
        "halonet_h0": 256, "halonet_h2": 256, "halonet_h3": 320, "halonet_h4": 384, "halonet_h5": 448,
        "halonet_h6": 512, "halonet_h7": 600,
    },
)  # fmt: skip
