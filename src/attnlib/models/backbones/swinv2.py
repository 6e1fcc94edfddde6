"""Swin V2: windows of attention by cosines, norms behind the sublayers, positions that serve windows of any size.

Liu et al., 2022, "Swin Transformer V2: Scaling Up Capacity and Resolution", arXiv 2111.09883. The pyramid of Swin with
:class:`attnlib.nn.partition.swinv2.CosineWindowAttention` in its blocks, every second one of them with windows moved by
half; norms stand behind attention, MLP and the merging of patches, and those of blocks start at zero. Plain-DETR
(arXiv 2308.01904) has it with attention to the whole map in the last stage (``global_blocks``), AiT (arXiv 2301.02229)
with windows of their own in every stage, of which the last two are not moved (``shifts``).

As in timm's class, a window is no larger than the map of the images that a model is made for. Differs: any size.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_flag, check_ints
from ...nn.layers import Patchify, PatchMerging
from ...nn.partition.swinv2 import CosineWindowAttention
from ...nn.released import Released
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage


def swinv2(
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int | Sequence[int] = 8,
    pretrained_windows: Sequence[int] = (0, 0, 0, 0),
    shifts: bool | Sequence[bool] = True,
    keep_shift: bool = False,
    global_blocks: Sequence[Sequence[int]] = ((), (), (), ()),
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    eps: float = 1e-5,
    pad: str = "mask",
    clip_windows: bool = True,
    length_eps: float = 0.0,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 256,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A Swin V2.

    Args:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths, num_heads: per stage.
        window_size: sides of windows, of all stages or per stage.
        pretrained_windows: per stage, the window that displacements are measured by; 0 for the model's own.
        shifts: whether windows of every second block are moved, in all stages or per stage.
        keep_shift: as of :class:`attnlib.nn.partition.swinv2.CosineWindowAttention`.
        global_blocks: per stage, which blocks attend to the whole map, from 0.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias, pad: as of :class:`attnlib.nn.partition.swinv2.CosineWindowAttention`.
        eps: of norms.
        length_eps: ``eps`` of attention; 5e-5 in Plain-DETR.
        clip_windows: windows are no larger than the maps of images of ``img_size``.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(depths)
    rows, columns = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
    sides = (rows, columns)
    sized = (window_size,) * count if isinstance(window_size, int) else tuple(window_size)
    moved = (shifts,) * count if isinstance(shifts, bool) else tuple(shifts)
    given: Sequence[Any]
    for name, given in (
        ("window_size", sized), ("pretrained_windows", pretrained_windows), ("shifts", moved),
        ("global_blocks", global_blocks),
    ):  # fmt: skip
        if len(given) != count:
            raise ValueError(f"{name}={tuple(given)} must have one entry for each of {count} stages")
    for i, flag in enumerate(moved):
        check_flag(f"shifts[{i}]", flag)
    norm = functools.partial(nn.LayerNorm, eps=eps)

    def own(place: Place) -> nn.Module:
        grid = [-(-side // (4 * 2**place.stage)) for side in sides]
        side = sized[place.stage]
        window = tuple(min(side, n) if clip_windows else side for n in grid)
        odd = place.block % 2 and moved[place.stage]
        return CosineWindowAttention(
            place.dim, place.num_heads, window, shift=tuple(w // 2 if odd else 0 for w in window),
            pretrained_window=pretrained_windows[place.stage], whole=place.block in global_blocks[place.stage],
            qkv_bias=qkv_bias, pad=pad, eps=length_eps, keep_shift=keep_shift,
        )  # fmt: skip

    make = mechanism or own
    dims = [embed_dim * 2**i for i in range(count)]
    reductions = [4 * 2**i for i in range(count)]
    stages = []
    for i, row in enumerate(places(dims, depths, num_heads, reductions, drop_path_rate)):
        blocks = [
            Block(p.dim, make(p), mlp_ratio=mlp_ratio, norm=norm, drop_path=p.drop_path, post_norm=True) for p in row
        ]
        stages.append(Stage(blocks, PatchMerging(dims[i - 1], norm=norm, norm_first=False) if i else None))
    model = Backbone(
        Patchify(in_chans, embed_dim, 4, norm=norm), stages, dims, reductions, norm(dims[-1]),
        Head(dims[-1], num_classes, global_pool, drop=drop_rate), num_classes, in_chans, sides,
    )  # fmt: skip
    init_weights(model, also=(CosineWindowAttention,))
    for stage in model.stages:
        for block in stage.blocks:  # type: ignore[union-attr]
            for part in (block.mixer, block.mlp):
                nn.init.zeros_(part.norm.weight)
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From timm's or the authors' ``SwinTransformerV2``, that of Plain-DETR or AiT's ``SwinV2TransformerRPE2FC``.

    ``model`` has the stages, or is their number.
    """
    stages = model if isinstance(model, int) else len(model.stages)
    theirs = Released(state_dict, "SwinTransformerV2")
    theirs.leave(r"layers\.\d+\.blocks\.\d+\.attn_mask", because="a constant of a size")
    behind = "layers.0.downsample.norm.weight" in theirs  # the authors merge behind a stage, timm before the next
    out = theirs.parts(
        r"layers\.(\d+)\.blocks\.(\d+)\.attn\.(.+)", r"stages.\1.blocks.\2.mixer.inner",
        CosineWindowAttention.convert_state_dict,
    )  # fmt: skip
    block = r"layers\.(\d+)\.blocks\.(\d+)"

    def merged(match: Any, value: Tensor) -> dict[str, Tensor]:
        return {f"stages.{int(match[1]) + behind}.downsample.{match[2]}": value}

    return theirs.close(
        out
        | theirs.renamed(
            {
                r"patch_embed\.(proj|norm)\.(weight|bias)": r"stem.\1.\2",
                rf"{block}\.norm1\.(weight|bias)": r"stages.\1.blocks.\2.mixer.norm.\3",
                rf"{block}\.norm2\.(weight|bias)": r"stages.\1.blocks.\2.mlp.norm.\3",
                rf"{block}\.mlp\.(fc[12]\.(?:weight|bias))": r"stages.\1.blocks.\2.mlp.inner.\3",
                r"layers\.(\d+)\.downsample\.((?:reduction|norm)\.(?:weight|bias))": merged,
                rf"norm{stages - 1}?\.(weight|bias)": r"norm.\1",
                r"head\.(?:fc\.)?(weight|bias)": r"head.fc.\1",
            }
        )
    )


_T: dict[str, Any] = {}
_S: dict[str, Any] = dict(depths=(2, 2, 18, 2))
_B: dict[str, Any] = _S | dict(embed_dim=128, num_heads=(4, 8, 16, 32))
_L: dict[str, Any] = _S | dict(embed_dim=192, num_heads=(6, 12, 24, 48))
_FROM_12: dict[str, Any] = dict(pretrained_windows=(12, 12, 12, 6))
_SIZES: dict[str, dict[str, Any]] = {
    "swinv2_tiny_window8_256": _T,
    "swinv2_tiny_window16_256": _T | dict(window_size=16),
    "swinv2_small_window8_256": _S,
    "swinv2_small_window16_256": _S | dict(window_size=16),
    "swinv2_base_window8_256": _B,
    "swinv2_base_window16_256": _B | dict(window_size=16),
    "swinv2_base_window12_192": _B | dict(window_size=12, img_size=192),
    "swinv2_base_window12to16_192to256": _B | _FROM_12 | dict(window_size=16),
    "swinv2_base_window12to24_192to384": _B | _FROM_12 | dict(window_size=24, img_size=384),
    "swinv2_large_window12_192": _L | dict(window_size=12, img_size=192),
    "swinv2_large_window12to16_192to256": _L | _FROM_12 | dict(window_size=16),
    "swinv2_large_window12to24_192to384": _L | _FROM_12 | dict(window_size=24, img_size=384),
}
_TAGS = {
    name: "ms_in22k" if "window12_192" in name else "ms_in22k_ft_in1k" if "12to" in name else "ms_in1k"
    for name in _SIZES
}
for _name in _SIZES:
    if "window12_192" in _name:
        _SIZES[_name] = _SIZES[_name] | dict(num_classes=21841)
register_models(
    "swinv2",
    swinv2,
    _SIZES,
    params={
        "swinv2_tiny_window8_256": 28_347_154,
        "swinv2_tiny_window16_256": 28_347_154,
        "swinv2_small_window8_256": 49_728_418,
        "swinv2_small_window16_256": 49_728_418,
        "swinv2_base_window8_256": 87_918_816,
        "swinv2_base_window16_256": 87_918_816,
        "swinv2_base_window12_192": 109_280_841,
        "swinv2_base_window12to16_192to256": 87_918_816,
        "swinv2_base_window12to24_192to384": 87_918_816,
        "swinv2_large_window12_192": 228_772_549,
        "swinv2_large_window12to16_192to256": 196_739_932,
        "swinv2_large_window12to24_192to384": 196_739_932,
    },
    license="MIT",
    source="microsoft/Swin-Transformer",
    weights={name: (f"timm/{name}.{tag}", "model.safetensors") for name, tag in _TAGS.items()},
    convert=convert,
    img_size={name: size.get("img_size", 256) for name, size in _SIZES.items()},
    data={"crop_pct": 0.9},
    data_of={name: {"crop_pct": 1.0} for name in _SIZES if name.endswith("384")},
)
