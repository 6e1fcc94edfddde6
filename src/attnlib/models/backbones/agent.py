"""Agent-PVT, Agent-Swin and Agent-CSWin: pyramids whose early stages read a few pooled agents instead of every token.

Han et al., 2023, "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. Each is its
host with :class:`attnlib.nn.reduced.agent_attention.AgentAttention` in some of its blocks, over the whole map where the
host has windows; the others keep the attention of the host: shifted windows of Swin, stripes of CSWin. In the released
models 9, 16, 49 and 49 agents stand in the four stages.

Differs from the authors' code: any size. What is tied to the size of training images is interpolated: tables of
positions and the biases of agents. Windows and stripes that do not divide a map are padded with tokens that nobody
attends to; an odd row or column before patches are merged is completed with zeros.
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
from ...nn.reduced.agent_attention import AgentAttention
from ...nn.released import Released, Rule
from ..blocks import Block, Chain, Make, Norm, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage
from .vit import grid_of

#: How many of the first blocks of each stage have agents; ``None`` for all.
Blocks = Sequence[int | None]

_OWN = (AgentAttention, PartitionAttention, CrossShapedAttention, AttentionLePE)


def _sides(img_size: int | tuple[int, int], count: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Sides of images, and of the maps of ``count`` stages."""
    image = check_ints("img_size", (img_size,) * 2 if isinstance(img_size, int) else img_size, least=1)
    return (image[0], image[1]), [(-(-image[0] // 2**i), -(-image[1] // 2**i)) for i in range(2, 2 + count)]


def _per_stage(name: str, given: Sequence[Any], count: int) -> list[Any]:
    if isinstance(given, (int, str)) or len(given) != count:
        raise ValueError(f"{name}={given!r} must have one number for each of {count} stages")
    return list(given)


def _has_agents(place: Place, agent_blocks: Sequence[int | None]) -> bool:
    most = agent_blocks[place.stage]
    return most is None or place.block < most


def _pyramid(
    rows: Sequence[Sequence[Place]],
    make: Make,
    stem: nn.Module,
    between: Callable[[int, int, int], nn.Module],
    mlp_ratios: Sequence[float],
    norm: Norm,
    last_norm: nn.Module | None,
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
        stages.append(Stage(blocks, between(i, dims[i - 1], dims[i]) if i else None))
    head = Head(dims[-1], num_classes, global_pool, None, drop_rate)
    reductions = [row[0].stride for row in rows]
    model = Backbone(stem, stages, dims, reductions, last_norm, head, num_classes, in_chans, img_size)
    init_weights(model, also=_OWN)
    return model


def agent_pvt(
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 4, 6, 3),
    num_heads: Sequence[int] = (1, 2, 5, 8),
    mlp_ratios: Sequence[float] = (8, 8, 4, 4),
    num_agents: Sequence[int] = (9, 16, 49, 49),
    sr_ratios: Sequence[int] = (1, 1, 1, 1),
    qkv_bias: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An Agent-PVT: patches of 4 x 4, then of 2 x 2, a table of positions before every stage, no norm at the end.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        num_agents: agents per stage, square numbers.
        sr_ratios: reduction of keys and values per side, per stage.
        qkv_bias: biases of the query, key and value projections.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(embed_dims)
    image, maps = _sides(img_size, count)
    agents = _per_stage("num_agents", num_agents, count)
    ratios = _per_stage("sr_ratios", sr_ratios, count)
    mlps = _per_stage("mlp_ratios", mlp_ratios, count)

    def own(place: Place) -> nn.Module:
        return AgentAttention(
            place.dim, place.num_heads, agents[place.stage], maps[place.stage], qkv_bias, ratios[place.stage]
        )

    def embed(stage: int, dim: int, out_dim: int) -> nn.Module:
        return Chain(Patchify(dim, out_dim, 2 if stage else 4), PositionTable(out_dim, maps[stage]))

    rows = places(embed_dims, depths, num_heads, [4 * 2**i for i in range(count)], drop_path_rate)
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    stem = embed(0, in_chans, embed_dims[0])
    model = _pyramid(
        rows, mechanism or own, stem, embed, mlps, norm, None, num_classes, in_chans, image, drop_rate, global_pool
    )
    model.input_name = "stem.0.proj.weight"
    return model


def agent_swin(
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    agent_blocks: Blocks = (None, None, None, 0),
    num_agents: Sequence[int] = (9, 16, 49, 49),
    agent_window: int | None = None,
    window_size: int | None = None,
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
    """An Agent-Swin: patches of 4 x 4, merged by 2 x 2 between stages; the last stages keep shifted windows.

    Args:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        agent_blocks: how many of the first blocks of each stage have agents, ``None`` for all.
        num_agents: agents per stage, square numbers.
        agent_window: sides of windows with agents of their own, every second one shifted by half a window (without a
            mask, as the authors'); ``None`` for the whole map.
        window_size: sides of the other windows; an eighth of the first map, and at least 7, by default.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: biases of the query, key and value projections.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(depths)
    image, maps = _sides(img_size, count)
    agents, which = _per_stage("num_agents", num_agents, count), _per_stage("agent_blocks", agent_blocks, count)
    if window_size is None:
        window_size = max(7, min(maps[0] if agent_window is None else (agent_window,)) // 8)

    def own(place: Place) -> nn.Module:
        grid, odd = maps[place.stage], place.block % 2
        if _has_agents(place, which):
            window = None if agent_window is None or agent_window >= min(grid) else agent_window
            return AgentAttention(
                place.dim, place.num_heads, agents[place.stage], grid, qkv_bias, window_size=window,
                shift_size=window // 2 if window and odd else 0,
            )  # fmt: skip
        side = min(window_size, *grid)
        return PartitionAttention(
            place.dim, place.num_heads, side, rank=2, qkv_bias=qkv_bias, shift=side // 2 if odd else 0
        )

    def merge(stage: int, dim: int, out_dim: int) -> nn.Module:
        return PatchMerging(dim, out_dim)

    dims = [embed_dim * 2**i for i in range(count)]
    rows = places(dims, depths, num_heads, [4 * 2**i for i in range(count)], drop_path_rate)
    return _pyramid(
        rows, mechanism or own, Patchify(in_chans, embed_dim, 4), merge, [mlp_ratio] * count, nn.LayerNorm,
        nn.LayerNorm(dims[-1]), num_classes, in_chans, image, drop_rate, global_pool,
    )  # fmt: skip


def agent_cswin(
    embed_dim: int = 64,
    depths: Sequence[int] = (2, 4, 18, 1),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    agent_blocks: Blocks = (None, None, 0, 0),
    num_agents: Sequence[int] = (9, 16, 49, 49),
    agent_split: Sequence[int | None] | None = None,
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
    """An Agent-CSWin: overlapping 7 x 7 patches, 3 x 3 convolutions between stages; stripes, and a dense last stage.

    Args:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks per stage.
        num_heads: heads per stage, even numbers where there are stripes.
        agent_blocks: how many of the first blocks of each stage have agents, ``None`` for all.
        num_agents: agents per stage, square numbers.
        agent_split: width of stripes with agents of their own, per stage; ``None`` for the whole map.
        split_size: width of the other stripes, per stage; the last stage has none.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: biases of the query, key and value projections.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(depths)
    image, maps = _sides(img_size, count)
    agents, which = _per_stage("num_agents", num_agents, count), _per_stage("agent_blocks", agent_blocks, count)
    splits = _per_stage("split_size", split_size, count)
    agent_splits = _per_stage("agent_split", (None,) * count if agent_split is None else agent_split, count)

    def own(place: Place) -> nn.Module:
        (height, width), last = maps[place.stage], place.stage == count - 1
        agent = _has_agents(place, which)
        split = agent_splits[place.stage] if agent else splits[place.stage]
        whole = last or split is None or split >= min(height, width)
        if agent:
            stripes = None if whole else ((height, split), (split, width))
            return AgentAttention(
                place.dim, place.num_heads, agents[place.stage], (height, width), qkv_bias, window_size=stripes
            )
        if whole:
            return AttentionLePE(place.dim, place.num_heads, 3, "value", qkv_bias)
        return CrossShapedAttention(place.dim, place.num_heads, split, qkv_bias=qkv_bias)

    def merge(stage: int, dim: int, out_dim: int) -> nn.Module:
        return Patchify(dim, out_dim, 3, 2, 1)

    dims = [embed_dim * 2**i for i in range(count)]
    rows = places(dims, depths, num_heads, [4 * 2**i for i in range(count)], drop_path_rate)
    return _pyramid(
        rows, mechanism or own, Patchify(in_chans, embed_dim, 7, 4, 2), merge, [mlp_ratio] * count, nn.LayerNorm,
        nn.LayerNorm(dims[-1]), num_classes, in_chans, image, drop_rate, global_pool,
    )  # fmt: skip


# ---- weights


def _attention(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention part of any of their blocks."""
    convert: Any = AgentAttention.convert_state_dict
    if not any(name.endswith("an_bias") for name in held):
        if "attns.1.get_v.weight" in held:
            convert = CrossShapedAttention.convert_state_dict
        elif "attns.0.get_v.weight" in held:
            held = {name.replace("attns.0.get_v", "lepe"): value for name, value in held.items()}
            convert = AttentionLePE.convert_state_dict
        else:
            held = {f"rel_pos.{n}" if n.startswith("relative_") else n: value for n, value in held.items()}
            convert = PartitionAttention.convert_state_dict
    return dict(convert(held))


def _at(match: Any) -> str:
    """Where the layers before stage ``match[1]``, counted from 1, lie."""
    return "stem" if match[1] == "1" else f"stages.{int(match[1]) - 1}.downsample"


def _moved(theirs: Released, pattern: str) -> dict[str, Tensor]:
    """Entries whose first number counts stages from 1, with names that count from 0: ``stage1.0.x`` -> ``0.0.x``."""
    return {f"{int(m[1]) - 1}.{m[2]}": value for m, value in theirs.matching(pattern)}


def convert_pvt(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``PyramidVisionTransformer``."""
    theirs = Released(state_dict, "Agent-PVT")
    blocks = _moved(theirs, r"block(\d+)\.(\d+\..+)")
    out = theirs.renamed(
        {
            r"patch_embed(\d+)\.(proj|norm)\.(weight|bias)": lambda m, value: {f"{_at(m)}.0.{m[2]}.{m[3]}": value},
            r"pos_embed(\d+)": lambda m, value: {f"{_at(m)}.1.pos_embed": grid_of(value, 0)[1]},
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out | (_blocks(blocks, r"attn\.") if blocks else {}))


def _blocks(held: dict[str, Tensor], attention: str) -> dict[str, Tensor]:
    """Blocks ``<stage>.<block>.*``; ``attention`` is the pattern before names of their attention."""
    theirs = Released(held, "blocks of Agent-PVT, Agent-Swin or Agent-CSWin")
    block, ours = r"(\d+)\.(\d+)", r"stages.\1.blocks.\2"
    theirs.leave(rf"{block}\.attn_mask", because="a constant of one size of images")
    out = theirs.parts(rf"{block}\.{attention}(.+)", f"{ours}.mixer.inner", _attention)
    rules: dict[str, Rule] = {
        rf"{block}\.norm1\.(weight|bias)": rf"{ours}.mixer.norm.\3",
        rf"{block}\.norm2\.(weight|bias)": rf"{ours}.mlp.norm.\3",
        rf"{block}\.mlp\.(fc[12])\.(weight|bias)": rf"{ours}.mlp.inner.\3.\4",
    }
    return theirs.close(out | theirs.renamed(rules))


def convert_swin(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``AgentSwinTransformer``."""
    theirs = Released(state_dict, "Agent-Swin")
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
    return theirs.close(out | (_blocks(blocks, r"attn\.") if blocks else {}))


def convert_cswin(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``CSWinTransformer``."""
    theirs = Released(state_dict, "Agent-CSWin")
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
    return theirs.close(out | (_blocks(blocks, r"(?=qkv\.|attns\.|proj\.)") if blocks else {}))


# ---- sizes

_SWIN: dict[str, dict[str, Any]] = {
    "agent_swin_tiny": dict(drop_path_rate=0.2),
    "agent_swin_small": dict(depths=(2, 2, 18, 2), agent_blocks=(None, None, 0, 0), drop_path_rate=0.3),
    "agent_swin_base": dict(
        embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), agent_blocks=(None, None, 2, 0),
        drop_path_rate=0.5,
    ),
}  # fmt: skip
_SWIN["agent_swin_small_288"] = {**_SWIN["agent_swin_small"], "img_size": 288}
_SWIN["agent_swin_base_384"] = {**_SWIN["agent_swin_base"], "img_size": 384}

_CSWIN: dict[str, dict[str, Any]] = {
    "agent_cswin_tiny": dict(drop_path_rate=0.2),
    "agent_cswin_small": dict(depths=(3, 6, 29, 2), drop_path_rate=0.4),
    "agent_cswin_base": dict(embed_dim=96, depths=(3, 6, 29, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
}
_CSWIN["agent_cswin_base_384"] = {
    **_CSWIN["agent_cswin_base"], "split_size": (1, 2, 12, 12), "drop_path_rate": 0.7, "img_size": 384
}  # fmt: skip

_PVT: dict[str, dict[str, Any]] = {
    "agent_pvt_tiny": dict(depths=(2, 2, 2, 2), drop_path_rate=0.1),
    "agent_pvt_small": dict(depths=(3, 4, 6, 3), drop_path_rate=0.1),
    "agent_pvt_medium": dict(depths=(3, 4, 18, 3), drop_path_rate=0.3),
    "agent_pvt_large": dict(depths=(3, 8, 27, 3), drop_path_rate=0.3),
}
_PVT["agent_pvt_medium_256"] = {**_PVT["agent_pvt_medium"], "img_size": 256}

PARAMS = {
    "agent_pvt_tiny": 11_570_352, "agent_pvt_small": 20_635_066, "agent_pvt_medium": 35_921_746,
    "agent_pvt_large": 48_738_180, "agent_pvt_medium_256": 36_083_682, "agent_swin_tiny": 28_902_964,
    "agent_swin_small": 49_666_684, "agent_swin_base": 88_095_096, "agent_swin_small_288": 49_707_964,
    "agent_swin_base_384": 88_305_016, "agent_cswin_tiny": 20_458_672, "agent_cswin_small": 32_814_100,
    "agent_cswin_base": 73_249_696, "agent_cswin_base_384": 73_328_416,
}  # fmt: skip

_HOSTS: tuple[tuple[Any, dict[str, dict[str, Any]], Any], ...] = (
    (agent_pvt, _PVT, convert_pvt), (agent_swin, _SWIN, convert_swin), (agent_cswin, _CSWIN, convert_cswin)
)  # fmt: skip
for _make, _sizes, _convert in _HOSTS:
    register_models(
        "agent-attention",
        _make,
        _sizes,
        params={name: PARAMS[name] for name in _sizes},
        source="LeapLabTHU/Agent-Attention",
        convert=_convert,
        img_size={name: size.get("img_size", 224) for name, size in _sizes.items()},
        data={"crop_pct": 0.875, "crop_mode": "squash"},
        data_of={name: {"crop_pct": 1.0} for name in ("agent_swin_small_288", "agent_swin_base_384")},
    )
