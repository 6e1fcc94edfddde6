"""MaxViT: stages of inverted residuals, attention in windows, attention on a grid spread over the whole map.

Tu et al., 2022, "MaxViT: Multi-Axis Vision Transformer", arXiv 2204.01697. Two 3 x 3 convolutions, the first of stride
2, make tokens; every stage begins with an inverted residual of stride 2. A block is an inverted residual, attention in
windows of ``P x P`` and an MLP, attention on a ``P x P`` grid and an MLP. ``P`` is 1/32 of the side of images.

Two layouts: ``"tf"`` is the paper's (convolutions padded as TensorFlow does, GELU by tanh, widths of inverted residuals
from the output, a hidden layer with tanh before the logits), ``"rw"`` that of the models trained in timm before the
paper's code was there (SiLU, widths from the input, no bias behind inverted residuals, smaller squeeze-and-excitation);
its ``rmlp`` models learn the relative bias as a function of the displacement.

Differs from the released code: any size. Maps that windows or grids do not divide are padded with tokens that nobody
attends to, where theirs refuse them; means of cells at the border are those of the tokens that exist.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...nn.layers import ConvNorm
from ...nn.partition.maxvit import PartitionAttention
from ...nn.released import Released, Rule
from ..blocks import Block, ConvStem, Make, MBConv, Place, places
from ..build import register_models
from .stages import IMAGENET_MEAN, IMAGENET_STD, Backbone, Head, Stage

LAYOUTS = ("tf", "rw")

GeluTanh = functools.partial(nn.GELU, approximate="tanh")
Silu = functools.partial(nn.SiLU, inplace=True)


class MaxViTBlock(nn.Module):
    """Inverted residual (none in the first block of a stage, where it lies before), window block, grid block."""

    def __init__(self, conv: MBConv | None, window: Block, grid: Block):
        super().__init__()
        self.conv, self.window, self.grid = conv, window, grid

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        if self.conv is not None:
            x, valid = self.conv(x, valid)
        x, carry = self.window(x, valid, carry, losses)
        return self.grid(x, valid, carry, losses)


def maxvit(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 5, 2),
    stem_dims: Sequence[int] = (64, 64),
    layout: str = "tf",
    head_dim: int = 32,
    window_size: int | tuple[int, int] | None = None,
    grid_size: int | tuple[int, int] | None = None,
    rel_bias: bool | str = True,
    rel_hidden: int = 512,
    mlp_ratio: float = 4.0,
    expand_ratio: float = 4.0,
    head_hidden: int | None = None,
    layer_scale: float | None = None,
    momentum: float | None = None,
    pad: str = "mask",
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A MaxViT.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        stem_dims: widths of the two convolutions of the stem.
        layout: ``"tf"`` or ``"rw"``.
        head_dim: width of a head.
        window_size: sides of windows; 1/32 of ``img_size`` by default.
        grid_size: sides of grids; ``window_size`` by default.
        rel_bias: ``True`` for tables, ``"mlp"`` for functions of the displacement, ``False`` for none.
        rel_hidden: hidden width of those functions.
        mlp_ratio: hidden width of MLPs over the width.
        expand_ratio: hidden width of inverted residuals over the width.
        head_hidden: width of the layer before the logits; 0 for none; the last width for ``"tf"`` and none for
            ``"rw"`` by default.
        layer_scale: start of the learned scales of attention and MLPs.
        momentum: of BatchNorm: 0.01 for ``"tf"``, 0.1 for ``"rw"`` by default.
        pad: of maps that windows do not divide, as of :class:`attnlib.nn.partition.maxvit.PartitionAttention`.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_choice("layout", layout, LAYOUTS)
    check_int("head_dim", head_dim, least=1)
    check_real("expand_ratio", expand_ratio, above=0)
    if momentum is not None:
        check_real("momentum", momentum, least=0, most=1)
    tf = layout == "tf"
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    window = tuple(max(1, side // 32) for side in sides) if window_size is None else window_size
    grid = window if grid_size is None else grid_size
    conv: dict[str, Any] = dict(
        activation=GeluTanh if tf else Silu,
        padding="same" if tf else None,
        eps=1e-3 if tf else 1e-5,
        momentum=(0.01 if tf else 0.1) if momentum is None else momentum,
    )
    norm = functools.partial(nn.LayerNorm, eps=1e-5 if tf else 1e-6)
    act = GeluTanh if tf else nn.GELU
    for dim in embed_dims:
        if dim % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide embed_dims={tuple(embed_dims)}")

    def mixer(place: Place, kind: str) -> nn.Module:
        if mechanism is not None:
            return mechanism(place)
        size = window if kind == "block" else grid
        return PartitionAttention(
            place.dim, place.num_heads, size, kind, rank=2, rel_bias=rel_bias, rel_hidden=rel_hidden, pad=pad
        )

    def block(place: Place, kind: str) -> Block:
        return Block(
            place.dim, mixer(place, kind), mlp_ratio=mlp_ratio, norm=norm, drop_path=place.drop_path,
            layer_scale=layer_scale, activation=act,
        )  # fmt: skip

    def inverted(dim: int, place: Place, stride: int) -> MBConv:
        hidden = _divisible((place.dim if tf else dim) * expand_ratio)
        squeeze = max(1, int(place.dim / 4 if tf else hidden / 16))
        return MBConv(dim, place.dim, hidden, stride, squeeze, bias=tf, drop_path=place.drop_path, **conv)

    first, second = stem_dims
    stem = ConvStem(
        ConvNorm(in_chans, first, 3, 2, bias=tf, **conv),
        ConvNorm(first, second, 3, padding=conv["padding"], bias=tf, norm=False),
    )
    reductions = [4 * 2**i for i in range(len(embed_dims))]
    dim, stages = stem_dims[-1], []
    for row in places(embed_dims, depths, [d // head_dim for d in embed_dims], reductions, drop_path_rate):
        blocks = [
            MaxViTBlock(inverted(p.dim, p, 1) if p.block else None, block(p, "block"), block(p, "grid")) for p in row
        ]
        stages.append(Stage(blocks, inverted(dim, row[0], 2)))
        dim = row[0].dim
    if head_hidden is None:
        head_hidden = embed_dims[-1] if tf else 0
    head = Head(embed_dims[-1], num_classes, global_pool, norm if head_hidden else None, drop_rate, head_hidden)
    model = Backbone(
        stem, stages, embed_dims, reductions, None if head_hidden else norm(embed_dims[-1]), head, num_classes,
        in_chans, sides, stem_level=(stem_dims[-1], 2),
    )  # fmt: skip
    model.input_name = "stem.0.conv.weight"
    (_init_tf if tf else _init_rw)(model)
    return model


def _divisible(width: float) -> int:
    """The nearest multiple of 8, and not less than nine tenths of ``width``."""
    near = max(8, int(width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * width else near


def _init_tf(model: nn.Module) -> None:
    """As the paper's code: normal weights of 0.02, zero biases."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _init_rw(model: Backbone) -> None:
    """As timm: convolutions as EfficientNet's, attention and MLPs as ViT's; the head as it is."""
    for name, module in [*model.stem.named_modules(), *model.stages.named_modules()]:
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and ".squeeze." in f".{name}"):
            fan_out = module.weight.shape[0] * math.prod(module.weight.shape[2:])
            groups = module.groups if isinstance(module, nn.Conv2d) else 1
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / (fan_out // groups)))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None and "mlp" in name:
                nn.init.normal_(module.bias, std=1e-6)
            elif module.bias is not None:
                nn.init.zeros_(module.bias)


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From timm's ``MaxxVit`` in both layouts."""
    theirs = Released(state_dict, "timm's MaxxVit")
    block = r"stages\.(\d+)\.blocks\.(\d+)"
    halves = {"block": "window", "grid": "grid"}
    # Tables of TensorFlow's weights have two axes of displacements, and its heads stand behind q, k and v.
    tables = [m for m in theirs if m.endswith("rel_pos.relative_position_bias_table")]
    tf = bool(tables) and theirs.peek(tables[0]).dim() == 3
    heads = {} if model is None else {f"{i}": s.blocks[0].window.mixer.inner for i, s in enumerate(model.stages)}
    out: dict[str, Tensor] = {}
    for theirs_half, half in halves.items():
        for stage, inner in heads.items() if heads else [(r"\d+", None)]:
            known = inner if isinstance(inner, PartitionAttention) else None
            where = rf"stages\.({stage})\.blocks\.(\d+)\.attn_{theirs_half}\.attn\.(.+)"
            attention = functools.partial(
                PartitionAttention.convert_state_dict,
                head_first=not tf,
                num_heads=None if known is None else known.num_heads,
                window_size=None if known is None else known.window_size,
            )
            out |= theirs.parts(where, rf"stages.\1.blocks.\2.{half}.mixer.inner", attention)
    out |= theirs.renamed(
        {
            rf"{block}\.attn_(block|grid)\.norm1\.(weight|bias)": _half("mixer.norm"),
            rf"{block}\.attn_(block|grid)\.norm2\.(weight|bias)": _half("mlp.norm"),
            rf"{block}\.attn_(block|grid)\.ls1\.(gamma)": _half("mixer.scale"),
            rf"{block}\.attn_(block|grid)\.ls2\.(gamma)": _half("mlp.scale"),
            rf"{block}\.attn_(block|grid)\.mlp\.(fc[12]\.(?:weight|bias))": _half("mlp.inner"),
        }
    )
    norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
    for pattern, ours in {
        r"shortcut\.expand\.(weight|bias)": "shortcut.conv",
        rf"pre_norm\.{norm}": "expand.pre",
        r"conv1_1x1\.(weight|bias)": "expand.conv",
        rf"norm1\.{norm}": "expand.norm",
        r"conv2_kxk\.(weight|bias)": "depthwise.conv",
        rf"norm2\.{norm}": "depthwise.norm",
        r"se\.(fc[12]\.(?:weight|bias))": "squeeze",
        r"conv3_1x1\.(weight|bias)": "project.conv",
    }.items():
        out |= theirs.renamed({rf"{block}\.conv\.{pattern}": _inverted(ours)})
    out |= theirs.renamed(
        {
            r"stem\.conv1\.(weight|bias)": r"stem.0.conv.\1",
            r"stem\.conv2\.(weight|bias)": r"stem.1.conv.\1",
            rf"stem\.norm1\.{norm}": r"stem.0.norm.\1",
            r"head\.pre_logits\.fc\.(weight|bias)": r"head.pre.\1",
            r"(norm|head\.norm|head\.fc)\.(weight|bias)": r"\1.\2",
        }
    )
    return theirs.close(out)


def _half(ours: str) -> Rule:
    def rule(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
        half = "window" if match[3] == "block" else "grid"
        return {f"stages.{match[1]}.blocks.{match[2]}.{half}.{ours}.{match[4]}": value}

    return rule


def _inverted(ours: str) -> Rule:
    """The inverted residual of a stage's first block lies before the blocks."""

    def rule(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
        where = "downsample" if match[2] == "0" else f"blocks.{match[2]}.conv"
        value = value.flatten(1) if ours == "squeeze" and value.dim() == 4 else value
        return {f"stages.{match[1]}.{where}.{ours}.{match[3]}": value}

    return rule


_TF: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 5, 2), stem_dims=(64, 64)),
    "small": dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 5, 2), stem_dims=(64, 64)),
    "base": dict(embed_dims=(96, 192, 384, 768), depths=(2, 6, 14, 2), stem_dims=(64, 64)),
    "large": dict(embed_dims=(128, 256, 512, 1024), depths=(2, 6, 14, 2), stem_dims=(128, 128)),
    "xlarge": dict(embed_dims=(192, 384, 768, 1536), depths=(2, 6, 14, 2), stem_dims=(192, 192)),
}
_RW: dict[str, dict[str, Any]] = {
    "pico": dict(embed_dims=(32, 64, 128, 256), depths=(2, 2, 5, 2), stem_dims=(24, 32)),
    "nano": dict(embed_dims=(64, 128, 256, 512), depths=(1, 2, 3, 1), stem_dims=(32, 64)),
    "tiny": dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 5, 2), stem_dims=(32, 64)),
    "small": dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 5, 2), stem_dims=(32, 64), layer_scale=1e-6),
    "base": dict(embed_dims=(96, 192, 384, 768), depths=(2, 6, 14, 2), stem_dims=(32, 64), head_hidden=768),
}
_21K = 21843


def _tf_sizes() -> dict[str, tuple[dict[str, Any], str]]:
    """Settings and the name of the weights on the hub, by name."""
    sizes: dict[str, tuple[dict[str, Any], str]] = {}
    for name, size in _TF.items():
        pretrained = name in ("base", "large", "xlarge")
        for side in (224, 384, 512):
            here = {**size, "img_size": side}
            full = f"maxvit_{name}_tf_{side}"
            if name != "xlarge":
                sizes[full] = here, f"{full}.in1k"
            if pretrained and side == 224:
                sizes[f"{full}_21k"] = {**here, "num_classes": _21K}, f"{full}.in21k"
            elif pretrained:
                sizes[full if name == "xlarge" else f"{full}_21k"] = here, f"{full}.in21k_ft_in1k"
        sizes[f"maxvit_{name}"] = (
            {**size, "img_size": 224},
            f"maxvit_{name}_tf_224.in{'21k' if name == 'xlarge' else '1k'}",
        )
    return sizes


def _rw_sizes() -> dict[str, tuple[dict[str, Any], str]]:
    sizes: dict[str, tuple[dict[str, Any], str]] = {}
    for name, side, tag in (("pico", 256, ""), ("nano", 256, "sw_in1k"), ("tiny", 224, "sw_in1k"), ("tiny", 256, "")):
        full = f"maxvit_{name}_rw_{side}"
        sizes[full] = {**_RW[name], "img_size": side, "layout": "rw"}, f"{full}.{tag}" if tag else ""
    for name, side, tag in (
        ("pico", 256, "sw_in1k"), ("nano", 256, "sw_in1k"), ("tiny", 256, "sw_in1k"), ("small", 224, "sw_in1k"),
        ("small", 256, ""), ("base", 224, "sw_in12k_ft_in1k"), ("base", 384, "sw_in12k_ft_in1k"),
    ):  # fmt: skip
        full = f"maxvit_rmlp_{name}_rw_{side}"
        here = {**_RW[name], "img_size": side, "layout": "rw", "rel_bias": "mlp"}
        sizes[full] = here, f"{full}.{tag}" if tag else ""
    base = sizes["maxvit_rmlp_base_rw_224"][0]
    sizes["maxvit_rmlp_base_rw_224_12k"] = {**base, "num_classes": 11821}, "maxvit_rmlp_base_rw_224.sw_in12k"
    return sizes


def _register(sizes: dict[str, tuple[dict[str, Any], str]], params: dict[str, int], source: str) -> None:
    data_of: dict[str, dict[str, Any]] = {}
    for name, (settings, hub) in sizes.items():
        data_of[name] = {"crop_pct": 1.0} if settings["img_size"] > 256 else {}
        if hub.endswith("tf_224.in1k"):
            data_of[name] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    register_models(
        "maxvit",
        maxvit,
        {name: settings for name, (settings, _) in sizes.items()},
        params=params,
        license="Apache-2.0",
        source=source,
        weights={name: (f"timm/{hub}", "model.safetensors") for name, (_, hub) in sizes.items() if hub},
        convert=convert,
        img_size={name: settings["img_size"] for name, (settings, _) in sizes.items()},
        data={"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 0.95},
        data_of=data_of,
    )


_TF_PARAMS = {
    "tiny": (30_916_528, 30_977_008, 31_049_584), "small": (68_927_956, 69_018_676, 69_127_540),
    "base": (119_467_708, 119_653_468, 119_876_380), "large": (211_785_560, 212_033_240, 212_330_456),
}  # fmt: skip
_register(
    _tf_sizes(),
    {f"maxvit_{name}": counts[0] for name, counts in _TF_PARAMS.items()}
    | {f"maxvit_{name}_tf_{side}": n for name, counts in _TF_PARAMS.items()
       for side, n in zip((224, 384, 512), counts, strict=True)}
    | {"maxvit_xlarge_tf_224_21k": 506_987_643, "maxvit_xlarge_tf_384": 475_323_472,
       "maxvit_xlarge_tf_512": 475_769_296},
    "google-research/maxvit",
)  # fmt: skip
_register(
    _rw_sizes(),
    {
        "maxvit_pico_rw_256": 7_457_996, "maxvit_nano_rw_256": 15_451_148, "maxvit_tiny_rw_224": 29_057_312,
        "maxvit_tiny_rw_256": 29_066_720, "maxvit_rmlp_pico_rw_256": 7_515_980, "maxvit_rmlp_nano_rw_256": 15_501_452,
        "maxvit_rmlp_tiny_rw_256": 29_148_896, "maxvit_rmlp_small_rw_224": 64_895_044,
        "maxvit_rmlp_small_rw_256": 64_895_044, "maxvit_rmlp_base_rw_224": 116_135_788,
        "maxvit_rmlp_base_rw_384": 116_135_788,
    },
    "huggingface/pytorch-image-models",
)  # fmt: skip
