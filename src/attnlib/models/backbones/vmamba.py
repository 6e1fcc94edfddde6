"""VMamba: hierarchical models whose blocks scan the map along its rows and columns, forwards and backwards.

Liu et al., 2024, "VMamba: Visual State Space Model", arXiv 2401.10166. The first models (v0) have patches of 4 x 4,
Swin's merging, blocks of a gated SS2D alone, and 16 numbers of state. The published ones (v2, and v2v with half the
width inside) have stems and mergings of 3 x 3 convolutions, one number of state, no gate, and an MLP in every block.

Differs from the authors' code: maps are channels last throughout; any size; tokens that do not exist enter no
convolution, no scan and no mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice
from ...nn.layers import DepthwiseConv, Mlp, Patchify, PatchMerging
from ...nn.released import Released, Rule
from ...nn.scan.routed import Route
from ...nn.scan.vmamba import ACTIVATIONS, CROSS, SS2D, ScannedFrame
from ..blocks import Block, Make, Place, TwoConvStem, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage

DOWNSAMPLES = ("merging", "patch", "overlap")


def scanned_backbone(
    own: Make,
    embed_dims: Sequence[int],
    depths: Sequence[int],
    mlp: Callable[[int], nn.Module] | None,
    stem: str,
    downsample: str,
    post_norm: bool,
    num_heads: Sequence[int] | None,
    mechanism: Make | None,
    num_classes: int,
    in_chans: int,
    img_size: int | tuple[int, int],
    drop_path_rate: float,
    drop_rate: float,
    global_pool: str,
) -> Backbone:
    """The skeleton that VMamba and its relatives share; ``own`` makes the mechanism of a place, ``mlp`` MLPs."""
    check_choice("stem", stem, ("patch", "overlap"))
    check_choice("downsample", downsample, DOWNSAMPLES)
    make = mechanism or own
    heads = [max(1, d // 32) for d in embed_dims] if num_heads is None else num_heads
    reductions = [4 * 2**i for i in range(len(embed_dims))]
    stages = []
    for row in places(embed_dims, depths, heads, reductions, drop_path_rate):
        between: nn.Module | None = None
        if row[0].stage:
            last, dim = embed_dims[row[0].stage - 1], row[0].dim
            between = {
                "merging": lambda a, b: PatchMerging(a, b),
                "patch": lambda a, b: Patchify(a, b, 2),
                "overlap": lambda a, b: Patchify(a, b, 3, 2, 1),
            }[downsample](last, dim)
        blocks = [
            Block(
                p.dim, make(p), None if mlp is None else mlp(p.dim), mlp_ratio=0, drop_path=p.drop_path,
                post_norm=post_norm,
            )
            for p in row
        ]  # fmt: skip
        stages.append(Stage(blocks, between))
    dims = list(embed_dims)
    first = Patchify(in_chans, dims[0], 4) if stem == "patch" else TwoConvStem(in_chans, dims[0])
    head = Head(dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(first, stages, dims, reductions, nn.LayerNorm(dims[-1]), head, num_classes, in_chans, img_size)
    model.input_name = "stem.proj.weight" if stem == "patch" else "stem.first.proj.weight"
    init_weights(model, also=(ScannedFrame,))
    for module in model.modules():
        if isinstance(module, Mlp) and isinstance(module.dwconv, DepthwiseConv):
            module.fc1.reset_parameters()  # convolutions in the authors' code, which start as torch's do
            module.fc2.reset_parameters()
    return model


def vmamba(
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (2, 2, 9, 2),
    state_dim: int = 16,
    expand: float = 2.0,
    dt_rank: int | None = None,
    kernel_size: int = 3,
    conv_bias: bool = True,
    activation: str = "silu",
    gate: str = "activated",
    norm: str = "layer",
    out_activation: bool = False,
    rank_ratio: float = 0.0,
    routes: Sequence[Route] = CROSS,
    start: str = "s4d",
    mlp_ratio: float = 0.0,
    mlp_activation: str = "gelu",
    mlp_gated: bool = False,
    stem: str = "patch",
    downsample: str = "merging",
    post_norm: bool = False,
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A VMamba.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        state_dim, expand, dt_rank, kernel_size, conv_bias, activation, gate, norm, out_activation, rank_ratio, routes,
            start: of :class:`attnlib.nn.scan.vmamba.SS2D`.
        mlp_ratio: hidden width of MLPs over the width; 0 for none.
        mlp_activation: of MLPs.
        mlp_gated: MLPs are ``W_2 (a * act(b))`` with ``[a, b] = W_1 x``.
        stem: ``"patch"``, 4 x 4 patches; ``"overlap"``, two 3 x 3 convolutions.
        downsample: between stages: ``"merging"`` as Swin's, ``"patch"``, 2 x 2 patches, ``"overlap"``, a 3 x 3
            convolution.
        post_norm: norms stand behind scans and MLPs.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_choice("mlp_activation", mlp_activation, ACTIVATIONS)

    def own(place: Place) -> nn.Module:
        return SS2D(
            place.dim, state_dim, expand, rank_ratio, dt_rank, kernel_size, conv_bias, False, activation, gate, norm,
            out_activation, routes, start=start,
        )  # fmt: skip

    def mlp(dim: int) -> nn.Module:
        return Mlp(dim, mlp_ratio, ACTIVATIONS[mlp_activation], gated=mlp_gated)

    return scanned_backbone(
        own, embed_dims, depths, mlp if mlp_ratio else None, stem, downsample, post_norm, num_heads, mechanism,
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool,
    )  # fmt: skip


def convert_scanned(
    state_dict: dict[str, Tensor], mixer: Callable[[dict[str, Tensor]], Any], model: Any = None
) -> dict[str, Tensor]:
    """From the ``VSSM`` of VMamba and its forks; ``mixer`` converts an ``SS2D`` of theirs."""
    theirs = Released(state_dict, "the authors' VSSM")
    block, inside = r"layers\.(\d+)\.blocks\.(\d+)", r"stages.\1.blocks.\2"
    gated = any(isinstance(m, Mlp) and m.gated for m in (model.modules() if model is not None else ()))

    def between(match: Any, value: Tensor) -> dict[str, Tensor]:
        part = {"1": "proj", "3": "norm"}.get(match[2], match[2])
        to = f"stages.{int(match[1]) + 1}.downsample.{part}.{match[3]}"
        return {to: value.flatten(1) if part == "reduction" else value}

    def mlp(match: Any, value: Tensor) -> dict[str, Tensor]:
        value = value.flatten(1) if match[4] == "weight" else value
        if gated and match[3] == "fc1":  # in theirs what the gate multiplies stands first
            value = value.roll(value.shape[0] // 2, 0)
        return {match.expand(inside + r".mlp.inner.\3.\4"): value}

    out = theirs.parts(block + r"\.(?:op|self_attention)\.(.+)", inside + ".mixer.inner", mixer)
    rules: dict[str, Rule] = {
        block + r"\.(?:norm|ln_1)\.(weight|bias)": inside + r".mixer.norm.\3",
        block + r"\.norm2\.(weight|bias)": inside + r".mlp.norm.\3",
        block + r"\.mlp\.(fc[12])\.(weight|bias)": mlp,
        block + r"\.convFFN\.linear([12])\.(weight|bias)": lambda match, value: {
            match.expand(inside + r".mlp.inner.fc\3.\4"): value.flatten(1) if match[4] == "weight" else value
        },
        block + r"\.convFFN\.dwc\.(weight|bias)": inside + r".mlp.inner.dwconv.\3",
        r"layers\.(\d+)\.downsample\.(1|3|norm|reduction)\.(weight|bias)": between,
        r"(?:classifier\.)?norm\.(weight|bias)": r"norm.\1",
        r"(?:classifier\.)?head\.(weight|bias)": r"head.fc.\1",
        r"patch_embed\.(?:0|proj)\.(weight|bias)": r"stem.proj.\1",
    }
    if "patch_embed.5.weight" in theirs:
        for at, ours in (("0", "first.proj"), ("2", "first.norm"), ("5", "second.proj"), ("7", "second.norm")):
            rules = {rf"patch_embed\.{at}\.(weight|bias)": rf"stem.{ours}.\1", **rules}
    else:
        rules[r"patch_embed\.(?:2|norm)\.(weight|bias)"] = r"stem.norm.\1"
    return theirs.close(out | theirs.renamed(rules))


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``VSSM``."""
    return convert_scanned(state_dict, SS2D.convert_state_dict, model)


_TINY, _BASE = (96, 192, 384, 768), (128, 256, 512, 1024)
_V2: dict[str, Any] = dict(
    state_dim=1, conv_bias=False, gate="none", mlp_ratio=4.0, stem="overlap", downsample="overlap"
)
_SIZES: dict[str, dict[str, Any]] = {
    "vmambav0_tiny": dict(embed_dims=_TINY, depths=(2, 2, 9, 2), drop_path_rate=0.2),
    "vmambav0_small": dict(embed_dims=_TINY, depths=(2, 2, 27, 2), drop_path_rate=0.3),
    "vmambav0_base": dict(embed_dims=_BASE, depths=(2, 2, 27, 2), drop_path_rate=0.5),
    "vmambav2_tiny": dict(_V2, embed_dims=_TINY, depths=(2, 2, 5, 2), drop_path_rate=0.2),
    "vmambav2_small": dict(_V2, embed_dims=_TINY, depths=(2, 2, 15, 2), drop_path_rate=0.3),
    "vmambav2_base": dict(_V2, embed_dims=_BASE, depths=(2, 2, 15, 2), drop_path_rate=0.6),
    "vmambav2v_tiny": dict(_V2, embed_dims=_TINY, depths=(2, 2, 8, 2), expand=1.0, drop_path_rate=0.2),
    "vmambav2v_small": dict(_V2, embed_dims=_TINY, depths=(2, 2, 20, 2), expand=1.0, drop_path_rate=0.3),
    "vmambav2v_base": dict(_V2, embed_dims=_BASE, depths=(2, 2, 20, 2), expand=1.0, drop_path_rate=0.5),
}

register_models(
    "vmamba",
    vmamba,
    _SIZES,
    params={
        "vmambav0_tiny": 22_893_448, "vmambav0_small": 44_417_416, "vmambav0_base": 76_254_056,
        "vmambav2_tiny": 30_705_832, "vmambav2_small": 50_147_752, "vmambav2_base": 88_557_800,
        "vmambav2v_tiny": 30_249_064, "vmambav2v_small": 49_012_840, "vmambav2v_base": 86_614_504,
    },
    license="MIT",
    source="MzeroMiko/VMamba",
    convert=convert,
)  # fmt: skip
