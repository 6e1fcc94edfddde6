"""SHViT: three stages at strides 16 to 64, single-head attention on some of the channels in the last two.

Yun and Ro, 2024, "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design", arXiv 2401.16456. Four
3 x 3 convolutions of stride 2 make tokens. A block is a depthwise convolution, attention and a two-layer MLP, each
added to its input and each ending in a BatchNorm that starts at zero. Between stages lie such a convolution and MLP at
the old width, an inverted residual of stride 2 with squeeze-and-excitation, and both again at the new width. Every
BatchNorm stands behind a convolution and folds into it (:func:`attnlib.deploy`), residual convolutions with their
identity.

Differs from the authors' code: tokens that do not exist enter no convolution, no mean and no statistic; stochastic
depth may be switched on.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag
from ...nn.dense.shvit import SingleHeadAttention
from ...nn.layers import BatchNormLinear, ConvMlp, ConvNorm, ResidualConv, SqueezeExcite, strided_valid
from ...nn.released import Released, Rule
from ..blocks import ConvStem, Make, Place, Residual, check_stages, places
from ..build import register_models
from .stages import Backbone, Head, Stage

Relu = functools.partial(nn.ReLU, inplace=True)


class SHViTBlock(nn.Module):
    """Residual convolution, attention (none in early stages), MLP."""

    def __init__(self, dim: int, mixer: nn.Module | None, drop_path: float = 0.0):
        super().__init__()
        self.position = ResidualConv(dim, gain=0.0)
        self.mixer = None if mixer is None else Residual(dim, mixer, None, drop_path)
        self.mlp = Residual(dim, ConvMlp(dim, 2.0, Relu, gain=0.0), None, drop_path)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        x = self.position(x, valid)
        if self.mixer is not None:
            x, carry = self.mixer(x, valid, carry, losses)
        x, _ = self.mlp(x, valid)
        return x, carry


class SHViTMerging(nn.Module):
    """Between stages: convolution and MLP, an inverted residual of stride 2 without a shortcut, convolution and MLP."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        hidden = 4 * dim
        self.before, self.after = ResidualConv(dim), ResidualConv(out_dim)
        self.mlp_before = Residual(dim, ConvMlp(dim, 2.0, Relu, gain=0.0), None)
        self.expand = ConvNorm(dim, hidden, activation=Relu)
        self.depthwise = ConvNorm(hidden, hidden, 3, 2, groups=hidden, activation=Relu)
        self.squeeze = SqueezeExcite(hidden, max(8, (dim + 4) // 8 * 8))
        self.project = ConvNorm(hidden, out_dim)
        self.mlp_after = Residual(out_dim, ConvMlp(out_dim, 2.0, Relu, gain=0.0), None)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / 2), ceil(W / 2), out_dim), and which of these exist."""
        x, _ = self.mlp_before(self.before(x, valid), valid)
        x = self.depthwise(self.expand(x, valid), valid)
        valid = strided_valid(valid, 2)
        x = self.project(self.squeeze(x, valid), valid)
        x, _ = self.mlp_after(self.after(x, valid), valid)
        return x, valid


class DistilledClassifier(nn.Module):
    """Two classifiers: in training the pair, for labels and for a teacher; in evaluation their mean."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.labels, self.teacher = BatchNormLinear(dim, num_classes), BatchNormLinear(dim, num_classes)

    def forward(self, x: Tensor) -> Any:
        both = self.labels(x), self.teacher(x)
        return both if self.training else (both[0] + both[1]) / 2


def shvit(
    embed_dims: Sequence[int] = (128, 224, 320),
    depths: Sequence[int] = (2, 4, 5),
    partial_dims: Sequence[int] = (32, 48, 68),
    kinds: Sequence[str] = ("conv", "attention", "attention"),
    qk_dim: int = 16,
    distillation: bool = False,
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A SHViT.

    Args:
        embed_dims: width per stage; the first must be a multiple of 8.
        depths: blocks per stage.
        partial_dims: channels that attention reads, per stage.
        kinds: ``"conv"`` or ``"attention"`` per stage: whether blocks have attention.
        qk_dim: width of queries and keys.
        distillation: a second classifier for a teacher's labels; in training the model gives a pair.
        num_heads: heads per stage of another ``mechanism``; 1 by default.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_flag("distillation", distillation)
    check_stages(len(embed_dims), kinds=kinds, partial_dims=partial_dims)
    for kind in kinds:
        check_choice("kinds", kind, ("conv", "attention"))
    first = embed_dims[0]
    if first % 8:
        raise ValueError(f"embed_dims must begin with a multiple of 8, got {tuple(embed_dims)}")
    reductions = [16 * 2**i for i in range(len(embed_dims))]

    def mixer(place: Place) -> nn.Module | None:
        if kinds[place.stage] == "conv":
            return None
        if mechanism is not None:
            return mechanism(place)
        return SingleHeadAttention(place.dim, partial_dims[place.stage], qk_dim)

    widths = [in_chans, first // 8, first // 4, first // 2, first]
    stem = ConvStem(
        *(ConvNorm(a, b, 3, 2, activation=None if b == first else Relu) for a, b in zip(widths, widths[1:]))  # noqa: B905
    )
    stages = []
    heads = [1] * len(embed_dims) if num_heads is None else num_heads
    for row in places(embed_dims, depths, heads, reductions, drop_path_rate):
        between = SHViTMerging(embed_dims[row[0].stage - 1], row[0].dim) if row[0].stage else None
        stages.append(Stage([SHViTBlock(p.dim, mixer(p), p.drop_path) for p in row], between))
    classifier = DistilledClassifier if distillation else BatchNormLinear
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate, classifier=classifier)
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    model.input_name = "stem.0.conv.weight"
    return model


_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
#: What stands between stages, in the order of timm's numbers.
BETWEEN = {
    "0.m": "before.conv", "1.m.pw1": "mlp_before.inner.fc1", "1.m.pw2": "mlp_before.inner.fc2", "2.conv1": "expand",
    "2.conv2": "depthwise", "2.conv3": "project", "3.m": "after.conv", "4.m.pw1": "mlp_after.inner.fc1",
    "4.m.pw2": "mlp_after.inner.fc2",
}  # fmt: skip
_INSIDE = {"conv.m": "position.conv", "ffn.m.pw1": "mlp.inner.fc1", "ffn.m.pw2": "mlp.inner.fc2"}


def as_timm(name: str) -> str:
    """timm's name for the authors', who put what lies between stages at the front of the later one's blocks."""
    match = re.fullmatch(r"blocks([123])\.(\d+)\.(.+)", name)
    if match is None:
        return name
    stage, block, rest = int(match[1]) - 1, int(match[2]), match[3]
    if not stage:
        return f"stages.0.blocks.{block}.{rest}"
    if block > 2:
        return f"stages.{stage}.blocks.{block - 3}.{rest}"
    if block == 1:
        return f"stages.{stage}.downsample.2.{rest}"
    which, _, rest = rest.partition(".")
    return f"stages.{stage}.downsample.{int(which) + (3 if block else 0) if which in '01' else which}.{rest}"


def converted(
    state_dict: dict[str, Tensor], source: str, mixer: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
    inside: Mapping[str, str],
) -> dict[str, Tensor]:  # fmt: skip
    """From a released network of this shape: its stem, merging and distilled head, and blocks of its own.

    Args:
        state_dict: theirs, in the authors' or in timm's names.
        source: whose it is, for errors.
        mixer: from the state dict of their mixer to ours.
        inside: by their name of a convolution with its norm within a block, ours.
    """
    theirs = Released(state_dict, source)
    theirs = Released({as_timm(name): theirs.peek(name) for name in theirs}, source)
    block, between = r"stages\.(\d+)\.blocks\.(\d+)", r"stages\.(\d+)\.downsample"
    out = theirs.parts(block + r"\.mixer\.m\.(.+)", r"stages.\1.blocks.\2.mixer.inner", mixer)
    rules: dict[str, Rule] = {}

    def conv(where: str, ours: str, groups: int) -> None:
        rules[rf"{where}\.c\.(weight)"] = rf"{ours}.conv.\{groups + 1}"
        rules[rf"{where}\.bn\.{_NORM}"] = rf"{ours}.norm.\{groups + 1}"

    for part, ours in inside.items():
        conv(rf"{block}\.{re.escape(part)}", rf"stages.\1.blocks.\2.{ours}", 2)
    for part, ours in BETWEEN.items():
        conv(rf"{between}\.{re.escape(part)}", rf"stages.\1.downsample.{ours}", 1)
    for i in range(4):
        conv(rf"patch_embed\.{2 * i}", f"stem.{i}", 0)
    rules[rf"{between}\.2\.se\.(fc1|fc2|conv_reduce|conv_expand)\.(weight|bias)"] = lambda match, value: {
        f"stages.{match[1]}.downsample.squeeze.{_FC.get(match[2], match[2])}.{match[3]}": (
            value.flatten(1) if value.dim() == 4 else value
        )
    }
    two = any(name.startswith("head_dist.") for name in theirs)
    for head, ours in (("head", "head.fc.labels" if two else "head.fc"), ("head_dist", "head.fc.teacher")):
        rules[rf"{head}\.bn\.{_NORM}"] = rf"{ours}.norm.\1"
        rules[rf"{head}\.l\.(weight|bias)"] = rf"{ours}.linear.\1"
    return theirs.close(out | theirs.renamed(rules))


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``SHViT`` and timm's."""
    return converted(state_dict, "SHViT", SingleHeadAttention.convert_state_dict, _INSIDE)


#: What older timm calls the layers of a squeeze-and-excitation.
_FC = {"conv_reduce": "fc1", "conv_expand": "fc2"}
_SIZES: dict[str, dict[str, Any]] = {
    "shvit_s1": dict(embed_dims=(128, 224, 320), depths=(2, 4, 5), partial_dims=(32, 48, 68)),
    "shvit_s2": dict(embed_dims=(128, 308, 448), depths=(2, 4, 5), partial_dims=(32, 66, 96)),
    "shvit_s3": dict(embed_dims=(192, 352, 448), depths=(3, 5, 5), partial_dims=(48, 75, 96)),
    "shvit_s4": dict(embed_dims=(224, 336, 448), depths=(4, 7, 6), partial_dims=(48, 72, 96), img_size=256),
}

register_models(
    "shvit",
    shvit,
    _SIZES,
    params={"shvit_s1": 6_330_808, "shvit_s2": 11_483_072, "shvit_s3": 14_245_273, "shvit_s4": 16_588_484},
    license="MIT",
    source="ysj9909/SHViT",
    weights={name: (f"timm/{name}.in1k", "model.safetensors") for name in _SIZES},
    convert=convert,
    img_size={"shvit_s4": 256},
    data={"crop_pct": 0.875},
)
