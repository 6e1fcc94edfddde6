"""Agent-DeiT: a plain vision transformer in whose first blocks patches and class token read a few pooled agents.

Han et al., 2023, "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874. Agents are
pooled from the patches alone; the class token reads and is read like a patch, with biases of its own. Tiny and small
have 49 agents in every block, base has 81 in the first four.

Differs from the authors' code: any size; tables of positions and the biases of agents are interpolated to the grid at
hand.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...checks import check_int
from ...nn.dense.softmax_attention import SoftmaxAttention
from ...nn.reduced.agent_attention import AgentAttention
from ...nn.released import Released
from ..blocks import Make, Place
from ..build import register_models
from . import vit as plain


def agent_deit(
    patch_size: int = 16,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    agent_blocks: int | None = None,
    num_agents: int = 49,
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
    """An Agent-DeiT.

    Args:
        patch_size: pixels per side of a patch.
        embed_dim, depth, num_heads: width, blocks, heads.
        agent_blocks: how many of the first blocks have agents, ``None`` for all; the others are plain attention.
        num_agents: agents, a square number.
        mlp_ratio: hidden width of MLPs over the width.
        qkv_bias: biases of the query, key and value projections.
        class_token, mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as of
            :func:`attnlib.models.backbones.vit.vit`.
    """
    check_int("patch_size", patch_size, least=1)
    if agent_blocks is not None:
        check_int("agent_blocks", agent_blocks, least=0)
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    grid = tuple(max(1, side // patch_size) for side in sides)

    def own(place: Place) -> nn.Module:
        if agent_blocks is None or place.block < agent_blocks:
            return AgentAttention(place.dim, place.num_heads, num_agents, grid, qkv_bias, extra_tokens=int(class_token))
        return SoftmaxAttention(place.dim, place.num_heads, qkv_bias=qkv_bias)

    model = plain.vit(
        patch_size, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, class_token=class_token,
        fc_norm=False, mechanism=mechanism or own, num_classes=num_classes, in_chans=in_chans, img_size=img_size,
        drop_path_rate=drop_path_rate, drop_rate=drop_rate, global_pool=global_pool,
    )  # fmt: skip
    model.antialias = False  # type: ignore[misc]
    plain.start(model, also=(AgentAttention, SoftmaxAttention))
    if model.cls_token is not None:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    return model


def _attention(held: dict[str, Tensor]) -> dict[str, Tensor]:
    cls: Any = AgentAttention if "an_bias" in held else SoftmaxAttention
    return dict(cls.convert_state_dict(held))


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``VisionTransformer``."""
    theirs = Released(state_dict, "Agent-DeiT")
    out = theirs.parts(r"blocks\.(\d+)\.attn\.(.+)", r"stages.\1.mixer.inner", _attention)
    return out | plain.convert({name: theirs.take(name) for name in theirs}, model)


_SIZES: dict[str, dict[str, Any]] = {
    "agent_deit_tiny": dict(embed_dim=192, num_heads=3),
    "agent_deit_small": dict(embed_dim=384, num_heads=6, drop_path_rate=0.1),
    "agent_deit_base": dict(embed_dim=768, num_heads=12, agent_blocks=4, num_agents=81, drop_path_rate=0.3),
    "agent_deit_small_448": dict(embed_dim=384, num_heads=6, drop_path_rate=0.1, img_size=448),
}

register_models(
    "agent-attention",
    agent_deit,
    _SIZES,
    params={
        "agent_deit_tiny": 6_015_640, "agent_deit_small": 22_647_112, "agent_deit_base": 87_204_904,
        "agent_deit_small_448": 23_070_472,
    },
    source="LeapLabTHU/Agent-Attention",
    convert=convert,
    img_size={"agent_deit_small_448": 448},
    data={"crop_pct": 0.875, "crop_mode": "squash"},
)  # fmt: skip
