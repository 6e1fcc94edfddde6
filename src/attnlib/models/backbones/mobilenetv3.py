"""MobileNetV3: inverted residuals of searched widths and kernels, and a head that is wide behind the pool only.

Howard et al., 2019, "Searching for MobileNetV3", arXiv 1905.02244. Early stacks have ReLU, later ones
``x relu6(x + 3) / 6``; squeeze-and-excitations are a quarter of the hidden width and gate by ``relu6(x + 3) / 6``. The
last block is a 1 x 1 convolution. Maps to take end where the next stack strides: five, at strides 2 to 32; the first of
the small models is the stem's.

Weights are timm's, on ``tf_`` those of the paper's code, whose convolutions pad as few zeros as they need and whose
norms have another ``eps``; torchvision's state dicts load as well (with ``eps=1e-3``, as its norms have). Differs:
tokens that do not exist enter no convolution, no mean and no statistic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...nn.layers import ConvNorm
from ...nn.released import Released
from ..blocks import ConvStem
from ..build import register_models
from .convs import (
    ConvBlock,
    HardSwish,
    Inverted,
    InvertedResidual,
    Relu,
    by_prefix,
    conv_names,
    divisible,
    init_convs,
    inverted_stages,
)
from .efficientnet import inverted_names
from .stages import Backbone, Head

#: Stacks of blocks: kernel, stride, hidden width over the input's (0 for none, -1 for a 1 x 1 convolution), width,
#: squeeze-and-excitation, ReLU.
STACKS: dict[str, tuple[tuple[tuple[int, int, float, int, bool, bool], ...], ...]] = {
    "small": (
        ((3, 2, 0, 16, True, True),),
        ((3, 2, 4.5, 24, False, True), (3, 1, 3.67, 24, False, True)),
        ((5, 2, 4, 40, True, False), (5, 1, 6, 40, True, False), (5, 1, 6, 40, True, False)),
        ((5, 1, 3, 48, True, False),) * 2,
        ((5, 2, 6, 96, True, False), (5, 1, 6, 96, True, False), (5, 1, 6, 96, True, False)),
        ((1, 1, -1, 576, False, False),),
    ),
    "large": (
        ((3, 1, 0, 16, False, True),),
        ((3, 2, 4, 24, False, True), (3, 1, 3, 24, False, True)),
        ((5, 2, 3, 40, True, True), (5, 1, 3, 40, True, True), (5, 1, 3, 40, True, True)),
        (
            (3, 2, 6, 80, False, False), (3, 1, 2.5, 80, False, False), (3, 1, 2.3, 80, False, False),
            (3, 1, 2.3, 80, False, False),
        ),
        ((3, 1, 6, 112, True, False),) * 2,
        ((5, 2, 6, 160, True, False), (5, 1, 6, 160, True, False), (5, 1, 6, 160, True, False)),
        ((1, 1, -1, 960, False, False),),
    ),
}  # fmt: skip


def mobilenetv3(
    size: str = "large",
    width: float = 1.0,
    head_hidden: int | None = None,
    stem_dim: int | None = None,
    scale_hidden: bool = False,
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
    """A MobileNetV3.

    Args:
        size: ``"small"`` or ``"large"``.
        width: of stacks over those of the paper; the stem keeps its own below 0.75.
        head_hidden: width of the layer before the logits; 1024 and 1280 by default.
        stem_dim: width of the stem; 16 below a ``width`` of 0.75, and 16 times it otherwise, by default.
        scale_hidden: hidden widths are those of the paper's model times ``width``, as torchvision has them, instead of
            the paper's ratios to scaled widths.
        padding: ``"same"`` for zeros as TensorFlow has them, as of :class:`attnlib.nn.layers.ConvNorm`.
        eps: of norms.
        momentum: of norms.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    check_choice("size", size, tuple(STACKS))
    check_real("width", width, above=0)
    conv: dict[str, Any] = dict(eps=eps, momentum=momentum)
    check_flag("scale_hidden", scale_hidden)
    if stem_dim is None:
        stem_dim = 16 if width < 0.75 else divisible(16 * width)
    check_int("stem_dim", stem_dim, least=1)
    stacks: list[list[Inverted]] = []
    own = 16  # channels in, at the paper's width
    for rows in STACKS[size]:
        stacks.append([])
        for kernel, stride, ratio, out, squeeze, relu in rows:
            hidden = divisible(divisible(own * ratio) * width) if scale_hidden and ratio > 0 else None
            stacks[-1].append(Inverted(divisible(out * width), kernel, stride, ratio, squeeze, relu, hidden))
            own = out

    def make(dim: int, row: Inverted, drop_path: float) -> nn.Module:
        act: Callable[[], nn.Module] = Relu if row.relu else HardSwish
        if row.ratio < 0:
            return ConvBlock(ConvNorm(dim, row.out_dim, activation=act, **conv))
        hidden = (row.hidden or divisible(dim * row.ratio)) if row.ratio else None
        squeeze = divisible((hidden or dim) * 0.25) if row.squeeze else 0
        return InvertedResidual(
            dim, row.out_dim, hidden, row.kernel_size, row.stride, squeeze, act, Relu, nn.Hardsigmoid, drop_path,
            padding=padding, **conv,
        )  # fmt: skip

    stages, dims, steps, names = inverted_stages(stacks, make, stem_dim, drop_path_rate)
    if head_hidden is None:
        head_hidden = 1024 if size == "small" else 1280
    head = Head(
        dims[-1], num_classes, global_pool, drop=drop_rate, hidden=head_hidden, activation=HardSwish
    )  # fmt: skip
    model = Backbone(
        ConvStem(ConvNorm(in_chans, stem_dim, 3, 2, padding, activation=HardSwish, **conv)),
        stages, dims, steps, None, head, num_classes, in_chans, img_size,
        stem_level=(stem_dim, 2) if steps[0] > 2 else None,
    )  # fmt: skip
    model.head_hidden_size = head_hidden or dims[-1]
    model.input_name, model.stacks = "stem.0.conv.weight", names  # type: ignore[assignment]
    init_convs(model, lambda weight: nn.init.uniform_(weight, -(weight.shape[0] ** -0.5), weight.shape[0] ** -0.5))
    if head.pre is not None:
        nn.init.normal_(head.pre.weight, std=(2 / head_hidden) ** 0.5)
        nn.init.zeros_(head.pre.bias)
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From timm's and torchvision's ``MobileNetV3``."""
    theirs = Released(state_dict, "timm's or torchvision's MobileNetV3")
    names = {"classifier": "head.fc", "conv_head": "head.pre", **conv_names("", "stem.0", "conv_stem", "bn1")}
    names |= {"classifier.0": "head.pre", "classifier.3": "head.fc", **conv_names("features.0.", "stem.0", "0", "1")}
    return theirs.close(by_prefix(theirs, names | inverted_names(model), model))


_PLAIN = {
    "mobilenetv3_small_050": ("small", 0.5, "lamb_in1k", 1_593_224),
    "mobilenetv3_small_075": ("small", 0.75, "lamb_in1k", 2_041_872),
    "mobilenetv3_small_100": ("small", 1.0, "lamb_in1k", 2_542_856),
    "mobilenetv3_large_050": ("large", 0.5, "", 2_689_904),
    "mobilenetv3_large_075": ("large", 0.75, "", 3_993_528),
    "mobilenetv3_large_100": ("large", 1.0, "ra_in1k", 5_483_032),
}  # fmt: skip
_TF = {
    f"tf_{name}": (size, width, "in1k", count) for name, (size, width, _, count) in _PLAIN.items() if width > 0.5
}  # fmt: skip


def _register(rows: dict[str, tuple[str, float, str, int]], extra: dict[str, Any], data: dict[str, Any]) -> None:
    register_models(
        "mobilenetv3",
        mobilenetv3,
        {name: dict(size=size, width=width, **extra) for name, (size, width, _, _) in rows.items()},
        params={name: count for name, (*_, count) in rows.items()},
        license="Apache-2.0",
        source="huggingface/pytorch-image-models",
        weights={name: (f"timm/{name}.{tag}", "model.safetensors") for name, (_, _, tag, _) in rows.items() if tag},
        convert=convert,
        data={"crop_pct": 0.875, **data},
    )


_register(_PLAIN, {}, {})
_register(
    _TF, dict(padding="same", eps=1e-3), {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
)  # fmt: skip
