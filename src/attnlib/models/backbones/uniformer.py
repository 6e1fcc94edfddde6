"""UniFormer: relations of neighbourhoods in the first two stages, of all tokens in the last two; images and clips.

Li et al., 2022, "UniFormer: Unified Transformer for Efficient Spatiotemporal Representation Learning", arXiv
2201.04676. Every block is a depthwise convolution that tells positions, a relation aggregator and an MLP, each added to
what it reads. A clip (B, C, T, H, W) of any length, odd ones too, has half as many frames behind the stem, rounded up.

With ``split``, attention is along time, then within a frame: ``t = x + A_t(x), y = x + A_s(t)``; the second shortcut
comes from ``x`` and not from ``t``, as released. No released weights use it.

:func:`inflate` makes weights for clips from those of an image model.

Differs from the authors' code: any size, where theirs for images is built for one; layer scale is an argument, where
theirs stays on for all models that are built after one with it; stochastic depth drops split attention of whole clips.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import ConvNorm, MapNorm, Mlp, Patchify, PositionalConv, normed, strided_valid, zero_invalid
from ...nn.local.uniformer import LocalRelation
from ...nn.released import Released, Rule
from ..blocks import Block, ConvStem, Make, Place, Residual, check_stages, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage

_Norm = functools.partial(nn.LayerNorm, eps=1e-6)


class ClipPatchify(nn.Module):
    """:class:`attnlib.nn.layers.Patchify` of clips: patches of ``side`` x ``side`` tokens of one frame, or of three.

    Args:
        dim: channels in.
        out_dim: channels out.
        side: of patches.
        frames: 1; or 3 around every second frame, zeros beyond the ends.
        norm: LayerNorm behind the convolution.
        bias: of the convolution.
    """

    def __init__(self, dim: int, out_dim: int, side: int, frames: int = 1, norm: bool = True, bias: bool = True):
        super().__init__()
        self.steps = (1 if frames == 1 else 2, side, side)
        self.proj = nn.Conv3d(dim, out_dim, (frames, side, side), self.steps, (frames // 2, 0, 0), bias=bias)
        self.norm = nn.LayerNorm(out_dim) if norm else nn.Identity()

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(B, T, H, W, dim) -> (B, T', ceil(H / side), ceil(W / side), out_dim), and which of these exist."""
        x = zero_invalid(x, valid)
        height, width = (-n % side for n, side in zip(x.shape[2:4], self.steps[1:], strict=True))
        if height or width:
            x = F.pad(x, (0, 0, 0, width, 0, height))
        return self.norm(self.proj(x.movedim(-1, 1)).movedim(1, -1)), strided_valid(valid, self.steps)


class SplitBlock(nn.Module):
    """Position, attention along time and within frames, MLP.

    Args:
        dim: width.
        num_heads: heads.
        mlp: called as ``mlp(x, valid)``.
        qkv_bias: biases of queries, keys and values.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, num_heads: int, mlp: nn.Module, qkv_bias: bool = True, drop_path: float = 0.0):
        super().__init__()
        self.position = PositionalConv(dim, 3, 3)
        self.temporal = Residual(dim, SoftmaxAttention(dim, num_heads, qkv_bias=qkv_bias), _Norm, drop_path)
        self.mixer = Residual(dim, SoftmaxAttention(dim, num_heads, qkv_bias=qkv_bias), _Norm, drop_path)
        self.mlp = Residual(dim, mlp, _Norm, drop_path)

    def start(self) -> None:
        """Attention along time gives zeros, and yet its projections have gradients."""
        inner: Any = self.temporal.inner
        for layer in (inner.q, inner.k, inner.v, inner.proj):
            nn.init.constant_(layer.weight, float(layer is inner.proj))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Any]:
        """(B, T, H, W, C) -> the same, and the carry."""
        x = self.position(x, valid)
        # Lines of time per pixel, and frames per time.
        y = self._within(self.temporal, x.movedim(1, 3), None if valid is None else valid.movedim(1, 3), 3)
        t = x + y.movedim(3, 1)
        x = x + self._within(self.mixer, t, valid, 2)
        return self.mlp(x, valid)[0], carry

    @staticmethod
    def _within(part: Residual, x: Tensor, valid: Tensor | None, axes: int) -> Tensor:
        """The branch of ``part``, its attention within what lies behind the first ``axes`` axes."""
        tokens = normed(part.norm, x, valid).flatten(0, axes - 1).flatten(1, -2)
        y = part.inner(tokens, valid=None if valid is None else valid.flatten(0, axes - 1).flatten(1))
        return part.drop_path(y.reshape(x.shape))


class ClipBackbone(Backbone):
    """A backbone of clips (B, in_chans, T, H, W)."""

    rank = 3


def uniformer(
    depths: Sequence[int] = (3, 4, 8, 3),
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    head_dim: int = 64,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    kernel_size: int = 5,
    conv_stem: bool = False,
    layer_scale: float | None = None,
    rank: int = 2,
    split: bool = False,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A UniFormer.

    Args:
        depths: blocks per stage; the first two are local, the others global.
        embed_dims: width per stage.
        head_dim: width of a head of the global stages.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: biases of queries, keys and values.
        kernel_size: tokens per axis of local relations.
        conv_stem: overlapping convolutions with BatchNorm instead of patches with LayerNorm; of images alone.
        layer_scale: start of the learned scales of global blocks; ``None`` for none.
        rank: 2 for images, 3 for clips (B, in_chans, T, H, W).
        split: attention along time, then within frames; of clips alone.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.

    Raises:
        ValueError: widths of the global stages that are no multiples of ``head_dim``; what images or clips alone can
            have.
    """
    check_stages(4, depths=depths, embed_dims=embed_dims)
    check_choice("rank", rank, (2, 3))
    check_int("head_dim", head_dim, least=1)
    check_real("mlp_ratio", mlp_ratio, above=0)
    check_flag("qkv_bias", qkv_bias)
    if check_flag("conv_stem", conv_stem) and rank == 3:
        raise ValueError("conv_stem=True is possible for images alone, got rank=3")
    if check_flag("split", split) and (rank == 2 or mechanism is not None or layer_scale is not None):
        raise ValueError("split=True needs rank=3, no mechanism and no layer_scale")
    if any(dim % head_dim for dim in embed_dims[2:]):
        raise ValueError(f"head_dim={head_dim} must divide the last two of embed_dims={tuple(embed_dims)}")

    def own(place: Place) -> nn.Module:
        if place.stage < 2:
            return LocalRelation(place.dim, kernel_size, rank)
        return SoftmaxAttention(place.dim, place.num_heads, qkv_bias=qkv_bias)

    def block(place: Place) -> nn.Module:
        mlp, local = Mlp(place.dim, mlp_ratio), place.stage < 2
        if split and not local:
            return SplitBlock(place.dim, place.num_heads, mlp, qkv_bias, place.drop_path)
        return Block(
            place.dim, (mechanism or own)(place), mlp, norm=MapNorm if local else _Norm, drop_path=place.drop_path,
            layer_scale=None if local else layer_scale, position=3, rank=rank,
        )  # fmt: skip

    def between(dim: int, out: int, side: int) -> nn.Module:
        if conv_stem:
            half = [ConvNorm(dim, out // 2, 3, 2, bias=True, activation=nn.GELU)] if side == 4 else []
            return ConvStem(*half, ConvNorm(out // 2 if half else dim, out, 3, 2, bias=True))
        if rank == 3:
            return ClipPatchify(dim, out, side, 3 if side == 4 else 1)
        return Patchify(dim, out, side)

    reductions = [4 * 2**i for i in range(4)]
    heads = [max(1, dim // head_dim) for dim in embed_dims]
    stages = []
    for row in places(embed_dims, depths, heads, reductions, drop_path_rate):
        i = row[0].stage
        stage = Stage(map(block, row), between(embed_dims[i - 1], embed_dims[i], 2) if i else None)
        if i > 1:
            init_weights(stage, also=(SoftmaxAttention,))
        for part in stage.blocks:
            if isinstance(part, SplitBlock):
                part.start()
        stages.append(stage)
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    build = Backbone if rank == 2 else ClipBackbone
    model = build(
        between(in_chans, embed_dims[0], 4), stages, embed_dims, reductions, MapNorm(embed_dims[-1]), head,
        num_classes, in_chans, img_size,
    )  # fmt: skip
    if conv_stem:
        model.input_name = "stem.0.conv.weight"
    return model


def inflate(image: Mapping[str, Tensor], model: nn.Module, center: bool = False) -> dict[str, Tensor]:
    """A state dict for a model of clips from that of the same model of images, in our names.

    A kernel over T frames is the image's divided by T in each of them; with ``center``, the image's in the middle one
    and zeros beside it: a clip of equal frames then gives what the image gives. Heads of other classes and attention
    along time stay as they are in ``model``.

    Raises:
        ValueError: entries that the model does not have, or that no frames make equal.
    """
    check_flag("center", center)
    out = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, value in image.items():
        like = out.get(name)
        if like is None:
            raise ValueError(f"image holds {name!r}, which the model of clips does not have")
        if name.startswith("head.fc.") and like.shape != value.shape:
            continue
        if value.dim() >= 4 and like.dim() == value.dim() + 1:
            frames = like.shape[2]
            share = torch.full((frames,), 1 / frames)
            if center:
                share = torch.arange(frames).eq(frames // 2).to(share.dtype)
            value = value.unsqueeze(2) * share.to(value).view(-1, 1, 1)
        if like.shape != value.shape:
            raise ValueError(f"{name!r} of image has shape {tuple(value.shape)}, the model's {tuple(like.shape)}")
        out[name] = value
    return out


_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``UniFormer`` of images and ``Uniformer`` of clips."""
    theirs = Released(state_dict, "the authors' UniFormer")
    out: dict[str, Tensor] = {}
    rules: dict[str, Rule] = {
        rf"norm\.{_NORM}": r"norm.norm.\1", r"head\.(weight|bias)": r"head.fc.\1",
    }  # fmt: skip

    def flat(to: str) -> Rule:
        return lambda m, t: {m.expand(to): t.flatten(1) if t.dim() > 2 else t}

    for i in range(4):
        block, to = rf"blocks{i + 1}\.(\d+)\.", rf"stages.{i}.blocks.\1."
        embed, at = rf"patch_embed{i + 1}\.", f"stages.{i}.downsample." if i else "stem."
        rules |= {rf"{embed}(proj|norm)\.(weight|bias)": rf"{at}\1.\2"}
        for n, conv in enumerate((0, 1, 3, 4)):
            part = "norm" if n % 2 else "conv"
            rules[rf"{embed}proj\.{conv}\.{_NORM}"] = rf"{at}{n // 2}.{part}.\1"
        if i < 2:
            out |= theirs.parts(
                block + r"((?:conv1|conv2|attn)\..+)", to + "mixer.inner", LocalRelation.convert_state_dict
            )
        else:
            for name, ours in (("attn", "mixer"), ("t_attn", "temporal")):
                out |= theirs.parts(rf"{block}{name}\.(.+)", f"{to}{ours}.inner", SoftmaxAttention.convert_state_dict)
        inside = "norm.norm" if i < 2 else "norm"
        rules |= {
            rf"{block}pos_embed\.(weight|bias)": to + r"position.conv.\2",
            rf"{block}norm1\.{_NORM}": rf"{to}mixer.{inside}.\2", rf"{block}norm2\.{_NORM}": rf"{to}mlp.{inside}.\2",
            rf"{block}t_norm\.(weight|bias)": to + r"temporal.norm.\2",
            rf"{block}mlp\.(fc[12])\.(weight|bias)": flat(to + r"mlp.inner.\2.\3"),
            rf"{block}gamma_1": to + "mixer.scale.gamma", rf"{block}gamma_2": to + "mlp.scale.gamma",
        }  # fmt: skip
    return theirs.close(out | theirs.renamed(rules))


_PLUS: dict[str, Any] = dict(depths=(3, 5, 9, 3), conv_stem=True)
_BASE: dict[str, Any] = dict(depths=(5, 8, 20, 7))
_ABOUT: dict[str, Any] = dict(license="Apache-2.0", source="Sense-X/UniFormer", convert=convert)

register_models(
    "uniformer",
    uniformer,
    {
        "uniformer_s": dict(),
        "uniformer_s_plus": dict(**_PLUS, head_dim=32),
        "uniformer_s_plus_dim64": _PLUS,
        "uniformer_b": _BASE,
        "uniformer_b_ls": dict(**_BASE, layer_scale=1e-6),
    },
    params={
        "uniformer_s": 21_545_256,
        "uniformer_s_plus": 24_032_552,
        "uniformer_s_plus_dim64": 24_032_552,
        "uniformer_b": 49_776_552,
        "uniformer_b_ls": 49_796_520,
    },
    **_ABOUT,
)
register_models(
    "uniformer",
    uniformer,
    {
        "uniformer_s_video": dict(rank=3, num_classes=400),
        "uniformer_b_video": dict(**_BASE, rank=3, num_classes=400),
    },
    params={"uniformer_s_video": 21_400_400, "uniformer_b_video": 49_813_200},
    task="clips",
    **_ABOUT,
)
