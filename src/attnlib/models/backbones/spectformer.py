"""SpectFormer: the first blocks mix tokens by a gate per frequency, the others by attention.

Patro et al., 2023, "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", arXiv 2304.06446.
The plain models are vision transformers without a class token, whose first ``alpha`` blocks are GFNet's,

    x <- x + mlp(norm(filter(norm(x)))),

so that ``alpha=0`` is a vision transformer and ``alpha=depth`` is GFNet. The hierarchical ones (H) have filters in the
first two of four stages, MLPs with a depthwise convolution, and a class token that starts as the mean of the last map
and reads it once.

Differs from the authors' code: images of any size, for which filters and positions are interpolated; the base size has
8 heads (the released 6 do not divide 512, nor do the 12 of its comment); labels of tokens are learned without mixing
tokens of two images, which belongs to the loss.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_ints, check_real
from ...grids import Layout
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.layers import ConvNorm, DropPath, Mlp, Patchify, init_like_pvt, masked_mean
from ...nn.modulation.spectformer import SpectralGating
from ...nn.released import Released, Rule
from ..blocks import Block, Chain, ConvStem, Make, Place, add_losses, check_stages, init_weights, mix, places
from ..build import register_models
from .stages import Backbone, Head, Stage
from .vit import PatchStem, TokenHead, VisionTransformer, grid_of

Norm = functools.partial(nn.LayerNorm, eps=1e-6)


class FilterBlock(nn.Module):
    """``x + mlp(norm2(inner(norm1(x))))``: mixing and MLP under one shortcut.

    Args:
        dim: width.
        inner: the mechanism.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop_path: stochastic depth.
    """

    def __init__(self, dim: int, inner: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1, self.inner, self.norm2, self.mlp = Norm(dim), inner, Norm(dim), Mlp(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(
        self, x: Tensor, valid: Tensor | None = None, carry: Any = None, losses: dict[str, Tensor] | None = None,
        layout: Layout | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """(B, h, w, C) -> the same, and the carry for the next block."""
        y, carry, own = mix(self.inner, self.norm1(x), None, carry, valid, layout)
        add_losses(losses, own)
        return x + self.drop_path(self.mlp(self.norm2(y))), carry


def spectformer(
    patch_size: int = 16,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    alpha: int = 4,
    mlp_ratio: float = 4.0,
    resample: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> VisionTransformer:
    """A plain SpectFormer.

    Args:
        patch_size: pixels per side of a patch.
        embed_dim, depth, num_heads: width, blocks, heads.
        alpha: blocks with filters, the first ones.
        mlp_ratio: hidden width of MLPs over the width.
        resample: interpolate filters for images of another size than ``img_size``, instead of refusing these.
        mechanism: takes the place of both filters and attention.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in :func:`attnlib.create_model`.
    """
    check_int("patch_size", patch_size, least=1)
    check_int("alpha", alpha, least=0, most=check_int("depth", depth, least=1))
    check_real("mlp_ratio", mlp_ratio, above=0)
    grid = tuple(max(1, side // patch_size) for side in _sides(img_size))

    def own(place: Place) -> nn.Module:
        if place.block < alpha:
            return SpectralGating(place.dim, grid, resample)
        return SoftmaxAttention(place.dim, place.num_heads)

    make = mechanism or own
    (row,) = places([embed_dim], [depth], [num_heads], [patch_size], drop_path_rate)
    blocks: list[nn.Module] = [
        FilterBlock(p.dim, make(p), mlp_ratio, p.drop_path)
        if p.block < alpha
        else Block(p.dim, make(p), mlp_ratio=mlp_ratio, norm=Norm, drop_path=p.drop_path)
        for p in row
    ]
    head = TokenHead(embed_dim, num_classes, global_pool, 0, False, drop=drop_rate)
    model = VisionTransformer(
        PatchStem(in_chans, embed_dim, patch_size), blocks, embed_dim, patch_size, Norm(embed_dim), head,
        class_token=False, num_classes=num_classes, in_chans=in_chans, img_size=img_size,
    )  # fmt: skip
    init_weights(model, also=(SoftmaxAttention,))
    return model


class ClassAttentionHead(Head):
    """A class token, the mean of the map, reads map and itself once, and passes an MLP, a norm and a linear map.

    With ``token_label`` a second linear map reads every token: in training both logits are given as a pair, (B, K) and
    (B, N, K); in evaluation half the largest of the tokens' is added to those of the class token.

    Args:
        dim, num_classes, pool, drop: as of :class:`attnlib.models.backbones.stages.Head`; ``pool`` is ``"token"``, or
            ``""`` for the normed map.
        num_heads: of the attention.
        mlp_ratio: hidden width of the MLP over ``dim``.
        token_label: as above.
    """

    pools = ("token", "")

    def __init__(
        self, dim: int, num_classes: int, pool: str, num_heads: int, mlp_ratio: float, token_label: bool,
        drop: float = 0.0,
    ):  # fmt: skip
        self.token_label = check_flag("token_label", token_label)
        super().__init__(dim, num_classes, pool, Norm, drop)
        self.attn_norm, self.attn = Norm(dim), SoftmaxAttention(dim, num_heads)
        self.mlp_norm, self.mlp = Norm(dim), Mlp(dim, mlp_ratio)

    def reset(self, num_classes: int, pool: str | None = None) -> None:
        super().reset(num_classes, pool)
        if self.token_label:
            self.fc_aux = copy.deepcopy(self.fc)
            init_weights(self.fc_aux)

    def forward(self, x: Tensor, valid: Tensor | None = None, pre_logits: bool = False) -> Any:
        """(B, H, W, C) -> (B, num_classes), or what the linear map reads."""
        if not self.pool:
            return self.norm(x)
        token = masked_mean(x, valid)[:, None]
        exists = None if valid is None else F.pad(valid.flatten(1), (1, 0), value=True)
        z = self.attn_norm(torch.cat([token, x.flatten(1, 2)], 1))
        token = token + self.attn(z[:, :1], z, context_valid=exists)
        token = token + self.mlp(self.mlp_norm(token))
        read = self.drop(self.norm(token[:, 0]))
        if pre_logits or isinstance(self.fc, nn.Identity):
            return read
        if not self.token_label:
            return self.fc(read)
        aux = self.fc_aux(self.norm(x.flatten(1, 2)))
        if self.training:
            return self.fc(read), aux
        if valid is not None:
            aux = aux.masked_fill(~valid.flatten(1)[:, :, None], float("-inf"))
        return self.fc(read) + 0.5 * aux.amax(1)


def spectformer_h(
    embed_dims: Sequence[int] = (64, 128, 320, 448),
    depths: Sequence[int] = (3, 4, 6, 3),
    num_heads: Sequence[int] = (2, 4, 10, 14),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    stem_dim: int = 32,
    spectral_stages: int = 2,
    token_label: bool = False,
    resample: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> Backbone:
    """A hierarchical SpectFormer.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        stem_dim: channels of the first three convolutions.
        spectral_stages: stages with filters, the first ones.
        token_label: a second linear map that labels tokens, as all released weights have: see
            :class:`ClassAttentionHead`.
        resample: interpolate filters for images of another size than ``img_size``, instead of refusing these.
        mechanism: takes the place of both filters and attention; that of the class token stays.
        num_classes, in_chans, img_size, drop_path_rate, drop_rate: as in :func:`attnlib.create_model`.
        global_pool: ``"token"``, or ``""`` for the normed map.
    """
    check_stages(len(check_ints("embed_dims", embed_dims, least=1)), mlp_ratios=mlp_ratios)
    for i, ratio in enumerate(mlp_ratios):
        check_real(f"mlp_ratios[{i}]", ratio, above=0)
    check_int("stem_dim", stem_dim, least=1)
    check_int("spectral_stages", spectral_stages, least=0, most=len(embed_dims))
    sides = _sides(img_size)
    reductions = [4 * 2**i for i in range(len(embed_dims))]

    def own(place: Place) -> nn.Module:
        if place.stage < spectral_stages:
            return SpectralGating(place.dim, [-(-side // place.stride) for side in sides], resample)
        return SoftmaxAttention(place.dim, place.num_heads)

    make = mechanism or own
    conv = functools.partial(ConvNorm, activation=nn.ReLU)
    stem = Chain(
        ConvStem(conv(in_chans, stem_dim, 7, 2), conv(stem_dim, stem_dim, 3), conv(stem_dim, stem_dim, 3)),
        Patchify(stem_dim, embed_dims[0], 3, 2, 1),
    )
    stages = []
    rows = places(embed_dims, depths, num_heads, reductions, drop_path_rate)
    for i, row in enumerate(rows):
        blocks = [
            Block(p.dim, make(p), Mlp(p.dim, mlp_ratios[i], depthwise=3), norm=Norm, drop_path=p.drop_path) for p in row
        ]
        between = Patchify(embed_dims[i - 1], row[0].dim, 3, 2, 1) if i else None
        stages.append(Stage(blocks, between, Norm(row[0].dim) if i + 1 < len(rows) else None))
    head = ClassAttentionHead(
        embed_dims[-1], num_classes, global_pool, num_heads[-1], mlp_ratios[-1], token_label, drop_rate
    )
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    model.input_name = "stem.0.0.conv.weight"
    if token_label:
        model.head_names = ("head.fc.", "head.fc_aux.")
    init_like_pvt(model)
    return model


def _sides(img_size: int | tuple[int, int]) -> tuple[int, ...]:
    sides = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
    if len(sides) != 2:
        raise ValueError(f"img_size must be one side or (height, width), got {sides}")
    return sides


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' plain ``SpectFormer``, or from GFNet's class of one width."""
    theirs = Released(state_dict, "the authors' plain SpectFormer")
    block, to = r"blocks\.(\d+)", r"stages.\1"
    out = theirs.parts(rf"{block}\.filter\.(.+)", f"{to}.inner", SpectralGating.convert_state_dict)
    out |= theirs.parts(rf"{block}\.attn\.(.+)", f"{to}.mixer.inner", SoftmaxAttention.convert_state_dict)
    filters = "|".join(str(i) for i, b in enumerate(model.stages) if isinstance(b, FilterBlock)) or "none"
    rules: dict[str, Rule] = {
        r"patch_embed\.proj\.(weight|bias)": r"stem.proj.\1",
        r"pos_embed": lambda match, value: {"pos_embed": grid_of(value, 0, model.pos_embed.shape[1:])[1]},
        rf"blocks\.({filters})\.(norm[12]|mlp\.fc[12])\.(weight|bias)": r"stages.\1.\2.\3",
        rf"{block}\.norm1\.(weight|bias)": rf"{to}.mixer.norm.\2",
        rf"{block}\.norm2\.(weight|bias)": rf"{to}.mlp.norm.\2",
        rf"{block}\.mlp\.(fc[12])\.(weight|bias)": rf"{to}.mlp.inner.\2.\3",
        r"norm\.(weight|bias)": r"norm.\1",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


def convert_h(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' hierarchical ``SpectFormer``.

    Raises:
        ValueError: labels of tokens for a model without them.
    """
    theirs = Released(state_dict, "the authors' hierarchical SpectFormer")
    if "aux_head.weight" in theirs and not getattr(model.head, "token_label", True):
        raise ValueError("state_dict labels tokens (aux_head), which token_label=True builds")
    last = len(model.stages)

    def stage(rest: str) -> Rule:
        """Stages count from 1 there."""
        return lambda m, value: {f"stages.{int(m[1]) - 1}.{m.expand(rest)}": value}

    def kv(to: Callable[[Any], str]) -> Rule:
        return lambda m, value: {f"{to(m)}.{n}.{m[m.re.groups]}": t for n, t in zip("kv", value.chunk(2), strict=True)}

    out = theirs.parts(
        r"block(\d+)\.(\d+)\.attn\.(complex_weight)", r"\1.blocks.\2.mixer.inner", SpectralGating.convert_state_dict
    )
    out = {f"stages.{int(name.partition('.')[0]) - 1}.{name.partition('.')[2]}": t for name, t in out.items()}
    rules: dict[str, Rule] = {
        r"patch_embed1\.conv\.(\d)\.(\w+)": lambda m, value: {
            f"stem.0.{int(m[1]) // 3}.{('conv', 'norm')[int(m[1]) % 3]}.{m[2]}": value
        },
        r"patch_embed1\.(proj|norm)\.(weight|bias)": r"stem.1.\1.\2",
        r"patch_embed(\d+)\.(proj|norm)\.(weight|bias)": stage(r"downsample.\2.\3"),
        r"block(\d+)\.(\d+)\.norm1\.(weight|bias)": stage(r"blocks.\2.mixer.norm.\3"),
        r"block(\d+)\.(\d+)\.norm2\.(weight|bias)": stage(r"blocks.\2.mlp.norm.\3"),
        r"block(\d+)\.(\d+)\.mlp\.(fc[12])\.(weight|bias)": stage(r"blocks.\2.mlp.inner.\3.\4"),
        r"block(\d+)\.(\d+)\.mlp\.dwconv\.dwconv\.(weight|bias)": stage(r"blocks.\2.mlp.inner.dwconv.\3"),
        r"block(\d+)\.(\d+)\.attn\.(q|proj)\.(weight|bias)": stage(r"blocks.\2.mixer.inner.\3.\4"),
        r"block(\d+)\.(\d+)\.attn\.kv\.(weight|bias)": kv(
            lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mixer.inner"
        ),
        rf"norm{last}\.(weight|bias)": r"head.norm.\1",
        r"norm(\d+)\.(weight|bias)": stage(r"norm.\2"),
        r"post_network\.0\.norm1\.(weight|bias)": r"head.attn_norm.\1",
        r"post_network\.0\.norm2\.(weight|bias)": r"head.mlp_norm.\1",
        r"post_network\.0\.mlp\.(fc[12])\.(weight|bias)": r"head.mlp.\1.\2",
        r"post_network\.0\.attn\.(q|proj)\.(weight|bias)": r"head.attn.\1.\2",
        r"post_network\.0\.attn\.kv\.(weight|bias)": kv(lambda m: "head.attn"),
        r"head\.(weight|bias)": r"head.fc.\1",
        r"aux_head\.(weight|bias)": r"head.fc_aux.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


_SIZES: dict[str, dict[str, Any]] = {
    "spectformer_ti": dict(embed_dim=256, num_heads=4),
    "spectformer_xs": dict(),
    "spectformer_s": dict(depth=19, drop_path_rate=0.15),
    "spectformer_b": dict(embed_dim=512, depth=19, num_heads=8, drop_path_rate=0.25),
}
_H: dict[str, dict[str, Any]] = {
    "spectformer_h_s": dict(),
    "spectformer_h_b": dict(
        embed_dims=(64, 128, 320, 512), depths=(3, 4, 12, 3), num_heads=(2, 4, 10, 16), stem_dim=64
    ),
    "spectformer_h_l": dict(
        embed_dims=(96, 192, 384, 512), depths=(3, 6, 18, 3), num_heads=(3, 6, 12, 16), stem_dim=64
    ),
}
#: Of the base size with 8 heads, and of the hierarchical ones without labels of tokens.
_PARAMS = {
    "spectformer_ti": 9_158_376, "spectformer_xs": 20_028_520, "spectformer_s": 32_449_768,
    "spectformer_b": 57_159_656, "spectformer_h_s": 21_777_928, "spectformer_h_b": 32_539_880,
    "spectformer_h_l": 54_162_792,
}  # fmt: skip

register_models("spectformer", spectformer, _SIZES, params=_PARAMS, source="badripatro/SpectFormers", convert=convert)
register_models("spectformer", spectformer_h, _H, params=_PARAMS, source="badripatro/SpectFormers", convert=convert_h)
