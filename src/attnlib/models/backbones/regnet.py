"""RegNetY: stages of bottlenecks with grouped convolutions, widths and depths from one line.

Radosavovic et al., 2020, "Designing Network Design Spaces", arXiv 2003.13678. Block ``j`` is as wide as
``w_0 + w_a j``, rounded to powers of ``w_m`` times ``w_0`` and to multiples of 8; blocks of one width are a stage, and
widths are multiples of the group's. A block is a ResNet's bottleneck that is nowhere narrower than its output, with a
squeeze-and-excitation behind the grouped convolution, a quarter of the block's input wide. The stem is one 3 x 3
convolution of stride 2; the maps to take are its and those of the four stages.

Weights are timm's; torchvision's state dicts load as well (its 800MF and 8GF models round widths to groups in a way of
their own: names on ``_tv``). Differs from both: tokens that do not exist enter no convolution, no mean and no
statistic; the place of the grouped convolution may be a mechanism's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_int, check_real
from ...nn.layers import ConvNorm
from ...nn.released import Released
from ..blocks import ConvStem, Make, places
from ..build import register_models
from .convs import ConvStage, Relu, ResidualBlock, blocks_of, by_prefix, conv_names, divisible, init_convs
from .stages import Backbone, Head


def widths_and_depths(
    initial: int, slope: float, factor: float, depth: int, group: int, exact: bool = True
) -> tuple[list[int], list[int], list[int]]:
    """Width, depth and channels per group of every stage.

    Args:
        initial: width of the first block, ``w_0``, a multiple of 8.
        slope: what every block adds, ``w_a``.
        factor: between widths, ``w_m``.
        depth: blocks.
        group: channels per group.
        exact: widths are the nearest multiples of the group; otherwise also no less than nine tenths, as torchvision.
    """
    check_int("initial", initial, least=8)
    check_real("slope", slope, least=0)
    check_real("factor", factor, above=1)
    check_int("depth", depth, least=1)
    check_int("group", group, least=1)
    counts: Counter[int] = Counter()
    for j in range(depth):
        power = round(math.log((initial + slope * j) / initial) / math.log(factor))
        counts[round(initial * factor**power / 8) * 8] += 1
    rough = sorted(counts)
    groups = [min(group, width) for width in rough]
    widths = [
        round(width / g) * g if exact else divisible(width, g) for width, g in zip(rough, groups, strict=True)
    ]  # fmt: skip
    return widths, [counts[width] for width in rough], groups


def regnet(
    initial: int = 24,
    slope: float = 36.44,
    factor: float = 2.49,
    depth: int = 13,
    group: int = 8,
    exact: bool = True,
    squeeze: float = 0.25,
    stem_dim: int = 32,
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A RegNet.

    Args:
        initial, slope, factor, depth, group, exact: as of :func:`widths_and_depths`.
        squeeze: width of squeeze-and-excitations over that of the block's input; 0 for none (RegNetX).
        stem_dim: width of the stem.
        num_heads: heads per stage of a ``mechanism``; ``width / 32``, as far as it divides, by default.
        mechanism: takes the place of grouped convolutions, as in :func:`attnlib.create_model`.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    check_real("squeeze", squeeze, least=0)
    dims, depths, groups = widths_and_depths(initial, slope, factor, depth, group, exact)
    reductions = [4 * 2**i for i in range(len(dims))]
    heads = [math.gcd(d, max(1, d // 32)) for d in dims] if num_heads is None else num_heads
    dim, stages = stem_dim, []
    for row, g in zip(places(dims, depths, heads, reductions, drop_path_rate), groups, strict=True):
        blocks = []
        for place in row:
            blocks.append(
                ResidualBlock(
                    dim, place.dim, place.dim, 1 if place.block else 2, groups=place.dim // g,
                    squeeze=round(dim * squeeze), mixer=None if mechanism is None else mechanism(place),
                    drop_path=place.drop_path,
                )
            )  # fmt: skip
            dim = place.dim
        stages.append(ConvStage(blocks))
    stem = ConvStem(ConvNorm(in_chans, stem_dim, 3, 2, activation=Relu))
    head = Head(dim, num_classes, global_pool, drop=drop_rate)
    model = Backbone(
        stem, stages, dims, reductions, None, head, num_classes, in_chans, img_size, stem_level=(stem_dim, 2)
    )
    model.input_name = "stem.0.conv.weight"
    init_convs(model, lambda weight: nn.init.normal_(weight, std=0.01))
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From timm's and torchvision's ``RegNet``."""
    theirs = Released(state_dict, "timm's or torchvision's RegNet")
    names = {"head.fc": "head.fc", **conv_names("stem.", "stem.0")}
    names |= {"fc": "head.fc", **conv_names("stem.", "stem.0", "0", "1")}
    for i, j, _ in blocks_of(model):
        ours = f"stages.{i}.blocks.{j}"
        timm, vision = f"s{i + 1}.b{j + 1}", f"trunk_output.block{i + 1}.block{i + 1}-{j}"
        for number, letter in ((1, "a"), (2, "b"), (3, "c")):
            names |= conv_names(f"{timm}.conv{number}.", f"{ours}.conv{number}")
            names |= conv_names(f"{vision}.f.{letter}.", f"{ours}.conv{number}", "0", "1")
        for number in (1, 2):
            names[f"{timm}.se.fc{number}"] = names[f"{vision}.f.se.fc{number}"] = f"{ours}.squeeze.fc{number}"
        names |= conv_names(f"{timm}.downsample.", f"{ours}.shortcut.conv")
        names |= conv_names(f"{vision}.proj.", f"{ours}.shortcut.conv", "0", "1")
    return theirs.close(by_prefix(theirs, names, model))


def _sizes() -> dict[str, dict[str, Any]]:
    sizes: dict[str, dict[str, Any]] = {
        name: dict(initial=initial, slope=slope, factor=factor, group=group, depth=depth)
        for name, initial, slope, factor, group, depth in (
            ("regnety_002", 24, 36.44, 2.49, 8, 13), ("regnety_004", 48, 27.89, 2.09, 8, 16),
            ("regnety_006", 48, 32.54, 2.32, 16, 15), ("regnety_008", 56, 38.84, 2.4, 16, 14),
            ("regnety_016", 48, 20.71, 2.65, 24, 27), ("regnety_032", 80, 42.63, 2.66, 24, 21),
            ("regnety_040", 96, 31.41, 2.24, 64, 22), ("regnety_064", 112, 33.22, 2.27, 72, 25),
            ("regnety_080", 192, 76.82, 2.19, 56, 17), ("regnety_120", 168, 73.36, 2.37, 112, 19),
            ("regnety_160", 200, 106.23, 2.48, 112, 18), ("regnety_320", 232, 115.89, 2.53, 232, 20),
        )
    }  # fmt: skip
    for name in ("regnety_008", "regnety_080"):
        sizes[f"{name}_tv"] = {**sizes[name], "exact": False}
    return sizes


_PARAMS = {
    "regnety_002": 3_162_996, "regnety_004": 4_344_144, "regnety_006": 6_055_160, "regnety_008": 6_263_168,
    "regnety_008_tv": 6_432_512, "regnety_016": 11_202_430, "regnety_032": 19_436_338, "regnety_040": 20_646_656,
    "regnety_064": 30_583_252, "regnety_080": 39_180_068, "regnety_080_tv": 39_381_472, "regnety_120": 51_822_544,
    "regnety_160": 83_590_140, "regnety_320": 145_046_770,
}  # fmt: skip
#: The weights of every size, by their licence.
_WEIGHTS = {
    "MIT": dict.fromkeys(("regnety_002", "regnety_006", "regnety_008"), ("pycls_in1k", 0.875)),
    "BSD-3-Clause": dict.fromkeys(
        ("regnety_004", "regnety_008_tv", "regnety_016", "regnety_080_tv", "regnety_320"), ("tv2_in1k", 0.965)
    ),
    "Apache-2.0": {
        "regnety_032": ("ra_in1k", 0.95), "regnety_040": ("ra3_in1k", 0.95), "regnety_064": ("ra3_in1k", 0.95),
        "regnety_080": ("ra3_in1k", 0.95), "regnety_120": ("sw_in12k_ft_in1k", 0.95),
        "regnety_160": ("sw_in12k_ft_in1k", 0.95),
    },
}  # fmt: skip

for _license, _tags in _WEIGHTS.items():
    register_models(
        "regnet",
        regnet,
        {name: size for name, size in _sizes().items() if name in _tags},
        params=_PARAMS,
        license=_license,
        source="huggingface/pytorch-image-models",
        weights={name: (f"timm/{name}.{tag}", "model.safetensors") for name, (tag, _) in _tags.items()},
        convert=convert,
        data_of={name: {"crop_pct": crop} for name, (_, crop) in _tags.items()},
    )
