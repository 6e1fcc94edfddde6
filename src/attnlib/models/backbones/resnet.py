"""ResNet: residual blocks of convolutions, four stages at strides 4 to 32.

He et al., 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385, with the stride in the 3 x 3
convolution of bottlenecks. The stem is a 7 x 7 convolution of stride 2, or three of 3 x 3 (``deep``, ``tiered``), and a
maximum of stride 2. With ``average`` shortcuts take means instead of every second token (He et al., 2018, "Bag of
Tricks for Image Classification with Convolutional Neural Networks", arXiv 1812.01187): models on ``d`` and ``t``. The
maps to take are those of the stem before its maximum, and of the four stages.

Weights are timm's; torchvision's state dicts load as well. Differs from both: tokens that do not exist enter no
convolution, no maximum and no statistic; the place of the 3 x 3 convolution of bottlenecks may be a mechanism's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...nn.layers import ConvNorm
from ...nn.released import Released
from ..blocks import ConvStem, Make, places
from ..build import register_models
from .convs import Activation, ConvStage, MaxPool, Relu, ResidualBlock, blocks_of, by_prefix, conv_names, init_convs
from .stages import Backbone, Head

STEMS = ("7x7", "deep", "tiered")


def stem_convs(kind: str, in_chans: int, dim: int, activation: Activation = Relu, last_stride: int = 1) -> list[Any]:
    """The convolutions of a stem, the first of stride 2: ``"7x7"``, or three of 3 x 3.

    Args:
        kind: ``"7x7"``; ``"deep"``: two of half the width before the last; ``"tiered"``: of 3 / 8 and of half.
        in_chans: channels of images.
        dim: channels out.
        activation: makes activations.
        last_stride: of the last of three.
    """
    check_choice("stem", kind, STEMS)
    if kind == "7x7":
        return [ConvNorm(in_chans, dim, 7, 2, activation=activation)]
    widths = [in_chans, 3 * dim // 8 if kind == "tiered" else dim // 2, dim // 2, dim]
    return [
        ConvNorm(a, b, 3, stride, activation=activation)
        for a, b, stride in zip(widths[:-1], widths[1:], (2, 1, last_stride), strict=True)
    ]


def resnet(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    basic: bool = False,
    stem: str = "7x7",
    stem_dim: int = 64,
    average: bool = False,
    pool: str = "max",
    squeeze: float = 0.0,
    groups: int = 1,
    group_width: int = 64,
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A ResNet.

    Args:
        embed_dims: width inside the blocks, per stage; bottlenecks end in four times as much.
        depths: blocks per stage.
        basic: blocks of two 3 x 3 convolutions instead of bottlenecks.
        stem: ``"7x7"``, ``"deep"`` or ``"tiered"``, as of :func:`stem_convs`.
        stem_dim: width of the stem.
        average: shortcuts take means of cells.
        pool: what halves the map behind the stem: a ``"max"``, or a ``"conv"`` of 3 x 3 with norm and activation.
        squeeze: width inside a squeeze-and-excitation at the end of every branch, over the branch's; 0 for none.
        groups: of the 3 x 3 convolutions of bottlenecks, as ResNeXt.
        group_width: channels of a group where ``embed_dims`` is 64; with one group the width of the bottleneck.
        num_heads: heads per stage of a ``mechanism``; ``width / 32`` by default.
        mechanism: takes the place of the 3 x 3 convolution of bottlenecks, as in :func:`attnlib.create_model`.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.

    Raises:
        ValueError: a ``mechanism`` in basic blocks, which have no place for one.
    """
    if check_flag("basic", basic) and mechanism is not None:
        raise ValueError("mechanism needs bottlenecks to stand in, got basic=True")
    check_choice("pool", pool, ("max", "conv"))
    check_real("squeeze", squeeze, least=0)
    check_int("groups", groups, least=1)
    check_int("group_width", group_width, least=1)
    if basic and (groups, group_width) != (1, 64):
        raise ValueError(f"groups={groups} and group_width={group_width} need bottlenecks, got basic=True")
    if mechanism is not None and (groups, group_width) != (1, 64):
        raise ValueError("mechanism takes the place of the convolution that groups and group_width are for")
    outs = [width * (1 if basic else 4) for width in embed_dims]
    reductions = [4 * 2**i for i in range(len(embed_dims))]
    dim, stages = stem_dim, []
    heads = [max(1, d // 32) for d in embed_dims] if num_heads is None else num_heads
    for row, out in zip(places(embed_dims, depths, heads, reductions, drop_path_rate), outs, strict=True):
        blocks = []
        for place in row:
            stride = 2 if place.stage and not place.block else 1
            blocks.append(
                ResidualBlock(
                    dim, out, place.dim * group_width // 64 * groups, stride, basic, groups,
                    mixer=None if mechanism is None else mechanism(place),
                    average=average, drop_path=place.drop_path, squeeze_last=True,
                    squeeze=max(8, int(squeeze * out + 4) // 8 * 8) if squeeze else 0,
                )
            )  # fmt: skip
            dim = out
        first = MaxPool() if pool == "max" else ConvStem(ConvNorm(stem_dim, stem_dim, 3, 2, activation=Relu))
        stages.append(ConvStage(blocks, None if row[0].stage else first))
    convs = ConvStem(*stem_convs(stem, in_chans, stem_dim))
    head = Head(dim, num_classes, global_pool, drop=drop_rate)
    model = Backbone(
        convs, stages, outs, reductions, None, head, num_classes, in_chans, img_size, stem_level=(stem_dim, 2)
    )
    model.input_name = "stem.0.conv.weight"
    init_convs(model)
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From timm's and torchvision's ``ResNet``."""
    theirs = Released(state_dict, "timm's or torchvision's ResNet")
    last = len(model.stem) - 1
    names = {"fc": "head.fc", **conv_names("", f"stem.{last}", f"conv1.{3 * last}" if last else "conv1", "bn1")}
    for i in range(last):
        names |= conv_names("conv1.", f"stem.{i}", f"{3 * i}", f"{3 * i + 1}")
    names |= conv_names("maxpool.", "stages.0.downsample.0", "0", "1")
    for i, j, block in blocks_of(model):
        parts = ["conv1", "conv2", "conv3"] if isinstance(block.conv2, nn.Module) else ["conv1", "conv3"]
        for number, part in enumerate(parts, 1):
            names |= conv_names(f"layer{i + 1}.{j}.", f"stages.{i}.blocks.{j}.{part}", f"conv{number}", f"bn{number}")
        for part in ("fc1", "fc2"):
            names[f"layer{i + 1}.{j}.se.{part}"] = f"stages.{i}.blocks.{j}.squeeze.{part}"
        if block.shortcut is not None:  # timm counts the means, also where there are none to take
            first = int(f"layer{i + 1}.{j}.downsample.2.weight" in theirs)
            ours = f"stages.{i}.blocks.{j}.shortcut.conv"
            names |= conv_names(f"layer{i + 1}.{j}.downsample.", ours, f"{first}", f"{first + 1}")
    return theirs.close(by_prefix(theirs, names, model))


def _sizes() -> dict[str, dict[str, Any]]:
    depths = {
        10: (1, 1, 1, 1), 14: (1, 1, 1, 1), 18: (2, 2, 2, 2), 26: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3),
        101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3),
    }  # fmt: skip
    plain = {n: dict(depths=d, basic=n in (10, 18, 34)) for n, d in depths.items()}
    sizes: dict[str, dict[str, Any]] = {f"resnet{n}": plain[n] for n in (18, 26, 34, 50, 101, 152, 200)}
    for n in (18, 26, 34, 50, 101, 152, 200):
        sizes[f"resnet{n}d"] = {**plain[n], "stem": "deep", "average": True}
    for n in (10, 14, 26, 50):
        sizes[f"resnet{n}t"] = {**plain[n], "stem": "tiered", "average": True}
    return sizes


_WEIGHTS = {
    "resnet10t": "c3_in1k", "resnet14t": "c3_in1k", "resnet18": "a1_in1k", "resnet18d": "ra2_in1k",
    "resnet26": "bt_in1k", "resnet26d": "bt_in1k", "resnet26t": "ra2_in1k", "resnet34": "a1_in1k",
    "resnet34d": "ra2_in1k", "resnet50": "a1_in1k", "resnet50d": "ra2_in1k", "resnet101": "a1h_in1k",
    "resnet101d": "ra2_in1k", "resnet152": "a1h_in1k", "resnet152d": "ra2_in1k", "resnet200d": "ra2_in1k",
}  # fmt: skip
_SIDES = {"resnet10t": 176, "resnet14t": 176} | dict.fromkeys(
    ("resnet26t", "resnet101d", "resnet152d", "resnet200d"), 256
)

register_models(
    "resnet",
    resnet,
    _sizes(),
    params={
        "resnet10t": 5_435_488, "resnet14t": 10_081_632, "resnet18": 11_689_512, "resnet18d": 11_708_744,
        "resnet26": 15_995_176, "resnet26d": 16_014_408, "resnet26t": 16_011_872, "resnet34": 21_797_672,
        "resnet34d": 21_816_904, "resnet50": 25_557_032, "resnet50d": 25_576_264, "resnet50t": 25_573_728,
        "resnet101": 44_549_160, "resnet101d": 44_568_392, "resnet152": 60_192_808, "resnet152d": 60_212_040,
        "resnet200": 64_673_832, "resnet200d": 64_693_064,
    },
    license="Apache-2.0",
    source="huggingface/pytorch-image-models",
    weights={name: (f"timm/{name}.{tag}", "model.safetensors") for name, tag in _WEIGHTS.items()},
    convert=convert,
    img_size=_SIDES,
    data={"crop_pct": 0.875},
    data_of={
        **{name: {"crop_pct": 0.95} for name, tag in _WEIGHTS.items() if tag in ("a1_in1k", "a1h_in1k")},
        "resnet26t": {"crop_pct": 0.94}, "resnet101d": {"crop_pct": 0.95}, "resnet152d": {"crop_pct": 0.95},
        "resnet200d": {"crop_pct": 0.95},
    },
)  # fmt: skip
