"""FocalNet: stages of focal modulation, and its isotropic form.

Yang et al., 2022, "Focal Modulation Networks", arXiv 2203.11926. Patches make tokens and merge them between stages
(4 x 4 and 2 x 2; overlapping 7 x 7 and 3 x 3 in the large models), each behind a norm. Blocks are modulation and MLP
with norms before them, or behind them in the large models, which also scale both by learned numbers. ``srf`` models
have two levels of context, ``lrf`` three. The isotropic models are one stage of 16 x 16 patches. There are no
positions. The large models were trained on 21842 classes; timm's ``focalnet_huge_fl4`` has no head.

Differs from the authors' code: any size, where theirs drops what is left at the border; tokens that do not exist enter
no convolution and no mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...nn.layers import Mlp, Patchify
from ...nn.modulation.focalnet import FocalModulation
from ...nn.released import Released, Rule
from ..blocks import Block, Make, Place, check_stages, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage


def focalnet(
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    focal_levels: Sequence[int] = (2, 2, 2, 2),
    focal_windows: Sequence[int] = (3, 3, 3, 3),
    patch_size: int = 4,
    mlp_ratio: float = 4.0,
    overlap: bool = False,
    post_norm: bool = False,
    post_norm_in_modulation: bool = False,
    normalize_modulator: bool = False,
    layer_scale: float | None = None,
    num_heads: Sequence[int] | None = None,
    proj_drop_rate: float = 0.0,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A FocalNet.

    Args:
        embed_dim: width of the first stage; every further stage has twice as much.
        depths: blocks per stage.
        focal_levels: levels of context per stage.
        focal_windows: kernel of the first level, per stage.
        patch_size: side of the first patches.
        mlp_ratio: hidden width of MLPs over the width.
        overlap: overlapping convolutions as patches.
        post_norm: norms stand behind modulation and MLP.
        post_norm_in_modulation: a norm before the output projection of the modulation.
        normalize_modulator: the sum over levels is divided by their number.
        layer_scale: start of the learned scales.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        proj_drop_rate: dropout behind modulations and in MLPs.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    count = len(depths)
    check_stages(count, focal_levels=focal_levels[:count], focal_windows=focal_windows[:count])
    dims = [embed_dim * 2**i for i in range(len(depths))]
    reductions = [patch_size * 2**i for i in range(len(depths))]

    def own(place: Place) -> nn.Module:
        return FocalModulation(
            place.dim, focal_levels[place.stage], focal_windows[place.stage], proj_drop=proj_drop_rate,
            normalize_modulator=normalize_modulator, use_postln_in_modulation=post_norm_in_modulation,
        )  # fmt: skip

    make = mechanism or own
    stem = Patchify(in_chans, embed_dim, 7, 4, 2) if overlap else Patchify(in_chans, embed_dim, patch_size)
    stages = []
    heads = [max(1, d // 32) for d in dims] if num_heads is None else num_heads
    for row in places(dims, depths, heads, reductions, drop_path_rate):
        between: nn.Module | None = None
        if row[0].stage:
            half = row[0].dim // 2
            between = Patchify(half, 2 * half, 3, 2, 1) if overlap else Patchify(half, 2 * half, 2)
        blocks = [
            Block(
                p.dim, make(p), Mlp(p.dim, mlp_ratio, drop=proj_drop_rate, drop_hidden=True), drop_path=p.drop_path,
                layer_scale=layer_scale, post_norm=post_norm,
            )
            for p in row
        ]  # fmt: skip
        stages.append(Stage(blocks, between))
    head = Head(dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(stem, stages, dims, reductions, nn.LayerNorm(dims[-1]), head, num_classes, in_chans, img_size)
    init_weights(model, also=(FocalModulation,))
    for module in model.modules():
        if isinstance(module, FocalModulation):
            module.h.reset_parameters()  # a convolution in the authors' code, which starts as torch's do
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``FocalNet``, timm's, and transformers' ``FocalNetForImageClassification``."""
    theirs = Released(state_dict, "the authors', timm's or transformers' FocalNet")
    # timm's stages begin with what the others' stages end with.
    later = 0 if "stem.proj.weight" in theirs else 1
    block = r"(?:layers|focalnet\.encoder\.stages)\.(\d+)\.(?:blocks|layers)\.(\d+)"
    to = r"stages.\1.blocks.\2"

    def downsample(match: Any, value: Tensor) -> dict[str, Tensor]:
        part = "norm" if match[2] == "norm" else "proj"
        return {f"stages.{int(match[1]) + later}.downsample.{part}.{match[3]}": value}

    def mlp(match: Any, value: Tensor) -> dict[str, Tensor]:
        return {match.expand(to + r".mlp.inner.\3"): value.flatten(1) if value.dim() == 4 else value}

    out = theirs.parts(block + r"\.modulation\.(.+)", to + ".mixer.inner", FocalModulation.convert_state_dict)
    rules: dict[str, Rule] = {
        block + r"\.norm1(?:_post)?\.(weight|bias)": to + r".mixer.norm.\3",
        block + r"\.norm2(?:_post)?\.(weight|bias)": to + r".mlp.norm.\3",
        block + r"\.(?:gamma_1|ls1\.gamma)": to + ".mixer.scale.gamma",
        block + r"\.(?:gamma_2|ls2\.gamma)": to + ".mlp.scale.gamma",
        block + r"\.mlp\.(fc[12]\.(?:weight|bias))": mlp,
        r"(?:layers|focalnet\.encoder\.stages)\.(\d+)\.downsample\.(proj|projection|norm)\.(weight|bias)": downsample,
        r"(?:stem|patch_embed)\.(proj|norm)\.(weight|bias)": r"stem.\1.\2",
        r"focalnet\.embeddings\.patch_embeddings\.projection\.(weight|bias)": r"stem.proj.\1",
        r"focalnet\.embeddings\.norm\.(weight|bias)": r"stem.norm.\1",
        r"(?:norm|focalnet\.layernorm)\.(weight|bias)": r"norm.\1",
        r"(?:head|head\.fc|classifier)\.(weight|bias)": r"head.fc.\1",
    }
    return theirs.close(out | theirs.renamed(rules))


_21K = 21842


def _sizes() -> dict[str, dict[str, Any]]:
    sizes: dict[str, dict[str, Any]] = {}
    deep = (2, 2, 18, 2)
    for field, levels in (("srf", 2), ("lrf", 3)):
        three = (("tiny", 96, (2, 2, 6, 2), 0.2), ("small", 96, deep, 0.3), ("base", 128, deep, 0.5))
        for name, dim, depths, drop in three:
            sizes[f"focalnet_{name}_{field}"] = dict(
                embed_dim=dim, depths=depths, focal_levels=(levels,) * 4, drop_path_rate=drop
            )
    for name, dim in (("large", 192), ("xlarge", 256), ("huge", 352)):
        for levels, window in ((3, 5), (4, 3)):
            sizes[f"focalnet_{name}_fl{levels}"] = dict(
                embed_dim=dim, depths=deep, focal_levels=(levels,) * 4,
                focal_windows=(3 if name == "huge" else window,) * 4, overlap=True, post_norm=True, layer_scale=1e-4,
                post_norm_in_modulation=name == "huge", normalize_modulator=(name, levels) == ("large", 4),
                drop_path_rate=0.5, num_classes=0 if (name, levels) == ("huge", 4) else _21K,
                img_size=224 if name == "huge" else 384,
            )  # fmt: skip
    for name, dim in (("tiny", 192), ("small", 384), ("base", 768)):
        large = dict(post_norm=True, layer_scale=1e-4) if name == "base" else {}
        sizes[f"focalnet_{name}_iso"] = dict(
            embed_dim=dim,
            depths=(12,),
            focal_levels=(3,),
            focal_windows=(3,),
            patch_size=16,
            drop_path_rate=0.2,
            **large,
        )
    return sizes


def _hub(name: str) -> tuple[str, str]:
    return f"timm/{name}.ms_in{'1k' if name.endswith('rf') else '22k'}", "model.safetensors"


register_models(
    "focalnet",
    focalnet,
    _sizes(),
    params={
        "focalnet_tiny_srf": 28_427_116, "focalnet_tiny_lrf": 28_647_928, "focalnet_small_srf": 49_891_216,
        "focalnet_small_lrf": 50_342_440, "focalnet_base_srf": 88_148_144, "focalnet_base_lrf": 88_749_768,
        "focalnet_large_fl3": 239_134_898, "focalnet_large_fl4": 239_315_402, "focalnet_xlarge_fl3": 408_787_378,
        "focalnet_xlarge_fl4": 409_028_042, "focalnet_huge_fl3": 745_276_338, "focalnet_huge_fl4": 686_460_664,
        "focalnet_tiny_iso": 5_880_280, "focalnet_small_iso": 22_376_344, "focalnet_base_iso": 87_237_400,
    },
    license="MIT",
    source="microsoft/FocalNet",
    weights={name: _hub(name) for name in _sizes() if not name.endswith("iso")},
    convert=convert,
    img_size={name: size["img_size"] for name, size in _sizes().items() if "img_size" in size},
    data_of={name: {"crop_pct": 1.0} for name, size in _sizes().items() if size.get("img_size") == 384},
)  # fmt: skip
