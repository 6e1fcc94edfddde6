"""DaViT: stages of pairs of blocks, one with attention in windows, one with attention between channels.

Ding et al., 2022, "DaViT: Dual Attention Vision Transformers", arXiv 2204.03645. A 7 x 7 convolution of stride 4 makes
tokens, 2 x 2 convolutions of stride 2 behind a norm lie between stages. Every block is ``x + conv(x)``, attention,
``x + conv(x)``, MLP with depthwise 3 x 3 convolutions; heads and groups are 32 channels wide. The final map is
averaged, then normed. The towers of Florence-2 (``davit_base_fl``, ``davit_huge_fl``) have windows of 12, overlapping
3 x 3 convolutions between stages and logits between channels scaled by the number of tokens.

Differs from the authors' code: a map that windows do not divide is padded with tokens that nobody attends to; with
``compat="authors"`` it is padded with zeros that are attended to, as theirs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice
from ...nn.layers import Patchify
from ...nn.modulation.davit import ChannelGroupAttention
from ...nn.partition.maxvit import PartitionAttention
from ...nn.released import Released, Rule
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage

KINDS = ("window", "channel")


def davit(
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (1, 1, 3, 1),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    kinds: Sequence[str] = KINDS,
    overlap: bool = False,
    scale: str = "width",
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A DaViT.

    Args:
        embed_dims: width per stage.
        depths: groups of blocks per stage; a group has one block of every one of ``kinds``.
        num_heads: heads of windows, and groups of channels, per stage.
        window_size: side of windows.
        mlp_ratio: hidden width of MLPs over the width; 0 for none.
        qkv_bias: bias of the query, key and value projections.
        kinds: ``"window"`` and ``"channel"`` in the order of a group's blocks; also one of them alone.
        overlap: 3 x 3 convolutions between stages instead of 2 x 2.
        scale: of :class:`attnlib.nn.modulation.davit.ChannelGroupAttention`.
        compat: ``"authors"``: maps that windows do not divide are padded with zeros that are attended to.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_choice("compat", compat, (None, "authors"))
    for kind in kinds:
        check_choice("kinds", kind, KINDS)
    reductions = [4 * 2**i for i in range(len(embed_dims))]

    def own(place: Place) -> nn.Module:
        if kinds[place.block % len(kinds)] == "channel":
            return ChannelGroupAttention(place.dim, place.num_heads, scale, qkv_bias)
        pad = "mask" if compat is None else "zeros"
        return PartitionAttention(
            place.dim, place.num_heads, window_size, rel_bias=False, qkv_bias=qkv_bias, pad=pad
        )  # fmt: skip

    make = mechanism or own
    stem = Patchify(in_chans, embed_dims[0], 7, 4, 3)
    stages = []
    for row in places(embed_dims, [n * len(kinds) for n in depths], num_heads, reductions, drop_path_rate):
        between: nn.Module | None = None
        if row[0].stage:
            kernel, padding = (3, 1) if overlap else (2, 0)
            between = Patchify(embed_dims[row[0].stage - 1], row[0].dim, kernel, 2, padding, norm_first=True)
        blocks = [
            Block(p.dim, make(p), mlp_ratio=mlp_ratio, drop_path=p.drop_path, position=3, mlp_position=3) for p in row
        ]
        stages.append(Stage(blocks, between))
    head = Head(embed_dims[-1], num_classes, global_pool, nn.LayerNorm, drop_rate)
    model: Any = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    model.kinds = tuple(kinds)
    init_weights(model, also=(ChannelGroupAttention, PartitionAttention))
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``DaViT``, timm's ``DaVit`` and the vision tower of Florence-2."""
    theirs = Released(state_dict, "DaViT")
    kinds = getattr(model, "kinds", KINDS)
    tower = any(name.startswith("vision_tower.") for name in theirs)
    if tower:
        theirs.leave(r"(?!vision_tower\.).*", because="the language model of Florence-2 and its projections")
    # Where blocks have names it is Florence-2's channel attention, whose queries, keys and values have the usual roles.
    version = 2 if any(".channel_block." in name for name in theirs) else 1
    which = r"(?:vision_tower\.blocks|main_blocks|stages)\.(\d+)\.(?:blocks\.)?(\d+)\.(\d+|spatial_block|channel_block)"

    def kind(match: re.Match[str]) -> str:
        named = {"spatial_block": "window", "channel_block": "channel"}
        return named.get(match[3]) or kinds[int(match[3])]

    def to(ours: str) -> Rule:
        def rule(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
            at = len(kinds) * int(match[2]) + kinds.index(kind(match))
            if ours == "mixer.inner" and kind(match) == "channel":
                held = ChannelGroupAttention.convert_state_dict({match[4]: value}, version)
            else:
                held = {match[4]: value}
            return {f"stages.{match[1]}.blocks.{at}.{ours}.{name}": v for name, v in held.items()}

        return rule

    parts = {
        r"(?:cpe\.0\.proj|cpe1\.proj|conv1\.fn\.dw)": "position.conv",
        r"(?:cpe\.1\.proj|cpe2\.proj|conv2\.fn\.dw)": "mlp_position.conv",
        r"(?:norm1|(?:window|channel)_attn\.norm)": "mixer.norm",
        r"(?:attn|(?:window|channel)_attn\.fn)": "mixer.inner",
        r"(?:norm2|ffn\.norm)": "mlp.norm",
        r"(?:mlp|ffn\.fn\.net)": "mlp.inner",
    }
    name = r"((?:(?:qkv|proj|fc1|fc2)\.)?(?:weight|bias))"
    out = theirs.renamed({rf"{which}\.{part}\.{name}": to(ours) for part, ours in parts.items()})
    out |= theirs.renamed(
        {
            r"stem\.conv\.(weight|bias)": r"stem.proj.\1",
            r"stem\.norm\.(weight|bias)": r"stem.norm.\1",
            r"(?:vision_tower\.convs|patch_embeds)\.0\.(proj|norm)\.(weight|bias)": r"stem.\1.\2",
            r"(?:vision_tower\.convs|patch_embeds)\.([1-9])\.(proj|norm)\.(weight|bias)": r"stages.\1.downsample.\2.\3",
            r"stages\.(\d+)\.downsample\.conv\.(weight|bias)": r"stages.\1.downsample.proj.\2",
            r"stages\.(\d+)\.downsample\.norm\.(weight|bias)": r"stages.\1.downsample.norm.\2",
            r"(?:norms|head\.norm)\.(weight|bias)": r"head.norm.\1",
            r"head\.(?:fc\.)?(weight|bias)": r"head.fc.\1",
        }
    )
    if tower and model is not None:  # it ends at the map; timm leaves the norm behind the pool as it starts
        out |= {"head.norm.weight": torch.ones(model.num_features), "head.norm.bias": torch.zeros(model.num_features)}
    return theirs.close(out)


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dims=(96, 192, 384, 768), depths=(1, 1, 3, 1), num_heads=(3, 6, 12, 24), drop_path_rate=0.1),
    "small": dict(embed_dims=(96, 192, 384, 768), depths=(1, 1, 9, 1), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
    "base": dict(embed_dims=(128, 256, 512, 1024), depths=(1, 1, 9, 1), num_heads=(4, 8, 16, 32), drop_path_rate=0.4),
    "large": dict(embed_dims=(192, 384, 768, 1536), depths=(1, 1, 9, 1), num_heads=(6, 12, 24, 48)),
    "huge": dict(embed_dims=(256, 512, 1024, 2048), depths=(1, 1, 9, 1), num_heads=(8, 16, 32, 64)),
    "giant": dict(embed_dims=(384, 768, 1536, 3072), depths=(1, 1, 12, 3), num_heads=(12, 24, 48, 96)),
}


def _sizes() -> dict[str, dict[str, Any]]:
    sizes = {f"davit_{name}": size for name, size in _SIZES.items()}
    sizes["davit_large_384"] = {**sizes["davit_large"], "window_size": 12, "img_size": 384}
    for name in ("base", "huge"):
        sizes[f"davit_{name}_fl"] = {
            **_SIZES[name], "window_size": 12, "overlap": True, "scale": "tokens", "num_classes": 0, "img_size": 768,
            "drop_path_rate": 0.1,
        }  # fmt: skip
    return sizes


register_models(
    "davit",
    davit,
    _sizes(),
    params={
        "davit_tiny": 28_360_168, "davit_small": 49_745_896, "davit_base": 87_954_408, "davit_large": 196_811_752,
        "davit_large_384": 196_811_752, "davit_huge": 348_922_856, "davit_giant": 1_406_470_120,
        "davit_base_fl": 90_370_048, "davit_huge_fl": 360_636_416,
    },
    license="MIT",
    source="dingmyu/davit",
    weights={
        **{f"davit_{n}": (f"timm/davit_{n}.msft_in1k", "model.safetensors") for n in ("tiny", "small", "base")},
        "davit_base_fl": ("microsoft/Florence-2-base", "pytorch_model.bin"),
        "davit_huge_fl": ("microsoft/Florence-2-large", "pytorch_model.bin"),
    },
    convert=convert,
    img_size={name: size["img_size"] for name, size in _sizes().items() if "img_size" in size},
    data={"crop_pct": 0.95},
)  # fmt: skip
