"""SMT: scale-aware modulation in early stages, attention in the last, both by turns in between.

Lin et al., 2023, "Scale-Aware Modulation Meet Transformer", arXiv 2307.08579. Two convolutions make tokens of 4 x 4
pixels, overlapping ones halve the map between stages; a block is a mixer and an MLP with a residual depthwise
convolution in its middle; a LayerNorm ends every stage.

Differs from the authors' code: tokens that do not exist enter no convolution, mean or statistic. Sizes are those of the
code, where the small one has 22.551 M parameters; the paper's table says 20.5 M.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...nn.dense.attention_lepe import AttentionLePE
from ...nn.layers import ConvNorm, Mlp, Patchify, init_like_pvt
from ...nn.modulation.smt import ScaleAwareModulation
from ...nn.released import Released, Rule
from ..blocks import Block, Chain, ConvStem, Make, Place, check_stages, places
from ..build import register_models
from .stages import Backbone, Head, Stage

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)
MIXERS = ("modulation", "alternating", "attention")


def smt(
    embed_dims: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (2, 2, 8, 1),
    num_heads: Sequence[int] = (2, 4, 8, 16),
    mixers: Sequence[str] = ("modulation", "modulation", "alternating", "attention"),
    mlp_ratios: Sequence[float] = (4, 4, 4, 2),
    scales: int = 4,
    expand_ratio: int = 2,
    stem_kernel: int = 3,
    layer_scale: float | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An SMT.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        num_heads: heads of attention per stage.
        mixers: per stage ``"modulation"``, ``"attention"``, or ``"alternating"``: every second block attends, the first
            does not.
        mlp_ratios: hidden width of MLPs over the width, per stage.
        scales, expand_ratio: ``num_heads`` and ``expand_ratio`` of
            :class:`attnlib.nn.modulation.smt.ScaleAwareModulation`.
        stem_kernel: side of the first convolution's kernel, odd.
        layer_scale: start of the learned scales; ``None`` for none.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_stages(len(depths), embed_dims=embed_dims, mixers=mixers, mlp_ratios=mlp_ratios)
    for kind in mixers:
        check_choice("mixers", kind, MIXERS)
    if check_int("stem_kernel", stem_kernel, least=1) % 2 == 0:
        raise ValueError(f"stem_kernel must be odd, got {stem_kernel}")

    def own(place: Place) -> nn.Module:
        kind = mixers[place.stage]
        if kind == "attention" or (kind == "alternating" and place.block % 2):
            return AttentionLePE(place.dim, place.num_heads, 3, qkv_bias=True)
        return ScaleAwareModulation(place.dim, scales, expand_ratio)

    make = mechanism or own
    reductions = [4 * 2**i for i in range(len(depths))]
    stages = []
    for row in places(embed_dims, depths, num_heads, reductions, drop_path_rate):
        i, dim = row[0].stage, row[0].dim
        blocks = [
            Block(
                dim, make(p), Mlp(dim, mlp_ratios[i], depthwise=3, skip=True), norm=LayerNorm, drop_path=p.drop_path,
                layer_scale=layer_scale,
            )
            for p in row
        ]  # fmt: skip
        stages.append(Stage(blocks, Patchify(embed_dims[i - 1], dim, 3, 2, 1) if i else None, LayerNorm(dim)))
    first = embed_dims[0]
    stem = Chain(
        ConvStem(ConvNorm(in_chans, first, stem_kernel, 2, activation=nn.ReLU)), Patchify(first, first, 2)
    )  # fmt: skip
    head = Head(embed_dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(stem, stages, embed_dims, reductions, None, head, num_classes, in_chans, img_size)
    for module in model.modules():
        if isinstance(module, (Chain, Patchify, Mlp, AttentionLePE)):
            init_like_pvt(module)
    model.input_name = "stem.0.0.conv.weight"
    return model


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``SMT``."""
    theirs = Released(state_dict, "the authors' SMT")
    modulated = {name.removesuffix(".proj0.weight") for name in theirs if name.endswith(".attn.proj0.weight")}
    out: dict[str, Tensor] = {}
    rules: dict[str, Rule] = {
        r"patch_embed1\.conv\.0\.weight": "stem.0.0.conv.weight",
        r"patch_embed1\.conv\.1\.(weight|bias|running_mean|running_var|num_batches_tracked)": r"stem.0.0.norm.\1",
        r"patch_embed1\.conv\.3\.(weight|bias)": r"stem.1.proj.\1",
        r"patch_embed1\.norm\.(weight|bias)": r"stem.1.norm.\1",
        r"head\.(weight|bias)": r"head.fc.\1",
    }
    for i in range(1, 10):  # theirs count stages from 1
        block, to = rf"block{i}\.(\d+)", rf"stages.{i - 1}.blocks.\1"
        gates = "|".join(name.split(".")[1] for name in modulated if name.startswith(f"block{i}."))
        if gates:
            out |= theirs.parts(
                rf"block{i}\.({gates})\.attn\.(.+)", f"{to}.mixer.inner", ScaleAwareModulation.convert_state_dict
            )
        out |= theirs.parts(rf"{block}\.attn\.(.+)", f"{to}.mixer.inner", AttentionLePE.convert_state_dict)
        rules |= {
            rf"{block}\.norm1\.(weight|bias)": rf"{to}.mixer.norm.\2",
            rf"{block}\.norm2\.(weight|bias)": rf"{to}.mlp.norm.\2",
            rf"{block}\.gamma_1": f"{to}.mixer.scale.gamma",
            rf"{block}\.gamma_2": f"{to}.mlp.scale.gamma",
            rf"{block}\.mlp\.(fc[12])\.(weight|bias)": rf"{to}.mlp.inner.\2.\3",
            rf"{block}\.mlp\.dwconv\.dwconv\.(weight|bias)": rf"{to}.mlp.inner.dwconv.\2",
            rf"patch_embed{i}\.(proj|norm)\.(weight|bias)": rf"stages.{i - 1}.downsample.\1.\2",
            rf"norm{i}\.(weight|bias)": rf"stages.{i - 1}.norm.\1",
        }
    return theirs.close(out | theirs.renamed(rules))


_LARGE: dict[str, Any] = dict(mlp_ratios=(8, 6, 4, 2), stem_kernel=7)
_SIZES: dict[str, dict[str, Any]] = {
    "smt_t": dict(drop_path_rate=0.1),
    "smt_s": dict(depths=(3, 4, 18, 2), drop_path_rate=0.2),
    "smt_b": dict(**_LARGE, depths=(4, 6, 28, 2), drop_path_rate=0.3),
    "smt_l": dict(**_LARGE, embed_dims=(96, 192, 384, 768), depths=(4, 6, 28, 4), drop_path_rate=0.4),
}

register_models(
    "smt-scale-aware-modulation",
    smt,
    _SIZES,
    params={"smt_t": 11_506_536, "smt_s": 22_550_952, "smt_b": 32_037_352, "smt_l": 80_589_544},
    license="MIT",
    source="AFeng-x/SMT",
    convert=convert,
)
