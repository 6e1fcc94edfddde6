"""EfficientViT (Microsoft's): one cascaded group attention between feed-forward layers, on maps of 16 pixels a token.

Liu et al., 2023, "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", arXiv 2305.07027;
not the model of that name by Cai et al. Stem, merging and heads are as in SHViT, which took them over.

Differs from the authors' code: any size; tokens that do not exist enter no convolution, mean or statistic; windows are
filled up with zeros that are not attended to, unless ``compat="authors"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_ints
from ...nn.layers import BatchNormLinear, ConvMlp, ConvNorm, ResidualConv
from ...nn.partition.efficientvit import CascadedGroupAttention
from ..blocks import ConvStem, Make, Place, Residual, check_stages, places
from ..build import register_models
from .shvit import DistilledClassifier, Relu, SHViTMerging, converted
from .stages import Backbone, Head, Stage


class EfficientViTBlock(nn.Module):
    """Residual convolution and MLP, attention, residual convolution and MLP."""

    def __init__(self, dim: int, mixer: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.before, self.after = ResidualConv(dim, gain=0.0), ResidualConv(dim, gain=0.0)
        self.mlp_before = Residual(dim, ConvMlp(dim, 2.0, Relu, gain=0.0), None)
        self.mixer = Residual(dim, mixer, None, drop_path)
        self.mlp_after = Residual(dim, ConvMlp(dim, 2.0, Relu, gain=0.0), None)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        x, _ = self.mlp_before(self.before(x, valid), valid)
        x, carry = self.mixer(x, valid, carry, losses)
        x, _ = self.mlp_after(self.after(x, valid), valid)
        return x, carry


def efficientvit(
    embed_dims: Sequence[int] = (64, 128, 192),
    depths: Sequence[int] = (1, 2, 3),
    num_heads: Sequence[int] = (4, 4, 4),
    kernel_sizes: Sequence[int] = (5, 5, 5, 5),
    window_sizes: Sequence[int] = (7, 7, 7),
    key_dim: int = 16,
    distillation: bool = False,
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An EfficientViT.

    Args:
        embed_dims: width per stage; the first must be a multiple of 8.
        depths: blocks per stage.
        num_heads: heads per stage.
        kernel_sizes: of the convolutions of queries, per head.
        window_sizes: tokens per axis of a window, per stage; at most those of the stage's map at ``img_size``.
        key_dim: width of queries and keys.
        distillation: a second classifier for a teacher's labels; in training the model gives a pair.
        compat: of :class:`attnlib.nn.partition.efficientvit.CascadedGroupAttention`.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_flag("distillation", distillation)
    check_choice("compat", compat, (None, "authors"))
    check_int("key_dim", key_dim, least=1)
    check_stages(len(embed_dims), window_sizes=window_sizes)
    windows = check_ints("window_sizes", window_sizes, least=1)
    check_ints("kernel_sizes", tuple(kernel_sizes), least=1)
    first = embed_dims[0]
    if first % 8:
        raise ValueError(f"embed_dims must begin with a multiple of 8, got {tuple(embed_dims)}")
    reductions = [16 * 2**i for i in range(len(embed_dims))]
    sides = (img_size,) * 2 if isinstance(img_size, int) else tuple(img_size)

    def own(place: Place) -> nn.Module:
        largest = max(-(-side // place.stride) for side in sides)
        window = min(windows[place.stage], largest)
        return CascadedGroupAttention(place.dim, place.num_heads, key_dim, window, kernel_sizes, compat)

    make = mechanism or own
    widths = [in_chans, first // 8, first // 4, first // 2, first]
    stem = ConvStem(
        *(ConvNorm(a, b, 3, 2, activation=None if b == first else Relu) for a, b in zip(widths, widths[1:]))  # noqa: B905
    )
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        between = SHViTMerging(embed_dims[row[0].stage - 1], row[0].dim) if row[0].stage else None
        stages.append(Stage([EfficientViTBlock(p.dim, make(p), p.drop_path) for p in row], between))
    classifier = DistilledClassifier if distillation else BatchNormLinear
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate, classifier=classifier)
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    model.input_name = "stem.0.conv.weight"
    return model


_INSIDE = {
    "dw0.m": "before.conv", "ffn0.m.pw1": "mlp_before.inner.fc1", "ffn0.m.pw2": "mlp_before.inner.fc2",
    "dw1.m": "after.conv", "ffn1.m.pw1": "mlp_after.inner.fc1", "ffn1.m.pw2": "mlp_after.inner.fc2",
}  # fmt: skip


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``EfficientViT``."""
    mixer = CascadedGroupAttention.convert_state_dict
    return converted(state_dict, "the authors' EfficientViT", mixer, _INSIDE)


_MIXED = (7, 5, 3, 3)
_SIZES: dict[str, dict[str, Any]] = {
    "efficientvit_m0": dict(),
    "efficientvit_m1": dict(embed_dims=(128, 144, 192), num_heads=(2, 3, 3), kernel_sizes=_MIXED),
    "efficientvit_m2": dict(embed_dims=(128, 192, 224), num_heads=(4, 3, 2), kernel_sizes=_MIXED),
    "efficientvit_m3": dict(embed_dims=(128, 240, 320), num_heads=(4, 3, 4)),
    "efficientvit_m4": dict(embed_dims=(128, 256, 384), kernel_sizes=_MIXED),
    "efficientvit_m5": dict(embed_dims=(192, 288, 384), depths=(1, 3, 4), num_heads=(3, 3, 4), kernel_sizes=_MIXED),
}

register_models(
    "efficientvit-cascaded-group-attention",
    efficientvit,
    _SIZES,
    params={
        "efficientvit_m0": 2_349_436,
        "efficientvit_m1": 2_980_560,
        "efficientvit_m2": 4_187_554,
        "efficientvit_m3": 6_900_722,
        "efficientvit_m4": 8_804_228,
        "efficientvit_m5": 12_473_772,
    },
    license="MIT",
    source="microsoft/Cream",
    convert=convert,
)
