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

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...nn.reduced.agent_attention import AgentAttention
from ..blocks import Make, Place
from ..build import register_models
from . import hosts
from .hosts import Blocks, among_first, per_stage, sides
from .stages import Backbone

_OWN = (AgentAttention,)


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
    image, maps = sides(img_size, count)
    agents = per_stage("num_agents", num_agents, count)
    ratios = per_stage("sr_ratios", sr_ratios, count)

    def own(place: Place) -> nn.Module:
        return AgentAttention(
            place.dim, place.num_heads, agents[place.stage], maps[place.stage], qkv_bias, ratios[place.stage]
        )

    return hosts.pvt(
        mechanism or own, maps, embed_dims, depths, num_heads, mlp_ratios, drop_path_rate, in_chans, _OWN,
        num_classes=num_classes, img_size=image, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip


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
    image, maps = sides(img_size, count)
    agents, which = per_stage("num_agents", num_agents, count), per_stage("agent_blocks", agent_blocks, count)
    if window_size is None:
        window_size = max(7, min(maps[0] if agent_window is None else (agent_window,)) // 8)

    def own(place: Place) -> nn.Module:
        grid, odd = maps[place.stage], place.block % 2
        if among_first(place, which):
            window = None if agent_window is None or agent_window >= min(grid) else agent_window
            return AgentAttention(
                place.dim, place.num_heads, agents[place.stage], grid, qkv_bias, window_size=window,
                shift_size=window // 2 if window and odd else 0,
            )  # fmt: skip
        return hosts.shifted_windows(place, window_size, grid, qkv_bias)

    return hosts.swin(
        mechanism or own, embed_dim, depths, num_heads, mlp_ratio, drop_path_rate, in_chans, _OWN,
        num_classes=num_classes, img_size=image, drop_rate=drop_rate, global_pool=global_pool,
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
    image, maps = sides(img_size, count)
    agents, which = per_stage("num_agents", num_agents, count), per_stage("agent_blocks", agent_blocks, count)
    splits = per_stage("split_size", split_size, count)
    agent_splits = per_stage("agent_split", (None,) * count if agent_split is None else agent_split, count)

    def own(place: Place) -> nn.Module:
        (height, width), last = maps[place.stage], place.stage == count - 1
        if not among_first(place, which):
            return hosts.stripes(place, splits[place.stage], (height, width), last, qkv_bias)
        split = agent_splits[place.stage]
        whole = last or split is None or split >= min(height, width)
        stripes = None if whole else ((height, split), (split, width))
        return AgentAttention(
            place.dim, place.num_heads, agents[place.stage], (height, width), qkv_bias, window_size=stripes
        )

    return hosts.cswin(
        mechanism or own, embed_dim, depths, num_heads, mlp_ratio, drop_path_rate, in_chans, _OWN,
        num_classes=num_classes, img_size=image, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip


# ---- weights


def _attention(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention part of any of their blocks."""
    agents = any(name.endswith("an_bias") for name in held)
    return dict(AgentAttention.convert_state_dict(held)) if agents else hosts.own_attention(held)


def convert_pvt(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``PyramidVisionTransformer``."""
    return hosts.convert_pvt(state_dict, "Agent-PVT", _attention)


def convert_swin(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``AgentSwinTransformer``."""
    return hosts.convert_swin(state_dict, "Agent-Swin", _attention)


def convert_cswin(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``CSWinTransformer``."""
    return hosts.convert_cswin(state_dict, "Agent-CSWin", _attention)


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
