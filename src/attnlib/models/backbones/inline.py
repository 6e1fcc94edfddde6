"""InLine-DeiT, -PVT, -Swin and -CSwin: hosts whose early stages read by linear attention that subtracts its mean.

Han et al., 2024, "Bridging the Divide: Reconsidering Softmax and Linear Attention", arXiv 2412.06590. Each is its host
with :class:`attnlib.nn.linear.inline_attention.InLineAttention` in some of its blocks, over the whole map where the
host has windows; the others keep the attention of the host.

Differs from the authors' code: any size. Tables of positions are interpolated; windows and stripes that do not divide a
map are padded with tokens that nobody attends to; an odd row or column before patches are merged is completed with
zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...nn.linear.inline_attention import InLineAttention
from ...nn.reduced.spatial_reduction import SpatialReductionAttention
from ...nn.released import Released
from ..blocks import Make, Place
from ..build import register_models
from . import hosts
from . import vit as plain
from .hosts import Blocks, among_first, per_stage, sides
from .stages import Backbone

_OWN = (InLineAttention, SpatialReductionAttention)


def inline_deit(
    patch_size: int = 16,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 6,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    class_token: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "token",
) -> plain.VisionTransformer:
    """An InLine-DeiT, with InLine attention in every block; the class token has no part in its convolutions.

    Args:
        patch_size: pixels per side of a patch.
        embed_dim, depth, num_heads: width, blocks, heads.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: biases of the query, key and value projections.
        class_token, mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as of
            :func:`attnlib.models.backbones.vit.vit`.
    """

    def own(place: Place) -> nn.Module:
        return InLineAttention(place.dim, place.num_heads, qkv_bias)

    model = plain.vit(
        patch_size, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, class_token=class_token,
        fc_norm=False, mechanism=mechanism or own, num_classes=num_classes, in_chans=in_chans, img_size=img_size,
        drop_path_rate=drop_path_rate, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip
    plain.start(model, also=_OWN)
    if model.cls_token is not None:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    return model


def inline_pvt(
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (2, 2, 2, 2),
    num_heads: Sequence[int] = (2, 4, 10, 16),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    inline_blocks: Blocks = (None, None, None, None),
    sr_ratios: Sequence[int] = (8, 4, 2, 1),
    qkv_bias: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An InLine-PVT: patches of 4 x 4, then of 2 x 2, a table of positions before every stage, no norm at the end.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        inline_blocks: how many of the first blocks of each stage are InLine, ``None`` for all.
        sr_ratios: reduction of keys and values per side of the other blocks, per stage.
        qkv_bias: biases of the query, key and value projections.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(embed_dims)
    image, maps = sides(img_size, count)
    which, ratios = per_stage("inline_blocks", inline_blocks, count), per_stage("sr_ratios", sr_ratios, count)

    def own(place: Place) -> nn.Module:
        if among_first(place, which):
            return InLineAttention(place.dim, place.num_heads, qkv_bias)
        return SpatialReductionAttention(place.dim, place.num_heads, ratios[place.stage], qkv_bias=qkv_bias)

    return hosts.pvt(
        mechanism or own, maps, embed_dims, depths, num_heads, mlp_ratios, drop_path_rate, in_chans, _OWN,
        num_classes=num_classes, img_size=image, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip


def inline_swin(
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    inline_blocks: Blocks = (None, None, None, 0),
    inline_window: int | None = 56,
    window_size: int | None = None,
    features: str = "identity",
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An InLine-Swin: patches of 4 x 4, merged by 2 x 2 between stages; the last stages keep shifted windows.

    Args:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        inline_blocks: how many of the first blocks of each stage are InLine, ``None`` for all.
        inline_window: sides of their windows, every second one shifted by half a window (without a mask, as the
            authors'); the whole map where that is no larger, or with ``None``.
        window_size: sides of the other windows; an eighth of ``inline_window``, and at least 7, by default.
        features: of InLine attention.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: biases of the query, key and value projections.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(depths)
    image, maps = sides(img_size, count)
    which = per_stage("inline_blocks", inline_blocks, count)
    other = max(7, (min(maps[0]) if inline_window is None else inline_window) // 8)
    other = other if window_size is None else window_size

    def own(place: Place) -> nn.Module:
        grid = maps[place.stage]
        if not among_first(place, which):
            return hosts.shifted_windows(place, other, grid, qkv_bias)
        window = None if inline_window is None or inline_window >= min(grid) else inline_window
        shift = window // 2 if window and place.block % 2 else 0
        return InLineAttention(place.dim, place.num_heads, qkv_bias, features, window_size=window, shift_size=shift)

    return hosts.swin(
        mechanism or own, embed_dim, depths, num_heads, mlp_ratio, drop_path_rate, in_chans, _OWN,
        num_classes=num_classes, img_size=image, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip


def inline_cswin(
    embed_dim: int = 64,
    depths: Sequence[int] = (2, 4, 18, 1),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    inline_blocks: Blocks = (None, None, 0, 0),
    split_size: Sequence[int] = (1, 2, 7, 7),
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An InLine-CSWin: overlapping 7 x 7 patches, 3 x 3 convolutions between stages; InLine blocks read the whole map.

    Args:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks per stage.
        num_heads: heads per stage, even numbers where there are stripes.
        inline_blocks: how many of the first blocks of each stage are InLine, ``None`` for all.
        split_size: width of the stripes of the others, per stage; the last stage has none.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: biases of the query, key and value projections.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(depths)
    image, maps = sides(img_size, count)
    which, splits = per_stage("inline_blocks", inline_blocks, count), per_stage("split_size", split_size, count)

    def own(place: Place) -> nn.Module:
        if among_first(place, which):
            return InLineAttention(place.dim, place.num_heads, qkv_bias, lepe=True, pre_norm=True)
        return hosts.stripes(place, splits[place.stage], maps[place.stage], place.stage == count - 1, qkv_bias)

    return hosts.cswin(
        mechanism or own, embed_dim, depths, num_heads, mlp_ratio, drop_path_rate, in_chans, _OWN,
        num_classes=num_classes, img_size=image, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip


# ---- weights


def _attention(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention part of any of their blocks."""
    if any("residual." in name for name in held):
        return dict(InLineAttention.convert_state_dict(held))
    if "q.weight" in held:
        return dict(SpatialReductionAttention.convert_state_dict(held))
    return hosts.own_attention(held)


def convert_deit(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``VisionTransformer``."""
    theirs = Released(state_dict, "InLine-DeiT")
    out = theirs.parts(r"blocks\.(\d+)\.attn\.(.+)", r"stages.\1.mixer.inner", _attention)
    return out | plain.convert({name: theirs.take(name) for name in theirs}, model)


def convert_pvt(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``PyramidVisionTransformer``."""
    return hosts.convert_pvt(state_dict, "InLine-PVT", _attention)


def convert_swin(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``InLineSwin``."""
    return hosts.convert_swin(state_dict, "InLine-Swin", _attention)


def convert_cswin(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``CSWinTransformer``."""
    # The mean that predicts a kernel is that of tokens before the norm, which therefore belongs to the attention.
    inline = {name.partition(".attns.")[0] for name in state_dict if ".attns.0.residual." in name}
    moved = {f"{place}.norm1.": f"{place}.attns.0.norm1." for place in inline}

    def name_of(name: str) -> str:
        head, found, tail = name.partition(".norm1.")
        return moved[head + found] + tail if head + found in moved else name

    return hosts.convert_cswin({name_of(n): value for n, value in state_dict.items()}, "InLine-CSWin", _attention)


# ---- sizes

_DEIT: dict[str, dict[str, Any]] = {
    "inline_deit_tiny": dict(embed_dim=192, num_heads=6, drop_path_rate=0.1),
    "inline_deit_small": dict(embed_dim=320, num_heads=10, drop_path_rate=0.1, img_size=288),
    "inline_deit_base": dict(embed_dim=384, num_heads=12, drop_path_rate=0.1, img_size=448),
}
_PVT: dict[str, dict[str, Any]] = {
    "inline_pvt_tiny": dict(depths=(2, 2, 2, 2), drop_path_rate=0.1),
    "inline_pvt_small": dict(depths=(3, 4, 6, 3), drop_path_rate=0.1),
    "inline_pvt_medium": dict(depths=(3, 4, 18, 3), drop_path_rate=0.3),
    "inline_pvt_large": dict(depths=(3, 8, 27, 3), drop_path_rate=0.3),
}
_SWIN: dict[str, dict[str, Any]] = {
    "inline_swin_tiny": dict(drop_path_rate=0.2),
    "inline_swin_small": dict(depths=(2, 2, 18, 2), inline_blocks=(None, None, 0, 0), drop_path_rate=0.3),
    "inline_swin_base": dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), inline_blocks=(None, None, 2, 0),
        drop_path_rate=0.5,
    ),
}  # fmt: skip
_SWIN["inline_swin_base_384"] = {**_SWIN["inline_swin_base"], "inline_window": 96, "img_size": 384}
_CSWIN: dict[str, dict[str, Any]] = {
    "inline_cswin_tiny": dict(drop_path_rate=0.2),
    "inline_cswin_small": dict(depths=(3, 6, 29, 2), drop_path_rate=0.4),
    "inline_cswin_base": dict(embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
}
_CSWIN["inline_cswin_base_384"] = {
    **_CSWIN["inline_cswin_base"], "split_size": (1, 2, 12, 12), "drop_path_rate": 0.7, "img_size": 384
}  # fmt: skip

PARAMS = {
    "inline_deit_tiny": 6_477_736, "inline_deit_small": 16_734_760, "inline_deit_base": 23_797_096,
    "inline_pvt_tiny": 12_032_232, "inline_pvt_small": 21_556_136, "inline_pvt_medium": 37_618_856,
    "inline_pvt_large": 51_154_280, "inline_swin_tiny": 29_223_544, "inline_swin_small": 49_793_296,
    "inline_swin_base": 88_350_120, "inline_swin_base_384": 88_465_320, "inline_cswin_tiny": 20_604_520,
    "inline_cswin_small": 33_032_872, "inline_cswin_base": 73_413_640, "inline_cswin_base_384": 73_413_640,
}  # fmt: skip

_HOSTS: tuple[tuple[Any, dict[str, dict[str, Any]], Any], ...] = (
    (inline_deit, _DEIT, convert_deit), (inline_pvt, _PVT, convert_pvt), (inline_swin, _SWIN, convert_swin),
    (inline_cswin, _CSWIN, convert_cswin),
)  # fmt: skip
for _make, _sizes, _convert in _HOSTS:
    register_models(
        "inline-attention",
        _make,
        _sizes,
        params={name: PARAMS[name] for name in _sizes},
        source="LeapLabTHU/InLine",
        convert=_convert,
        img_size={name: size.get("img_size", 224) for name, size in _sizes.items()},
        data={"crop_pct": 0.875, "crop_mode": "squash"},
    )
