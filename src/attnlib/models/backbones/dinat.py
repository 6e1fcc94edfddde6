"""NAT and DiNAT, DiNAT_s, and the isotropic relatives of both: stages of (dilated) neighborhood attention.

Hassani, Walton, Li, Li, Shi, 2023, "Neighborhood Attention Transformer", arXiv 2204.07143; Hassani, Shi, 2022, "Dilated
Neighborhood Attention Transformer", arXiv 2209.15001. Two 3 x 3 convolutions of stride 2 with nothing between them make
tokens; 3 x 3 convolutions of stride 2 lie between stages; heads are 32 wide. NAT has dilation 1 everywhere, DiNAT
alternates 1 and the largest that fits a stage at the size it was trained on. DiNAT_s has Swin's layout instead, and the
isotropic models that of a ViT without class token.

Differs from the authors' code: any size. A map smaller than ``kernel_size * dilation`` is padded with tokens that
nobody attends to, with ``compat="authors"`` with zeros that are attended to, as in their detection code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice
from ...nn.layers import Patchify, PatchMerging
from ...nn.local.dinat import DilatedNeighborhoodAttention
from ...nn.partition.maxvit import PartitionAttention
from ...nn.released import Released
from ..blocks import Block, Chain, Make, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage


def dinat(
    embed_dim: int = 64,
    depths: Sequence[int] = (3, 4, 6, 5),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    mlp_ratio: float = 3.0,
    kernel_size: int = 7,
    dilations: Sequence[Sequence[int]] | None = None,
    layer_scale: float | None = None,
    layout: str = "conv",
    patch_size: int = 4,
    compat: str | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A NAT or DiNAT.

    Args:
        embed_dim: width of the first stage; every further stage has twice as much.
        depths: blocks per stage.
        num_heads: heads per stage.
        mlp_ratio: hidden width of MLPs over the width.
        kernel_size: keys per axis; 0 for dense attention with a relative bias over the whole map (``img_size`` is then
            fixed), as in the ViTs that the isotropic models are compared with.
        dilations: per block; 1 everywhere by default.
        layer_scale: start of the learned scales.
        layout: ``"conv"`` (NAT, DiNAT), ``"swin"`` (DiNAT_s), ``"plain"`` (one stage of patches).
        patch_size: side of patches, where the layout has them.
        compat: ``"authors"``: as in :class:`attnlib.nn.local.dinat.DilatedNeighborhoodAttention`.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_choice("layout", layout, ("conv", "swin", "plain"))
    if dilations is not None and [len(row) for row in dilations] != list(depths):
        raise ValueError(f"dilations={dilations} must have one number for each block of depths={tuple(depths)}")
    dims = [embed_dim * 2**i for i in range(len(depths))]
    reductions = [patch_size * 2**i for i in range(len(depths))]
    side = (img_size if isinstance(img_size, int) else img_size[0]) // patch_size

    def own(place: Place) -> nn.Module:
        if not kernel_size:
            return PartitionAttention(place.dim, place.num_heads, side)
        dilation = 1 if dilations is None else dilations[place.stage][place.block]
        return DilatedNeighborhoodAttention(place.dim, place.num_heads, kernel_size, dilation, rank=2, compat=compat)

    make = mechanism or own
    stem: nn.Module
    if layout == "conv":
        stem = Chain(
            Patchify(in_chans, embed_dim // 2, 3, 2, 1, norm=None), Patchify(embed_dim // 2, embed_dim, 3, 2, 1)
        )
    else:
        stem = Patchify(in_chans, embed_dim, patch_size)
    stages = []
    for row in places(dims, depths, num_heads, reductions, drop_path_rate):
        between: nn.Module | None = None
        if row[0].stage:
            half = row[0].dim // 2
            between = Patchify(half, 2 * half, 3, 2, 1, bias=False) if layout == "conv" else PatchMerging(half)
        blocks = [
            Block(p.dim, make(p), mlp_ratio=mlp_ratio, drop_path=p.drop_path, layer_scale=layer_scale) for p in row
        ]
        stages.append(Stage(blocks, between))
    head = Head(dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(stem, stages, dims, reductions, nn.LayerNorm(dims[-1]), head, num_classes, in_chans, img_size)
    model.input_name = "stem.0.proj.weight" if layout == "conv" else "stem.proj.weight"
    init_weights(model, also=(DilatedNeighborhoodAttention, PartitionAttention))
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``NAT``, ``DiNAT``, ``DiNAT_s`` and ``NATIsotropic``."""
    theirs = Released(state_dict, "the authors' NAT")
    theirs.leave(r".*\.relative_position_index", because="a constant")
    # The isotropic models have blocks where the others have stages.
    flat = any(re.match(r"layers\.\d+\.attn\.", name) for name in theirs)
    block = r"(?:layers)()\.(\d+)" if flat else r"(?:levels|layers)\.(\d+)\.blocks\.(\d+)"
    to = r"stages.0.blocks.\2" if flat else r"stages.\1.blocks.\2"
    dense = flat and model is not None and isinstance(model.stages[0].blocks[0].mixer.inner, PartitionAttention)
    attention = _dense_attention if dense else DilatedNeighborhoodAttention.convert_state_dict
    out = theirs.parts(block + r"\.attn\.(.+)", to + ".mixer.inner", attention)
    out |= theirs.renamed(
        {
            block + r"\.norm1\.(weight|bias)": to + r".mixer.norm.\3",
            block + r"\.norm2\.(weight|bias)": to + r".mlp.norm.\3",
            block + r"\.mlp\.(fc[12]\.(?:weight|bias))": to + r".mlp.inner.\3",
            block + r"\.gamma1": to + ".mixer.scale.gamma",
            block + r"\.gamma2": to + ".mlp.scale.gamma",
            r"patch_embed\.proj\.(\d\.(?:weight|bias))": lambda m, t: {f"stem.{m[1][0]}.proj.{m[1][2:]}": t},
            r"patch_embed\.proj\.(weight|bias)": r"stem.proj.\1",
            r"patch_embed\.norm\.(weight|bias)": lambda m, t: {
                f"stem.{'' if 'stem.proj.weight' in _names(model) else '1.'}norm.{m[1]}": t
            },
            r"levels\.(\d+)\.downsample\.reduction\.weight": lambda m, t: {
                f"stages.{int(m[1]) + 1}.downsample.proj.weight": t
            },
            r"layers\.(\d+)\.downsample\.reduction\.weight": lambda m, t: {
                f"stages.{int(m[1]) + 1}.downsample.reduction.weight": t
            },
            r"(?:levels|layers)\.(\d+)\.downsample\.norm\.(weight|bias)": lambda m, t: {
                f"stages.{int(m[1]) + 1}.downsample.norm.{m[2]}": t
            },
            r"norm\.(weight|bias)": r"norm.\1",
            r"head\.(weight|bias)": r"head.fc.\1",
        }
    )
    return theirs.close(out)


def _names(model: Any) -> set[str]:
    return set() if model is None else {name for name, _ in model.named_parameters()}


def _dense_attention(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"rel_bias" if name == "rpb" else name: value for name, value in state_dict.items()}


def _alternating(depths: Sequence[int], dilations: Sequence[int]) -> list[list[int]]:
    """1, d, 1, d, ... in every stage."""
    return [[d if i % 2 else 1 for i in range(n)] for n, d in zip(depths, dilations, strict=True)]


_MINI, _TINY = (3, 4, 6, 5), (3, 4, 18, 5)
_NAT: dict[str, dict[str, Any]] = {
    "mini": dict(embed_dim=64, depths=_MINI, num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2),
    "tiny": dict(embed_dim=64, depths=_TINY, num_heads=(2, 4, 8, 16), mlp_ratio=3.0, drop_path_rate=0.2),
    "small": dict(embed_dim=96, depths=_TINY, num_heads=(3, 6, 12, 24), mlp_ratio=2.0, drop_path_rate=0.3),
    "base": dict(
        embed_dim=128, depths=_TINY, num_heads=(4, 8, 16, 32), mlp_ratio=2.0, drop_path_rate=0.5, layer_scale=1e-5
    ),
    "large": dict(embed_dim=192, depths=_TINY, num_heads=(6, 12, 24, 48), mlp_ratio=2.0, drop_path_rate=0.35),
}
_AT_224, _AT_384 = (8, 4, 2, 1), (13, 6, 3, 1)
_SWIN: dict[str, dict[str, Any]] = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.2),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.3),
    "base": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.35),
}


def _sizes() -> dict[str, dict[str, Any]]:
    sizes = {f"nat_{name}": size for name, size in _NAT.items() if name != "large"}
    sizes["nat_small"] = {**sizes["nat_small"], "layer_scale": 1e-5}
    for name, size in _NAT.items():
        sizes[f"dinat_{name}"] = {**size, "dilations": _alternating(size["depths"], _AT_224)}
    large = _NAT["large"]
    wide = {**large, "img_size": 384}
    sizes["dinat_large_384"] = {**wide, "dilations": _alternating(large["depths"], _AT_384)}
    sizes["dinat_large_384_11x11"] = {**wide, "kernel_size": 11, "dilations": _alternating(large["depths"], _AT_224)}
    pre = {**large, "drop_path_rate": 0.2, "num_classes": 21841, "dilations": _alternating(large["depths"], _AT_224)}
    sizes["dinat_large_21k"] = pre
    sizes["dinat_large_21k_11x11"] = {**pre, "kernel_size": 11}
    for name, size in _SWIN.items():
        sizes[f"dinat_s_{name}"] = {
            **size, "mlp_ratio": 4.0, "layout": "swin", "dilations": _alternating(size["depths"], _AT_224)
        }  # fmt: skip
    s_large = sizes["dinat_s_large"]
    sizes["dinat_s_large_384"] = {**s_large, "img_size": 384, "dilations": _alternating(s_large["depths"], _AT_384)}
    sizes["dinat_s_large_21k"] = {**s_large, "drop_path_rate": 0.2, "num_classes": 21841}
    for name, dim, drop in (("small", 384, 0.1), ("base", 768, 0.4)):
        plain = dict(
            embed_dim=dim, depths=(12,), num_heads=(dim // 32,), mlp_ratio=4.0, layout="plain", patch_size=16,
            drop_path_rate=drop,
        )  # fmt: skip
        sizes[f"nat_isotropic_{name}"] = plain
        sizes[f"dinat_isotropic_{name}"] = {**plain, "dilations": _alternating((12,), (2,))}
        sizes[f"vitrpb_{name}"] = {**plain, "kernel_size": 0}
    return sizes


register_models(
    "dinat",
    dinat,
    _sizes(),
    params={
        "dinat_mini": 19_984_174, "dinat_tiny": 27_901_582, "dinat_small": 50_719_681, "dinat_base": 89_769_652,
        "dinat_large": 200_943_514,
    },
    license="MIT",
    source="SHI-Labs/Neighborhood-Attention-Transformer",
    convert=convert,
    img_size={name: size["img_size"] for name, size in _sizes().items() if "img_size" in size},
)  # fmt: skip
