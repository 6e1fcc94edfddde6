"""EfficientNet: inverted residuals, scaled in width, depth and image size together.

Tan and Le, 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv 1905.11946. A 3 x 3
stem of stride 2; seven stacks of inverted residuals with squeeze-and-excitation, a quarter of the block's input wide;
a 1 x 1 convolution before the head. Widths are multiples of 8, depths are rounded up. Maps to take end where the next
stack strides: five, at strides 2 to 32.

Weights are timm's, on ``tf_`` those of the paper's code, whose convolutions pad as few zeros as they need and whose
norms have another ``eps``; torchvision's state dicts load as well (its b5 to b7 need ``eps=1e-3``). Differs: tokens
that do not exist enter no convolution, no mean and no statistic.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ...checks import check_real
from ...nn.layers import ConvNorm
from ...nn.released import Released
from ..blocks import ConvStem
from ..build import register_models
from .convs import (
    Inverted,
    InvertedResidual,
    Silu,
    blocks_of,
    by_prefix,
    conv_names,
    divisible,
    init_convs,
    inverted_stages,
)
from .stages import Backbone, Head

#: Depth, kernel, stride, hidden width over the input's, and width of the stacks of b0.
STACKS = (
    (1, 3, 1, 0, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip


def efficientnet(
    width: float = 1.0,
    depth: float = 1.0,
    padding: str | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An EfficientNet.

    Args:
        width: of stacks over those of b0.
        depth: of stacks over those of b0.
        padding: ``"same"`` for zeros as TensorFlow has them, as of :class:`attnlib.nn.layers.ConvNorm`.
        eps: of norms.
        momentum: of norms.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    check_real("width", width, above=0)
    check_real("depth", depth, above=0)
    conv: dict[str, Any] = dict(eps=eps, momentum=momentum)
    stem_dim, features = divisible(32 * width), divisible(1280 * width)
    stacks = [
        [Inverted(divisible(out * width), kernel, 1 if i else stride, ratio) for i in range(math.ceil(count * depth))]
        for count, kernel, stride, ratio, out in STACKS
    ]

    def make(dim: int, row: Inverted, drop_path: float) -> nn.Module:
        hidden = divisible(dim * row.ratio) if row.ratio else None
        squeeze = round((hidden or dim) * (0.25 / (row.ratio or 1)))
        return InvertedResidual(
            dim, row.out_dim, hidden, row.kernel_size, row.stride, squeeze, drop_path=drop_path, padding=padding, **conv
        )

    stages, dims, steps, names = inverted_stages(stacks, make, stem_dim, drop_path_rate)
    model = Backbone(
        ConvStem(ConvNorm(in_chans, stem_dim, 3, 2, padding, activation=Silu, **conv)),
        stages, dims, steps, ConvNorm(dims[-1], features, activation=Silu, **conv),
        Head(features, num_classes, global_pool, drop=drop_rate), num_classes, in_chans, img_size,
    )  # fmt: skip
    model.num_features = model.head_hidden_size = features
    model.input_name, model.stacks = "stem.0.conv.weight", names  # type: ignore[assignment]
    init_convs(model, lambda weight: nn.init.uniform_(weight, -(weight.shape[0] ** -0.5), weight.shape[0] ** -0.5))
    return model


def inverted_names(model: Any) -> dict[str, str]:
    """From timm's and torchvision's names of parts of the blocks to ours."""
    blocks = {f"stages.{i}.blocks.{j}": block for i, j, block in blocks_of(model)}
    names: dict[str, str] = {}
    flat = 0
    for number, ours in model.stacks.items():
        block, timm = blocks[ours], f"blocks.{number}."
        stack, _, index = number.partition(".")
        flat += 1
        if not isinstance(block, InvertedResidual):  # a 1 x 1 convolution alone
            names |= conv_names(timm, f"{ours}.conv", norm="bn1") | conv_names(
                f"features.{flat}.", f"{ours}.conv", "0", "1"
            )
            continue
        parts = ["expand", "depthwise", "project"] if block.expand is not None else ["depthwise", "project"]
        theirs = ["conv_pw", "conv_dw", "conv_pwl"] if len(parts) == 3 else ["conv_dw", "conv_pw"]
        for i, (part, conv) in enumerate(zip(parts, theirs, strict=True), 1):
            names |= conv_names(timm, f"{ours}.{part}", conv, f"bn{i}")
        names |= {f"{timm}se.conv_reduce": f"{ours}.squeeze.fc1", f"{timm}se.conv_expand": f"{ours}.squeeze.fc2"}
        # torchvision counts the parts of a block, and blocks by stack in EfficientNet but not in MobileNetV3
        for where in (f"features.{int(stack) + 1}.{index}.block.", f"features.{flat}.block."):
            at = 0
            for part in [p for name in parts for p in ([name] if name != "project" else ["squeeze", name])]:
                if part == "squeeze" and block.squeeze is None:
                    continue
                if part == "squeeze":
                    names |= {f"{where}{at}.fc{n}": f"{ours}.squeeze.fc{n}" for n in (1, 2)}
                else:
                    names |= conv_names(f"{where}{at}.", f"{ours}.{part}", "0", "1")
                at += 1
    return names


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From timm's and torchvision's ``EfficientNet``."""
    theirs = Released(state_dict, "timm's or torchvision's EfficientNet")
    names = {"classifier": "head.fc", "classifier.1": "head.fc", **conv_names("", "stem.0", "conv_stem", "bn1")}
    names |= conv_names("", "norm", "conv_head", "bn2") | conv_names("features.0.", "stem.0", "0", "1")
    names |= conv_names(f"features.{len(STACKS) + 1}.", "norm", "0", "1")
    return theirs.close(by_prefix(theirs, names | inverted_names(model), model))


_SCALES = (
    (1.0, 1.0, 224), (1.0, 1.1, 240), (1.1, 1.2, 260), (1.2, 1.4, 300), (1.4, 1.8, 380), (1.6, 2.2, 456),
    (1.8, 2.6, 528), (2.0, 3.1, 600), (2.2, 3.6, 672),
)  # fmt: skip
_PARAMS = (
    5_288_548, 7_794_184, 9_109_994, 12_233_232, 19_341_616, 30_389_784, 43_040_704, 66_347_960, 87_413_142,
)  # fmt: skip
#: Hub name of the weights, side and crop of their images; of b6 to b8 none are released but those on ``tf_``.
_WEIGHTS = (
    ("ra_in1k", 224, 0.875), ("ft_in1k", 224, 0.875), ("ra_in1k", 256, 0.875), ("ra2_in1k", 288, 0.875),
    ("ra2_in1k", 320, 0.875), ("sw_in12k_ft_in1k", 448, 1.0), ("", 528, 0.942), ("", 600, 0.949), ("", 672, 0.954),
)  # fmt: skip
_CROPS = (0.875, 0.882, 0.89, 0.904, 0.922, 0.934, 0.942, 0.949, 0.954)


def _register(prefix: str, extra: dict[str, Any], weights: tuple[tuple[str, int, float], ...]) -> None:
    names = [f"{prefix}efficientnet_b{i}" for i in range(len(_SCALES))]
    rows = dict(zip(names, weights, strict=True))
    register_models(
        "efficientnet",
        efficientnet,
        {name: dict(width=w, depth=d, **extra) for name, (w, d, _) in zip(names, _SCALES, strict=True)},
        params=dict(zip(names, _PARAMS, strict=True)),
        license="Apache-2.0",
        source="huggingface/pytorch-image-models",
        weights={name: (f"timm/{name}.{tag}", "model.safetensors") for name, (tag, _, _) in rows.items() if tag},
        convert=convert,
        img_size={name: side for name, (_, side, _) in rows.items()},
        data_of={
            name: {"crop_pct": crop, **({"mean": (0.5,) * 3, "std": (0.5,) * 3} if tag == "ap_in1k" else {})}
            for name, (tag, _, crop) in rows.items()
        },
    )


_register("", {}, _WEIGHTS)
_register(
    "tf_",
    dict(padding="same", eps=1e-3),
    tuple(
        ("ap_in1k" if i == 8 else "ns_jft_in1k", side, crop)
        for i, ((_, _, side), crop) in enumerate(zip(_SCALES, _CROPS, strict=True))
    ),
)
