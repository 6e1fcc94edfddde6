"""EVA: a plain vision transformer of a billion parameters, pretrained to predict features of another model.

Fang et al., 2022, "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale", arXiv 2211.07636:
ViT-g with 14 x 14 patches whose attention has no key bias (:mod:`attnlib.nn.dense.eva`); the classifier pools the
patches and norms their mean. How it is pretrained is :mod:`attnlib.models.pretrain`.

Fang et al., 2023, "EVA-02: A Visual Representation for Neon Genesis", arXiv 2303.11331: gated MLPs (SwiGLU) of two
thirds of the usual hidden width, in base and large with a norm of the hidden layer (sub-LN), and rotary positions
beside the table of positions. For CLIP (Sun et al., 2023, arXiv 2303.15389) attention norms its output too, or, in the
enormous model, norms stand behind plain sublayers.

Differs from the authors' class: any size, as :mod:`attnlib.models.backbones.vit`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_real
from ...nn.dense.eva import EvaAttention
from ..blocks import Make
from ..build import register_models
from ..pretrain import MaskedPretraining
from . import vit as plain
from .vit import VisionTransformer, vit

#: Which tables of relative positions a model can have.
RELATIVE = (None, "table", "axes", "shared", "shared-axes")


def eva(
    embed_dim: int = 1408,
    depth: int = 40,
    num_heads: int = 16,
    mlp_ratio: float = 6144 / 1408,
    patch_size: int = 14,
    qkv_bias: bool = True,
    relative: str | None = None,
    rotary: float | None = None,
    rotary_grid: Sequence[int] | None = None,
    inner_norm: bool = False,
    head_scale: float = 0.001,
    rescale: bool = True,
    mechanism: Make | None = None,
    img_size: int | tuple[int, int] = 224,
    global_pool: str = "avg",
    proj_drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    **settings: Any,
) -> VisionTransformer:
    """An EVA, or an EVA-02.

    Args:
        embed_dim, depth, num_heads, mlp_ratio, patch_size, rescale, img_size, global_pool, proj_drop_rate,
            attn_drop_rate: as of :func:`attnlib.models.backbones.vit.vit`.
        qkv_bias: biases of the query and the value projections.
        relative: tables of relative positions: ``None``, in every block (``"table"``; ``"axes"``: one per axis, added
            up), or the same for all blocks (``"shared"``, ``"shared-axes"``).
        rotary, rotary_grid, inner_norm: as of :class:`attnlib.nn.dense.eva.EvaAttention`.
        head_scale: what the head's first weights are multiplied with.
        mechanism: as in :func:`attnlib.create_model`.
        settings: of :func:`attnlib.models.backbones.vit.vit`.
    """
    check_choice("relative", relative, RELATIVE)
    check_real("head_scale", head_scale, least=0)
    sides = (img_size,) * 2 if isinstance(img_size, int) else img_size
    grid = tuple(max(1, side // patch_size) for side in sides)
    kind = None if relative is None else "axes" if relative.endswith("axes") else "table"

    def own(place: Any) -> nn.Module:
        return EvaAttention(
            place.dim, place.num_heads, qkv_bias=qkv_bias, relative=kind, grid=grid, attn_drop=attn_drop_rate,
            proj_drop=proj_drop_rate, rotary=rotary, rotary_grid=rotary_grid, inner_norm=inner_norm,
        )  # fmt: skip

    model = vit(
        patch_size, embed_dim, depth, num_heads, mlp_ratio, mechanism=mechanism or own, img_size=img_size,
        global_pool=global_pool, proj_drop_rate=proj_drop_rate, gates=False, **settings,
    )  # fmt: skip
    if relative is not None and relative.startswith("shared") and mechanism is None:
        first, *others = [block.mixer.inner for block in cast(Any, model.stages)]
        for mixer in others:
            mixer.relative = first.relative
    plain.start(model, rescale, also=(EvaAttention,), gates=False)
    if model.cls_token is not None:
        nn.init.trunc_normal_(model.cls_token, std=0.02)
    if isinstance(model.head.fc, nn.Linear):
        with torch.no_grad():
            model.head.fc.weight.mul_(head_scale)
    return model


def convert(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """From the authors' ``VisionTransformer``, the encoder of their ``VisionTransformerForMaskedImageModeling``, or
    timm's ``Eva`` and ``VisionTransformer``.
    """
    inner = model.stages[0].mixer.inner
    shared = {k: v for k, v in state_dict.items() if k.removeprefix("module.").startswith("rel_pos_bias.")}
    state_dict = {k: v for k, v in state_dict.items() if k not in shared}
    for block in range(len(model.stages)):
        state_dict |= {f"blocks.{block}.attn.{k.removeprefix('module.')}": v for k, v in shared.items()}
    table = getattr(inner, "relative", None)
    options = {"grid": table.grid} if isinstance(inner, EvaAttention) and table is not None else {}
    return plain.convert(state_dict, model, options)


def eva_pretraining(model: VisionTransformer, teacher: Any, target_dim: int = 768, std: float = 0.015) -> Any:
    """EVA's pretraining of a model: its initial weights, a mask token, a linear map to the teacher's features.

    All weights start from a normal distribution that is cut off at one standard deviation, as the authors' class has
    it; output projections of block l are divided by sqrt(2 l).

    Args:
        model: with a norm behind its blocks: ``global_pool="token"``, or ``fc_norm=False``.
        teacher: as of :class:`attnlib.models.pretrain.MaskedPretraining`.
        target_dim: width of the teacher's features.
        std: of initial weights.
    """
    step = MaskedPretraining(model, teacher, target_dim)
    check_real("std", std, above=0)

    def cut(weight: Tensor | None) -> None:
        if weight is not None:
            nn.init.trunc_normal_(weight, std=std, a=-std, b=std)

    for module in step.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            cut(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in (model.cls_token, model.reg_token, model.pos_embed, model.prefix_pos_embed, step.mask_token):
        cut(token)
    plain.divide(model)
    return step


_GIANT: dict[str, Any] = {}
_LARGE: dict[str, Any] = dict(patch_size=14, embed_dim=1024, depth=24, num_heads=16, global_pool="avg")
_CLIP = dict(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), crop_pct=1.0
)  # fmt: skip
_SIDES = {
    "eva_giant_patch14_224": 224, "eva_giant_patch14_336": 336, "eva_giant_patch14_560": 560,
    "eva_giant_patch14_clip_224": 224, "eva_large_patch14_196": 196, "eva_large_patch14_336": 336,
}  # fmt: skip
_shared: dict[str, Any] = dict(license="MIT", source="baaivision/EVA", convert=convert, img_size=_SIDES)
register_models(
    "eva",
    eva,
    {
        "eva_giant_patch14_224": _GIANT,
        "eva_giant_patch14_336": dict(img_size=336),
        "eva_giant_patch14_560": dict(img_size=560),
        "eva_giant_patch14_clip_224": dict(global_pool="token", num_classes=1024),
    },
    params={
        "eva_giant_patch14_224": 1_012_555_112, "eva_giant_patch14_336": 1_013_005_672,
        "eva_giant_patch14_560": 1_014_447_464, "eva_giant_patch14_clip_224": 1_012_588_928,
    },
    weights={
        "eva_giant_patch14_224": ("timm/eva_giant_patch14_224.clip_ft_in1k", "model.safetensors"),
        "eva_giant_patch14_336": ("timm/eva_giant_patch14_336.clip_ft_in1k", "model.safetensors"),
        "eva_giant_patch14_560": ("timm/eva_giant_patch14_560.m30m_ft_in22k_in1k", "model.safetensors"),
        "eva_giant_patch14_clip_224": ("timm/eva_giant_patch14_clip_224.laion400m", "model.safetensors"),
    },
    data=_CLIP,
    data_of={
        "eva_giant_patch14_224": _CLIP | {"crop_pct": 0.9},
        "eva_giant_patch14_clip_224": _CLIP | {"crop_pct": 0.9},
        "eva_giant_patch14_560": {
            "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 1.0,
        },
    },
    **_shared,
)  # fmt: skip
register_models(
    "eva",
    vit,
    {"eva_large_patch14_196": _LARGE | dict(img_size=196), "eva_large_patch14_336": _LARGE | dict(img_size=336)},
    params={"eva_large_patch14_196": 304_142_312, "eva_large_patch14_336": 304_531_432},
    weights={
        name: (f"timm/{name}.in22k_ft_in22k_in1k", "model.safetensors")
        for name in ("eva_large_patch14_196", "eva_large_patch14_336")
    },
    data=_CLIP,
    **{**_shared, "convert": functools.partial(plain.convert)},
)

_SECOND: dict[str, Any] = dict(
    patch_size=14, mlp_ratio=4 * 2 / 3, swiglu=True, rotary=10000.0, rotary_grid=(16, 16)
)  # fmt: skip
_TI, _S = (dict(embed_dim=dim, depth=12, num_heads=dim // 64) | _SECOND for dim in (192, 384))
_B, _L = (
    dict(embed_dim=dim, depth=depth, num_heads=dim // 64, mlp_norm=True) | _SECOND
    for dim, depth in ((768, 12), (1024, 24))
)
_TOWER: dict[str, Any] = dict(inner_norm=True, global_pool="token")
_EVA02: dict[str, dict[str, Any]] = {
    "eva02_tiny_patch14_224": _TI | dict(num_classes=0),
    "eva02_small_patch14_224": _S | dict(num_classes=0),
    "eva02_base_patch14_224": _B | dict(num_classes=0),
    "eva02_large_patch14_224": _L | dict(num_classes=0),
    "eva02_tiny_patch14_336": _TI | dict(img_size=336),
    "eva02_small_patch14_336": _S | dict(img_size=336),
    "eva02_base_patch14_448": _B | dict(img_size=448),
    "eva02_large_patch14_448": _L | dict(img_size=448),
    "eva02_base_patch16_clip_224": _B | _TOWER | dict(patch_size=16, num_classes=512),
    "eva02_large_patch14_clip_224": _L | _TOWER | dict(num_classes=768),
    "eva02_large_patch14_clip_336": _L | _TOWER | dict(img_size=336, num_classes=768),
    "eva02_enormous_patch14_clip_224": dict(
        embed_dim=1792, depth=64, num_heads=16, mlp_ratio=15360 / 1792, post_norm=True, global_pool="token",
        num_classes=1024,
    ),
}  # fmt: skip
_TAGS = {
    "eva02_tiny_patch14_224": "mim_in22k", "eva02_small_patch14_224": "mim_in22k",
    "eva02_base_patch14_224": "mim_in22k", "eva02_large_patch14_224": "mim_m38m",
    "eva02_tiny_patch14_336": "mim_in22k_ft_in1k", "eva02_small_patch14_336": "mim_in22k_ft_in1k",
    "eva02_base_patch14_448": "mim_in22k_ft_in22k_in1k", "eva02_large_patch14_448": "mim_m38m_ft_in22k_in1k",
    "eva02_base_patch16_clip_224": "merged2b", "eva02_large_patch14_clip_224": "merged2b",
    "eva02_large_patch14_clip_336": "merged2b", "eva02_enormous_patch14_clip_224": "laion2b",
}  # fmt: skip
register_models(
    "eva",
    eva,
    _EVA02,
    params={
        "eva02_tiny_patch14_224": 5_502_144, "eva02_small_patch14_224": 21_621_120,
        "eva02_base_patch14_224": 85_758_720, "eva02_large_patch14_224": 303_268_800,
        "eva02_tiny_patch14_336": 5_756_584, "eva02_small_patch14_336": 22_129_000,
        "eva02_base_patch14_448": 87_117_544, "eva02_large_patch14_448": 305_080_232,
        "eva02_base_patch16_clip_224": 86_263_040, "eva02_large_patch14_clip_224": 304_105_152,
        "eva02_large_patch14_clip_336": 304_432_832, "eva02_enormous_patch14_clip_224": 4_350_556_928,
    },
    weights={name: (f"timm/{name}.{tag}", "model.safetensors") for name, tag in _TAGS.items()},
    data=_CLIP,
    data_of={name: _CLIP | {"crop_pct": 0.9} for name in _EVA02 if name.endswith("224")}
    | {name: _CLIP | {"crop_mode": "squash"} for name in _EVA02 if name.endswith("448")},
    **{**_shared, "img_size": {name: int(name.rpartition("_")[2]) for name in _EVA02}},
)  # fmt: skip
