"""PATNet: convolutions on a quarter of the channels, beside attention of channels, late of pixels, on the rest.

Huang et al., 2025, "Partial Convolution Meets Visual Attention", arXiv 2503.03148, by the code of its successor, arXiv
2502.01303. Convolutions of 4 x 4 pixels make tokens, of 2 x 2 tokens merge them. In early stages mixer and MLP are one
residual branch; in those with self-attention both have their own. A hidden layer of 1280 stands before the classifier.

The released files contradict each other on where spatial attention stands and on the heads of self-attention: both are
arguments, and sizes are those of the files that train them, where the second smallest alone has spatial attention.

Differs from the authors' code: any size; tokens that do not exist enter no convolution, mean or statistic; channel
attention can not be left out; the split that the successor learns is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_flag
from ...nn.gates.patnet import (
    PartialChannelAttention,
    PartialSelfAttention,
    PartialSpatialAttention,
    init_narrow,
)
from ...nn.layers import ConvNorm, DropPath
from ...nn.released import Released, Rule
from ..blocks import ConvStem, Make, Place, add_losses, check_stages, mix, places
from ..build import register_models
from .stages import Backbone, Head, Stage

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
MIXERS = ("channel", "self")


class PartialMlp(nn.Module):
    """1 x 1 to more channels, BatchNorm, activation, 1 x 1 back, and spatial attention where it is asked for."""

    def __init__(self, dim: int, hidden: int, activation: type[nn.Module], spatial: bool):
        super().__init__()
        self.fc1, self.fc2 = ConvNorm(dim, hidden, activation=activation), ConvNorm(hidden, dim, norm=False)
        self.spatial = PartialSpatialAttention(dim) if spatial else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        x = self.fc2(self.fc1(x, valid), valid)
        return x if self.spatial is None else self.spatial(x, valid)


class PATNetBlock(nn.Module):
    """``x + mlp(mixer(x))``, or ``u + mlp(u)`` with ``u = x + mixer(x)`` where the mixer has a shortcut of its own."""

    def __init__(self, mixer: nn.Module, mlp: nn.Module, shortcut: bool, drop_path: float = 0.0):
        super().__init__()
        self.mixer, self.mlp, self.shortcut = mixer, mlp, shortcut
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, H, W, C) -> the same, and the carry for the next block."""
        u, carry, own = mix(self.mixer, x, None, carry, valid)
        add_losses(losses, own)
        if self.shortcut:
            x = u = x + u
        return x + self.drop_path(self.mlp(u, valid)), carry


def patnet(
    embed_dims: Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[int] = (1, 2, 8, 2),
    num_heads: Sequence[int] = (4, 4, 4, 4),
    mixers: Sequence[str] = ("channel", "channel", "channel", "self"),
    spatial: bool = False,
    mlp_ratio: float = 2.0,
    n_div: int = 4,
    activation: str = "gelu",
    hidden_size: int = 1280,
    attn_drop_rate: float = 0.1,
    proj_drop_rate: float = 0.1,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A PATNet.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads of self-attention per stage.
        mixers: per stage ``"channel"`` or ``"self"``: what stands beside the convolution.
        spatial: spatial attention behind every MLP.
        mlp_ratio: hidden width of MLPs over the width.
        n_div: of :class:`attnlib.nn.gates.patnet.PartialChannelAttention`.
        activation: ``"gelu"`` or ``"relu"``.
        hidden_size: width of the layer before the classifier.
        attn_drop_rate, proj_drop_rate: dropout of self-attention.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_stages(len(depths), embed_dims=embed_dims, mixers=mixers)
    check_flag("spatial", spatial)
    check_choice("activation", activation, ACTIVATIONS)
    for kind in mixers:
        check_choice("mixers", kind, MIXERS)
    act = ACTIVATIONS[activation]

    def own(place: Place) -> nn.Module:
        if mixers[place.stage] == "self":
            return PartialSelfAttention(
                place.dim, place.num_heads, n_div, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate
            )
        return PartialChannelAttention(place.dim, n_div)

    make = mechanism or own
    reductions = [4 * 2**i for i in range(len(depths))]
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        i, dim = row[0].stage, row[0].dim
        blocks = [
            PATNetBlock(make(p), PartialMlp(dim, int(dim * mlp_ratio), act, spatial), mixers[i] == "self", p.drop_path)
            for p in row
        ]
        stages.append(Stage(blocks, ConvStem(ConvNorm(embed_dims[i - 1], dim, 2, 2, 0)) if i else None))
    stem = ConvStem(ConvNorm(in_chans, embed_dims[0], 4, 4, 0))
    head = Head(
        embed_dims[-1], num_classes, global_pool, drop=drop_rate, hidden=hidden_size, activation=act, hidden_bias=False
    )
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    for module in model.modules():
        if isinstance(module, (ConvStem, PartialMlp, Head)):
            init_narrow(module)
    model.input_name = "stem.0.conv.weight"
    return model


_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``PartialNet``."""
    theirs = Released(state_dict, "the authors' PartialNet")
    out: dict[str, Tensor] = {}
    rules: dict[str, Rule] = {
        r"patch_embed\.proj\.weight": "stem.0.conv.weight",
        rf"patch_embed\.norm\.{_NORM}": r"stem.0.norm.\1",
        r"avgpool_pre_head\.1\.weight": lambda match, value: {"head.pre.weight": value.flatten(1)},
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    for i in range(10):  # theirs count mergings among the stages
        block, to = rf"stages\.{2 * i}\.blocks\.(\d+)", rf"stages.{i}.blocks.\1"
        attends = f"stages.{2 * i}.blocks.0.spatial_mixing.attn.qkv.weight" in theirs
        mixer = PartialSelfAttention if attends else PartialChannelAttention
        out |= theirs.parts(rf"{block}\.spatial_mixing\.(.+)", f"{to}.mixer", mixer.convert_state_dict)
        out |= theirs.parts(rf"{block}\.mlp\.4\.(.+)", f"{to}.mlp.spatial", PartialSpatialAttention.convert_state_dict)
        rules |= {
            rf"{block}\.mlp\.0\.weight": f"{to}.mlp.fc1.conv.weight",
            rf"{block}\.mlp\.1\.{_NORM}": rf"{to}.mlp.fc1.norm.\2",
            rf"{block}\.mlp\.3\.weight": f"{to}.mlp.fc2.conv.weight",
            rf"stages\.{2 * i + 1}\.reduction\.weight": f"stages.{i + 1}.downsample.0.conv.weight",
            rf"stages\.{2 * i + 1}\.norm\.{_NORM}": rf"stages.{i + 1}.downsample.0.norm.\1",
        }
    return theirs.close(out | theirs.renamed(rules))


def _wide(first: int, depths: Sequence[int], rate: float, activation: str = "relu") -> dict[str, Any]:
    dims = tuple(first * 2**i for i in range(4))
    return dict(embed_dims=dims, depths=tuple(depths), activation=activation, drop_path_rate=rate)


_SIZES: dict[str, dict[str, Any]] = {
    "patnet_t0": dict(),
    "patnet_t1": dict(**_wide(48, (1, 2, 8, 2), 0.02, "gelu"), spatial=True),
    "patnet_t2": _wide(64, (2, 2, 6, 4), 0.05),
    "patnet_s": _wide(96, (2, 2, 9, 4), 0.1),
    "patnet_m": _wide(128, (2, 3, 16, 4), 0.2),
    "patnet_l": _wide(160, (2, 3, 20, 4), 0.3),
}

register_models(
    "patnet-partial-attention",
    patnet,
    _SIZES,
    params={
        "patnet_t0": 3_486_160,
        "patnet_t1": 6_144_552,
        "patnet_t2": 12_269_816,
        "patnet_s": 28_013_304,
        "patnet_m": 59_179_000,
        "patnet_l": 100_641_336,
    },
    license="MIT",
    source="haiduo/PartialNet",
    convert=convert,
)
