"""MSVMamba: VMamba with scans at two scales, channel gates, and convolutions in its MLPs.

Shi et al., 2024, "Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model", arXiv 2405.14174. Patches of
4 x 4, Swin's merging, and blocks of a multi-scale scan and of an MLP of twice the width with a depthwise convolution.

Differs from the authors' code: any size; tokens that do not exist enter no convolution, no scan and no mean; dropout in
MLPs stands behind the activation, not before the convolution. The named models have ``compat="authors"``: their weights
were trained with states that leak from one route into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_ints
from ...nn.layers import Mlp
from ...nn.scan.msvmamba import MultiScaleSS2D
from ...nn.scan.vmamba import SS2D
from ..blocks import Make, Place
from ..build import register_models
from .stages import Backbone
from .vmamba import convert_scanned, scanned_backbone

MLPS = ("conv", "plain", "none")


def msvmamba(
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    depths: Sequence[int] = (1, 2, 9, 2),
    state_dim: int = 1,
    expand: float = 2.0,
    dt_rank: int | None = None,
    kernel_size: int = 3,
    conv_bias: bool = True,
    activation: str = "silu",
    gate: str = "activated",
    norm: str = "layer",
    separate_norms: bool = False,
    coarse: bool = True,
    squeeze: bool = True,
    start: str = "s4d",
    scale_stages: Sequence[int] | None = None,
    compat: str | None = None,
    mlp: str = "conv",
    mlp_ratio: float = 2.0,
    mlp_drop: float = 0.0,
    stem: str = "patch",
    downsample: str = "merging",
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """An MSVMamba.

    Args:
        embed_dims: width per stage.
        depths: blocks per stage.
        state_dim, expand, dt_rank, kernel_size, conv_bias, activation, gate, norm, separate_norms, coarse, squeeze,
            start, compat: of :class:`attnlib.nn.scan.msvmamba.MultiScaleSS2D`.
        scale_stages: stages, from 0, that scan at two scales; all by default. The others have VMamba's SS2D.
        mlp: ``"conv"``, with a depthwise convolution added to the hidden layer; ``"plain"``; ``"none"``.
        mlp_ratio: hidden width of MLPs over the width.
        mlp_drop: dropout of MLPs.
        stem, downsample: as of :func:`attnlib.models.backbones.vmamba.vmamba`.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """
    check_choice("mlp", mlp, MLPS)
    stages = set(range(len(depths)) if scale_stages is None else check_ints("scale_stages", scale_stages, least=0))
    if max(stages, default=0) >= len(depths):
        raise ValueError(
            f"scale_stages={scale_stages} names stages that are not there; there are {len(depths)}, from 0"
        )

    def own(place: Place) -> nn.Module:
        if place.stage not in stages:
            return SS2D(
                place.dim, state_dim, expand, 0.0, dt_rank, kernel_size, conv_bias, False, activation, gate, norm,
                start=start,
            )  # fmt: skip
        return MultiScaleSS2D(
            place.dim, state_dim, expand, dt_rank, kernel_size, conv_bias, False, activation, gate, norm,
            separate_norms, coarse, squeeze=squeeze, start=start, compat=compat,
        )  # fmt: skip

    def make_mlp(dim: int) -> nn.Module:
        return Mlp(dim, mlp_ratio, drop=mlp_drop, depthwise=3 if mlp == "conv" else 0, skip=True, drop_hidden=True)

    return scanned_backbone(
        own, embed_dims, depths, None if mlp == "none" else make_mlp, stem, downsample, False, num_heads, mechanism,
        num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool,
    )  # fmt: skip


def convert(state_dict: dict[str, Tensor], model: Any = None) -> dict[str, Tensor]:
    """From the authors' ``VSSM``."""

    def mixer(theirs: dict[str, Tensor]) -> dict[str, Any]:
        scales = any(name.startswith(("conv2d_b1.", "out_norm1.")) for name in theirs)
        sets = theirs["dt_projs_bias"].shape[:1] if "dt_projs_bias" in theirs else ()
        return (MultiScaleSS2D if scales or tuple(sets) == (2,) else SS2D).convert_state_dict(theirs)

    return convert_scanned(state_dict, mixer, model)


def _sizes() -> dict[str, dict[str, Any]]:
    return {
        f"msvmamba_{name}": dict(
            embed_dims=tuple(dim * 2**i for i in range(4)), depths=depths, compat="authors", drop_path_rate=0.2
        )
        for name, dim, depths in (("nano", 48, (1, 2, 5, 2)), ("micro", 64, (1, 2, 5, 2)), ("tiny", 96, (1, 2, 9, 2)))
    }


register_models(
    "msvmamba",
    msvmamba,
    _sizes(),
    params={"msvmamba_nano": 6_864_136, "msvmamba_micro": 11_879_272, "msvmamba_tiny": 33_046_312},
    source="YuHengsss/MSVMamba",
    convert=convert,
)
