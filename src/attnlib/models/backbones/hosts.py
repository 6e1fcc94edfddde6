"""Hosts that papers put their attention into: pyramids of PVT, Swin and CSWin around any mechanism.

A paper's model is a host with a mechanism of its own in some blocks; the others keep the attention of the host: shifted
windows of Swin, stripes of CSWin. Positions, windows and stripes go on at any size of images.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_ints
from ...nn.dense.attention_lepe import AttentionLePE
from ...nn.layers import Patchify, PatchMerging, PositionTable
from ...nn.partition.cswin import CrossShapedAttention
from ...nn.partition.maxvit import PartitionAttention
from ...nn.released import Released, Rule
from ..blocks import Block, Chain, Make, Norm, Place, check_stages, init_weights, places
from .stages import Backbone, Head, Stage
from .vit import grid_of

#: How many of the first blocks of each stage have the paper's mechanism; ``None`` for all.
Blocks = Sequence[int | None]

#: Mechanisms of the hosts themselves, which start like their hosts.
OWN: tuple[type[nn.Module], ...] = (PartitionAttention, CrossShapedAttention, AttentionLePE)


def sides(img_size: int | tuple[int, int], count: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Sides of images, and of the maps of ``count`` stages."""
    image = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
    return (image[0], image[1]), [(-(-image[0] // 2**i), -(-image[1] // 2**i)) for i in range(2, 2 + count)]


def per_stage(name: str, given: Sequence[Any], count: int) -> list[Any]:
    """One entry for each stage, checked."""
    check_stages(count, **{name: given})
    return list(given)


def among_first(place: Place, blocks: Blocks) -> bool:
    """Whether a block is one of the first that ``blocks`` counts in its stage."""
    most = blocks[place.stage]
    return most is None or place.block < most


def shifted_windows(place: Place, window_size: int, grid: tuple[int, int], qkv_bias: bool = True) -> nn.Module:
    """Swin's own attention: windows, every second block shifted by half of one."""
    side = min(window_size, *grid)
    shift = side // 2 if place.block % 2 else 0
    return PartitionAttention(place.dim, place.num_heads, side, rank=2, qkv_bias=qkv_bias, shift=shift)


def stripes(place: Place, split: int | None, grid: tuple[int, int], last: bool, qkv_bias: bool = True) -> nn.Module:
    """CSWin's own attention: stripes, or the whole map where these are as wide, as in the last stage."""
    if last or split is None or split >= min(grid):
        return AttentionLePE(place.dim, place.num_heads, 3, "value", qkv_bias)
    return CrossShapedAttention(place.dim, place.num_heads, split, qkv_bias=qkv_bias)


def _pyramid(
    rows: Sequence[Sequence[Place]],
    make: Make,
    stem: nn.Module,
    between: Callable[[int, int, int], nn.Module],
    mlp_ratios: Sequence[float],
    norm: Norm,
    last_norm: nn.Module | None,
    also: tuple[type[nn.Module], ...],
    num_classes: int,
    in_chans: int,
    img_size: tuple[int, int],
    drop_rate: float,
    global_pool: str,
) -> Backbone:
    """A backbone of plain blocks; ``between(stage, dim, out_dim)`` makes what lies before a stage."""
    stages, dims = [], [row[0].dim for row in rows]
    for i, row in enumerate(rows):
        blocks = [Block(p.dim, make(p), mlp_ratio=mlp_ratios[i], norm=norm, drop_path=p.drop_path) for p in row]
        for block in blocks:
            if getattr(block.mixer.inner, "pre_norm", False):  # it has a norm of its own
                block.mixer.norm = nn.Identity()
        stages.append(Stage(blocks, between(i, dims[i - 1], dims[i]) if i else None))
    head = Head(dims[-1], num_classes, global_pool, None, drop_rate)
    reductions = [row[0].stride for row in rows]
    model = Backbone(stem, stages, dims, reductions, last_norm, head, num_classes, in_chans, img_size)
    init_weights(model, also=(*OWN, *also))
    return model


def _rows(
    dims: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], drop_path_rate: float
) -> list[list[Place]]:
    return places(dims, depths, num_heads, [4 * 2**i for i in range(len(dims))], drop_path_rate)


def pvt(
    make: Make,
    maps: Sequence[tuple[int, int]],
    embed_dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float],
    drop_path_rate: float,
    in_chans: int,
    also: tuple[type[nn.Module], ...] = (),
    **rest: Any,
) -> Backbone:
    """PVT: patches of 4 x 4, then of 2 x 2, a table of positions before every stage, no norm at the end.

    Args:
        make: the mechanism of each place.
        maps: sides of the maps of each stage, for the tables.
        also: mechanisms that start from truncated normal weights, like the host.
        rest: ``num_classes``, ``img_size``, ``drop_rate`` and ``global_pool`` of a backbone.
    """
    mlps = per_stage("mlp_ratios", mlp_ratios, len(embed_dims))

    def embed(stage: int, dim: int, out_dim: int) -> nn.Module:
        return Chain(Patchify(dim, out_dim, 2 if stage else 4), PositionTable(out_dim, maps[stage]))

    model = _pyramid(
        _rows(embed_dims, depths, num_heads, drop_path_rate), make, embed(0, in_chans, embed_dims[0]), embed, mlps,
        functools.partial(nn.LayerNorm, eps=1e-6), None, also, in_chans=in_chans, **rest,
    )  # fmt: skip
    model.input_name = "stem.0.proj.weight"
    return model


def swin(
    make: Make,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    drop_path_rate: float,
    in_chans: int,
    also: tuple[type[nn.Module], ...] = (),
    **rest: Any,
) -> Backbone:
    """Swin: patches of 4 x 4, merged by 2 x 2 between stages. Arguments as of :func:`pvt`."""

    def merge(stage: int, dim: int, out_dim: int) -> nn.Module:
        return PatchMerging(dim, out_dim)

    dims = [embed_dim * 2**i for i in range(len(depths))]
    return _pyramid(
        _rows(dims, depths, num_heads, drop_path_rate), make, Patchify(in_chans, embed_dim, 4), merge,
        [mlp_ratio] * len(depths), nn.LayerNorm, nn.LayerNorm(dims[-1]), also, in_chans=in_chans, **rest,
    )  # fmt: skip


def cswin(
    make: Make,
    embed_dim: int,
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratio: float,
    drop_path_rate: float,
    in_chans: int,
    also: tuple[type[nn.Module], ...] = (),
    **rest: Any,
) -> Backbone:
    """CSWin: overlapping 7 x 7 patches, 3 x 3 convolutions between stages. Arguments as of :func:`pvt`."""

    def merge(stage: int, dim: int, out_dim: int) -> nn.Module:
        return Patchify(dim, out_dim, 3, 2, 1)

    dims = [embed_dim * 2**i for i in range(len(depths))]
    return _pyramid(
        _rows(dims, depths, num_heads, drop_path_rate), make, Patchify(in_chans, embed_dim, 7, 4, 2), merge,
        [mlp_ratio] * len(depths), nn.LayerNorm, nn.LayerNorm(dims[-1]), also, in_chans=in_chans, **rest,
    )  # fmt: skip


# ---- weights

Attention = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def own_attention(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention part of a block that keeps the attention of its host."""
    convert: Any = PartitionAttention.convert_state_dict
    if "attns.1.get_v.weight" in held:
        convert = CrossShapedAttention.convert_state_dict
    elif "attns.0.get_v.weight" in held:
        held = {name.replace("attns.0.get_v", "lepe"): value for name, value in held.items()}
        convert = AttentionLePE.convert_state_dict
    else:
        held = {f"rel_pos.{n}" if n.startswith("relative_") else n: value for n, value in held.items()}
    return dict(convert(held))


def _at(match: Any) -> str:
    """Where the layers before stage ``match[1]``, counted from 1, lie."""
    return "stem" if match[1] == "1" else f"stages.{int(match[1]) - 1}.downsample"


def _moved(theirs: Released, pattern: str) -> dict[str, Tensor]:
    """Entries whose first number counts stages from 1, with names that count from 0: ``stage1.0.x`` -> ``0.0.x``."""
    return {f"{int(m[1]) - 1}.{m[2]}": value for m, value in theirs.matching(pattern)}


def _blocks(held: dict[str, Tensor], source: str, pattern: str, attention: Attention) -> dict[str, Tensor]:
    """Blocks ``<stage>.<block>.*``; ``pattern`` stands before names of their attention."""
    if not held:
        return {}
    theirs = Released(held, f"blocks of {source}")
    block, ours = r"(\d+)\.(\d+)", r"stages.\1.blocks.\2"
    theirs.leave(rf"{block}\.attn_mask", because="a constant of one size of images")
    out = theirs.parts(rf"{block}\.{pattern}(.+)", f"{ours}.mixer.inner", attention)
    rules: dict[str, Rule] = {
        rf"{block}\.norm1\.(weight|bias)": rf"{ours}.mixer.norm.\3",
        rf"{block}\.norm2\.(weight|bias)": rf"{ours}.mlp.norm.\3",
        rf"{block}\.mlp\.(fc[12])\.(weight|bias)": rf"{ours}.mlp.inner.\3.\4",
    }
    return theirs.close(out | theirs.renamed(rules))


def convert_pvt(state_dict: dict[str, Tensor], source: str, attention: Attention) -> dict[str, Tensor]:
    """From a ``PyramidVisionTransformer``.

    Args:
        state_dict: theirs.
        source: the paper's name of the model, for errors.
        attention: converts the attention part of a block.
    """
    theirs = Released(state_dict, source)
    blocks = _moved(theirs, r"block(\d+)\.(\d+\..+)")
    out = theirs.renamed(
        {
            r"patch_embed(\d+)\.(proj|norm)\.(weight|bias)": lambda m, value: {f"{_at(m)}.0.{m[2]}.{m[3]}": value},
            r"pos_embed(\d+)": lambda m, value: {f"{_at(m)}.1.pos_embed": grid_of(value, 0)[1]},
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out | _blocks(blocks, source, r"attn\.", attention))


def convert_swin(state_dict: dict[str, Tensor], source: str, attention: Attention) -> dict[str, Tensor]:
    """From a ``SwinTransformer``; arguments as of :func:`convert_pvt`."""
    theirs = Released(state_dict, source)
    blocks = {f"{m[1]}.{m[2]}": value for m, value in theirs.matching(r"layers\.(\d+)\.blocks\.(\d+\..+)")}
    out = theirs.renamed(
        {
            r"patch_embed\.(proj|norm)\.(weight|bias)": r"stem.\1.\2",
            # Theirs end a stage with what ours begin the next one with.
            r"layers\.(\d+)\.downsample\.(norm|reduction)\.(weight|bias)": lambda m, value: {
                f"stages.{int(m[1]) + 1}.downsample.{m[2]}.{m[3]}": value
            },
            r"norm\.(weight|bias)": r"norm.\1",
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out | _blocks(blocks, source, r"attn\.", attention))


def convert_cswin(state_dict: dict[str, Tensor], source: str, attention: Attention) -> dict[str, Tensor]:
    """From a ``CSWinTransformer``; arguments as of :func:`convert_pvt`."""
    theirs = Released(state_dict, source)
    blocks = _moved(theirs, r"stage(\d+)\.(\d+\..+)")
    out = theirs.renamed(
        {
            r"stage1_conv_embed\.0\.(weight|bias)": r"stem.proj.\1",
            r"stage1_conv_embed\.2\.(weight|bias)": r"stem.norm.\1",
            r"merge(\d+)\.conv\.(weight|bias)": r"stages.\1.downsample.proj.\2",
            r"merge(\d+)\.norm\.(weight|bias)": r"stages.\1.downsample.norm.\2",
            r"norm\.(weight|bias)": r"norm.\1",
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out | _blocks(blocks, source, r"(?=qkv\.|attns\.|proj\.)", attention))
