"""MedViTV2: neighborhood attention with local convolutions, pooled attention with learned curves, for medical images.

Nejati Manzari et al., 2025, "Medical Image Classification with KAN-Integrated Transformers and Dilated Neighborhood
Attention", arXiv 2502.13693. Four 3 x 3 convolutions, two of them of stride 2, make tokens. There are two kinds of
blocks, whose norms are BatchNorms:

- local: ``x <- x + NA(norm(x))``, ``x <- x + y + conv(y)`` with ``y = norm(x)`` and an inverted bottleneck ``conv`` of
  1 x 1, depthwise and 1 x 1 convolutions with channel gates;
- global: ``x`` is made narrower by a 1 x 1 convolution, ``x <- x + attention(norm(x))``; a second, narrow part
  ``o = proj(x)``, ``o <- o + conv(o)`` with a grouped convolution joins it, ``x = [x, o]``; ``x <- x + KAN(norm(x))``
  where a KAN has learned curves in the place of an MLP's weights.

A map is made smaller by means of 2 x 2 tokens and a 1 x 1 convolution. Blocks of the first stage are local; those of
the second, and of the third by threes, end in a global one; those of the last are global.

Differs from the authors' code: their blocks cut a map (B, C, H, W) into ``H W`` rows of ``C`` numbers without moving
the channels to the end, so that what neighborhood attention and KAN take for a token is a piece of one channel's map;
and no dilation is used. ``legacy_layout=True`` does both so, as released weights need it; they are refused by a model
without it. There such rows are no tokens, so that ``valid`` is refused. Any size, and any number of channels of images.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_divides, check_flag, check_ints
from ...nn.kan import KAN
from ...nn.layers import ConvNorm, DropPath, MapNorm, SqueezeExcite, cell_means, normed, strided_valid
from ...nn.local.dinat import DilatedNeighborhoodAttention
from ...nn.reduced.medvitv2 import EfficientSelfAttention
from ...nn.released import Released
from ..blocks import ConvStem, Make, Place, mix, places
from ..build import register_models
from .stages import Backbone, Head, Stage


def scrambled(x: Tensor) -> Tensor:
    """(B, H, W, C) -> the same numbers in the order of (B, C, H, W), cut into rows of C: what the release reads.

    >>> scrambled(torch.tensor([[[[0, 1], [2, 3]]]])).tolist()
    [[[[0, 2], [1, 3]]]]
    """
    return x.permute(0, 3, 1, 2).reshape(x.shape)


def restored(x: Tensor) -> Tensor:
    """Inverse of :func:`scrambled`."""
    batch, height, width, dim = x.shape
    return x.reshape(batch, dim, height, width).permute(0, 2, 3, 1)


class LocalFeedForward(nn.Module):
    """``x + conv(x)``: 1 x 1 to more channels, depthwise, channel gates, 1 x 1 back, each with a BatchNorm.

    Args:
        dim: width.
        kernel_size: side of the depthwise convolution.
        ratio: hidden width over ``dim``; also the width between the two maps of the gates.
    """

    def __init__(self, dim: int, kernel_size: int = 3, ratio: int = 3):
        super().__init__()
        hidden = dim * ratio
        self.expand = ConvNorm(dim, hidden, activation=nn.Hardswish)
        self.depthwise = ConvNorm(hidden, hidden, kernel_size, groups=hidden, activation=nn.Hardswish)
        self.gates = SqueezeExcite(hidden, ratio, gate=nn.Hardsigmoid)
        self.project = ConvNorm(hidden, dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) -> the same."""
        y = self.depthwise(self.expand(x, valid), valid)
        return x + self.project(self.gates(y, valid), valid)


class CellMerging(nn.Module):
    """Means of cells and a 1 x 1 convolution with a BatchNorm, to another width."""

    def __init__(self, dim: int, out_dim: int, stride: int):
        super().__init__()
        self.stride, self.conv = stride, ConvNorm(dim, out_dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, dim) -> (B, ceil(H / stride), ceil(W / stride), out_dim), and which of these exist."""
        if self.stride > 1:
            x, valid = cell_means(x, self.stride, valid), strided_valid(valid, self.stride)
        return self.conv(x, valid), valid


class LocalBlock(nn.Module):
    """Attention, then convolutions (LFP).

    Args:
        dim: width.
        mixer: the mechanism.
        kernel_size: of the depthwise convolution.
        legacy_layout: the mechanism reads rows of numbers of one channel.
        drop_path: stochastic depth of the mechanism.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, kernel_size: int = 3, legacy_layout: bool = False, drop_path: float = 0.0
    ):
        super().__init__()
        self.legacy_layout = legacy_layout
        self.norm, self.mixer, self.mlp_norm = MapNorm(dim), mixer, MapNorm(dim)
        self.drop_path = DropPath(drop_path)
        self.mlp = LocalFeedForward(dim, kernel_size)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, H, W, dim) -> the same, and the carry for the next block."""
        y = self.norm(x, valid)
        y, carry = _mixed(self.mixer, scrambled(y) if self.legacy_layout else y, valid, carry, losses)
        x = x + self.drop_path(restored(y) if self.legacy_layout else y)
        return x + self.mlp(self.mlp_norm(x, valid), valid), carry


class GlobalBlock(nn.Module):
    """Attention on most channels, a grouped convolution for the others, then a KAN (GFP).

    Args:
        in_dim: width of the map that comes.
        dim: width.
        mixer: the mechanism, as wide as ``mixed_dim``.
        mixed_dim: channels that attention reads.
        head_dim: channels per group of the grouped convolution.
        ratio: hidden width of the KAN over ``dim``.
        legacy_layout: the KAN reads rows of numbers of one channel.
        idle: build the feed-forward layer, too, that the release builds and never calls.
        share: of the channels that attention reads, for stochastic depth.
        drop_path: stochastic depth.
    """

    def __init__(
        self, in_dim: int, dim: int, mixer: nn.Module, mixed_dim: int, head_dim: int = 32, ratio: int = 2,
        legacy_layout: bool = False, idle: bool = True, share: float = 0.75, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        rest = dim - mixed_dim
        self.legacy_layout = legacy_layout
        self.reduce = ConvNorm(in_dim, mixed_dim) if in_dim != mixed_dim else None
        self.norm, self.mixer, self.mlp_norm = MapNorm(mixed_dim), mixer, MapNorm(dim)
        self.narrow = ConvNorm(mixed_dim, rest) if rest != mixed_dim else None
        self.grouped = ConvNorm(rest, rest, 3, groups=rest // head_dim, activation=nn.ReLU)
        self.project = ConvNorm(rest, rest, norm=False)
        self.idle = LocalFeedForward(dim, 3, ratio) if idle else None
        self.mlp = KAN((dim, dim * ratio, dim))
        self.mixer_drop, self.conv_drop = DropPath(drop_path * share), DropPath(drop_path * (1 - share))
        self.mlp_drop = DropPath(drop_path)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, H, W, in_dim) -> (B, H, W, dim), and the carry for the next block."""
        if self.reduce is not None:
            x = self.reduce(x, valid)
        y, carry = _mixed(self.mixer, self.norm(x, valid), valid, carry, losses)
        x = x + self.mixer_drop(y)
        rest = x if self.narrow is None else self.narrow(x, valid)
        rest = rest + self.conv_drop(self.project(self.grouped(rest, valid)))
        x = torch.cat([x, rest], -1)
        y = normed(self.mlp_norm, x, valid)
        y = restored(self.mlp(scrambled(y))) if self.legacy_layout else self.mlp(y)
        return x + self.mlp_drop(y), carry


def _mixed(
    mixer: nn.Module, x: Tensor, valid: Tensor | None, carry: Any, losses: dict[str, Tensor] | None
) -> tuple[Tensor, Any]:
    y, carry, own = mix(mixer, x, None, carry, valid)
    if losses is not None:
        for name, loss in own.items():
            losses[name] = losses[name] + loss if name in losses else loss
    return y, carry


class MedViT(Backbone):
    """A backbone that refuses ``valid`` where what it reads are no tokens."""

    legacy_layout = False

    def _check_images(self, x: Tensor, valid: Tensor | None) -> None:
        super()._check_images(x, valid)
        if valid is not None and self.legacy_layout:
            raise ValueError(
                "valid is not possible with legacy_layout=True, where rows of one channel take the place of tokens"
            )


def _mixed_dim(dim: int, share: float, head_dim: int) -> int:
    """Channels that attention reads in a global block: a multiple of 32 near ``share`` of them."""
    want = int(dim * share)
    near = max(32, int(want + 16) // 32 * 32)
    near += 32 if near < 0.9 * want else 0
    if not 0 < near < dim or (dim - near) % head_dim:
        raise ValueError(
            f"embed_dims has {dim}, of which global blocks would give {near} channels to attention and the rest to a "
            f"convolution with groups of head_dim={head_dim}; multiples of 64 from 128 are possible"
        )
    return near


def medvitv2(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 6, 2),
    stem_dims: Sequence[int] = (64, 32, 64),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    dilations: Sequence[int] = (8, 4, 2, 1),
    kernel_size: int = 7,
    head_dim: int = 32,
    share: float = 0.75,
    legacy_layout: bool = False,
    idle: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A MedViTV2.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage; four stages, the third with a multiple of 3.
        stem_dims: channels of the first three convolutions; the last has as many as the third.
        sr_ratios: of attention in global blocks, per stage.
        dilations: of neighborhood attention, per stage; the largest that fit 224 pixels by default. All are 1 with
            ``legacy_layout``.
        kernel_size: keys per axis of neighborhood attention.
        head_dim: channels per head, and per group of the grouped convolutions.
        share: of the channels of global blocks, those that attention reads.
        legacy_layout: neighborhood attention and KAN read rows of one channel, and pooled attention is that of
            ``compat="authors"``, as released weights need it.
        idle: build the feed-forward layer of global blocks that is never called; released weights have it.
        mechanism: takes the places of both kinds of attention.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    check_flag("legacy_layout", legacy_layout)
    check_flag("idle", idle)
    ratios, steps = (check_ints(n, g, least=1) for n, g in (("sr_ratios", sr_ratios), ("dilations", dilations)))
    for name, given in (("embed_dims", embed_dims), ("sr_ratios", ratios), ("dilations", steps)):
        if len(given) != 4:
            raise ValueError(f"{name}={tuple(given)} must have one number for each of 4 stages")
    if len(stem_dims) != 3:
        raise ValueError(f"stem_dims={tuple(stem_dims)} must have three widths")
    for dim in embed_dims:
        check_divides("head_dim", head_dim, "embed_dims", dim)
    if len(depths) == 4 and depths[2] % 3:
        raise ValueError(f"depths={tuple(depths)} must have a multiple of 3 in the third place")
    reductions = [4, 8, 16, 32]

    def own(place: Place, local: bool) -> nn.Module:
        if mechanism is not None:
            return mechanism(place)
        if local:
            dilation = 1 if legacy_layout else steps[place.stage]
            return DilatedNeighborhoodAttention(place.dim, place.num_heads, kernel_size, dilation, rank=2)
        compat = "authors" if legacy_layout else None
        return EfficientSelfAttention(place.dim, place.num_heads, ratios[place.stage], compat=compat)

    def is_local(place: Place) -> bool:
        if place.stage in (0, 3):
            return place.stage == 0
        return place.block < place.stage_depth - 1 if place.stage == 1 else place.block % 3 < 2

    heads = [dim // head_dim for dim in embed_dims]
    a, b, c = stem_dims
    stem = ConvStem(
        ConvNorm(in_chans, a, 3, 2, activation=nn.ReLU), ConvNorm(a, b, 3, activation=nn.ReLU),
        ConvNorm(b, c, 3, activation=nn.ReLU), ConvNorm(c, c, 3, 2, activation=nn.ReLU),
    )  # fmt: skip
    stages, width = [], c
    for row in places(embed_dims, depths, heads, reductions, drop_path_rate):
        blocks: list[nn.Module] = []
        between: nn.Module | None = None
        for p in row:
            local = is_local(p)
            inner = p.dim if local else _mixed_dim(p.dim, share, head_dim)
            if not p.block and (p.stage or width != inner):
                between, width = CellMerging(width, inner, 2 if p.stage else 1), inner
            mixer = own(replace(p, dim=inner, num_heads=inner // head_dim), local)
            if local:
                blocks.append(LocalBlock(p.dim, mixer, 3 if p.stage else 7, legacy_layout, p.drop_path))
            else:
                blocks.append(
                    GlobalBlock(
                        width,
                        p.dim,
                        mixer,
                        inner,
                        head_dim,
                        legacy_layout=legacy_layout,
                        idle=idle,
                        share=share,
                        drop_path=p.drop_path,
                    )  # fmt: skip
                )
            width = p.dim
        stages.append(Stage(blocks, between))
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    model = MedViT(stem, stages, embed_dims, reductions, MapNorm(embed_dims[-1]), head, num_classes, in_chans, img_size)
    model.legacy_layout = legacy_layout
    model.input_name = "stem.0.conv.weight"
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
#: Numbers of the layers inside the authors' feed-forward layer: convolutions and their norms.
_FEED = {"expand": (0, 1), "depthwise": (3, 4), "project": (7, 8)}


def _starts(theirs: Released) -> list[int]:
    """Numbers of the blocks that stages begin with: those that change the width, and the first one."""
    found, count = [0], 1 + max((int(n.split(".")[1]) for n in theirs if re.match(r"features\.\d+\.", n)), default=-1)
    for i in range(1, count):
        conv, out = f"features.{i}.patch_embed.conv.weight", f"features.{i}.norm2.weight"
        if conv in theirs and out in theirs and theirs.peek(conv).shape[1] != theirs.peek(out).shape[0]:
            found.append(i)
    return found


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``MedViT``, the second version.

    Raises:
        ValueError: a model whose blocks read tokens, where these weights read rows of one channel.
    """
    theirs = Released(state_dict, "MedViTV2")
    if model is not None and not model.legacy_layout and any(n.startswith("features.0.attn.") for n in theirs):
        raise ValueError(
            "released weights of MedViTV2 read rows of one channel where tokens should be: build the model with "
            "legacy_layout=True"
        )
    if model is None:
        starts = _starts(theirs)
    else:
        starts = [sum(len(s.blocks) for s in model.stages[:i]) for i in range(len(model.stages))]
    out = theirs.parts(r"features\.(\d+)\.e_mhsa\.(.+)", r"\1.mixer", EfficientSelfAttention.convert_state_dict)
    out |= theirs.parts(r"features\.(\d+)\.attn\.(.+)", r"\1.mixer", DilatedNeighborhoodAttention.convert_state_dict)
    block = r"features\.(\d+)"
    local = {m[1] for m in (re.match(r"(\d+)\.mixer\.rpb", name) for name in out) if m}
    rules: dict[str, Any] = {
        rf"{block}\.norm1\.{_NORM}": r"\1.norm.norm.\2",
        rf"{block}\.norm2\.{_NORM}": r"\1.mlp_norm.norm.\2",
        rf"{block}\.(patch_embed|projection|mhca)\.norm\.{_NORM}": r"\1.\2.norm.\3",
        rf"{block}\.(patch_embed|projection)\.conv\.weight": r"\1.\2.conv.weight",
        rf"{block}\.mhca\.group_conv3x3\.weight": r"\1.mhca.conv.weight",
        rf"{block}\.mhca\.projection\.weight": r"\1.project.conv.weight",
        rf"{block}\.kan\.layers\.(\d+)\.layernorm\.(weight|bias)": r"\1.mlp.\2.norm.\3",
        rf"{block}\.kan\.layers\.(\d+)\.rbf\.grid": r"\1.mlp.\2.basis.grid",
        rf"{block}\.kan\.layers\.(\d+)\.spline_linear\.weight": r"\1.mlp.\2.linear.weight",
        rf"{block}\.conv\.conv\.6\.fc\.([02])\.(weight|bias)": lambda m, t: {
            f"{m[1]}.feed.gates.fc{1 + int(m[2]) // 2}.{m[3]}": t
        },
    }
    for name, (conv, norm) in _FEED.items():
        rules[rf"{block}\.conv\.conv\.{conv}\.(weight)"] = rf"\1.feed.{name}.conv.\2"
        rules[rf"{block}\.conv\.conv\.{norm}\.{_NORM}"] = rf"\1.feed.{name}.norm.\2"
    out |= theirs.renamed(rules)
    found: dict[str, Tensor] = {}
    for name, value in out.items():
        number, _, rest = name.partition(".")
        at = int(number)
        stage = max(i for i, start in enumerate(starts) if start <= at)
        first = at == starts[stage]
        part, _, tail = rest.partition(".")
        if part == "feed":
            part = "mlp" if number in local else "idle"
        elif part == "projection":
            part = "narrow"
        elif part == "mhca":
            part = "grouped"
        if part == "patch_embed" and first:
            found[f"stages.{stage}.downsample.conv.{tail}"] = value
            continue
        part = "reduce" if part == "patch_embed" else part
        found[f"stages.{stage}.blocks.{at - starts[stage]}.{part}.{tail}"] = value
    found |= theirs.renamed(
        {
            r"stem\.(\d)\.conv\.weight": r"stem.\1.conv.weight",
            rf"stem\.(\d)\.norm\.{_NORM}": r"stem.\1.norm.\2",
            rf"norm\.{_NORM}": r"norm.norm.\1",
            r"proj_head\.0\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(found)


_SIZES: dict[str, dict[str, Any]] = {
    "medvitv2_tiny": dict(embed_dims=(64, 128, 192, 384), depths=(2, 2, 6, 1), drop_path_rate=0.1),
    "medvitv2_small": dict(embed_dims=(64, 128, 256, 512), depths=(2, 2, 6, 2), drop_path_rate=0.1),
    "medvitv2_base": dict(embed_dims=(96, 192, 384, 768), depths=(2, 2, 6, 2), drop_path_rate=0.2),
    "medvitv2_large": dict(embed_dims=(96, 256, 512, 1024), depths=(2, 2, 6, 2), drop_path_rate=0.2),
}

register_models(
    "medvitv2",
    medvitv2,
    _SIZES,
    params={
        "medvitv2_tiny": 11_719_845, "medvitv2_small": 30_087_295, "medvitv2_base": 66_995_571,
        "medvitv2_large": 118_291_477,
    },
    license="MIT",
    source="Omid-Nejati/MedViTV2",
    convert=convert,
)  # fmt: skip
