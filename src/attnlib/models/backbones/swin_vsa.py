"""Swin with varied-size windows: its pyramid of patches, with windows whose keys are sampled from predicted windows.

Zhang et al., 2022, "VSA: Learning Varied-Size Window Attention in Vision Transformers", arXiv 2204.08446, section 4;
the host is that of Liu et al., 2021, "Swin Transformer", arXiv 2103.14030: patches of 4 x 4, merged by 2 x 2 between
stages, blocks of attention and an MLP. No windows are shifted, as windows move by themselves, and a depthwise
convolution before every attention tells places (CPE).

Our reading: the authors released this attention and its ViTAEv2 host (:mod:`attnlib.models.backbones.vitaev2`), and
neither code nor weights of this one. The convolution is 7 x 7, as in that host.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...nn.layers import Patchify, PatchMerging
from ...nn.sampled.vsa_varied_size_window import VariedSizeWindowAttention
from ..blocks import Block, Make, Place, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage


def swin_vsa(
    embed_dim: int = 96,
    depths: Sequence[int] = (2, 2, 6, 2),
    num_heads: Sequence[int] = (3, 6, 12, 24),
    window_size: int = 7,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    position: int = 7,
    border: str = "zeros",
    zero_init: bool = True,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A Swin with varied-size windows.

    Args:
        embed_dim: width of the first stage; it doubles from stage to stage.
        depths: blocks per stage.
        num_heads: heads per stage.
        window_size, qkv_bias, border, zero_init: as of
            :class:`attnlib.nn.sampled.vsa_varied_size_window.VariedSizeWindowAttention`.
        mlp_ratio: hidden width of MLPs over the width.
        position: side of the depthwise convolution before attention; 0 for none.
        mechanism, num_classes, in_chans, img_size, drop_path_rate, drop_rate, global_pool: as in
            :func:`attnlib.create_model`.
    """

    def own(place: Place) -> nn.Module:
        return VariedSizeWindowAttention(
            place.dim, place.num_heads, window_size, border=border, zero_init=zero_init, qkv_bias=qkv_bias
        )

    make, count = mechanism or own, len(depths)
    dims = [embed_dim * 2**i for i in range(count)]
    reductions = [4 * 2**i for i in range(count)]
    stages = []
    for i, row in enumerate(places(dims, depths, num_heads, reductions, drop_path_rate)):
        blocks = [Block(p.dim, make(p), mlp_ratio=mlp_ratio, drop_path=p.drop_path, position=position) for p in row]
        stages.append(Stage(blocks, PatchMerging(dims[i - 1]) if i else None))
    head = Head(dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(
        Patchify(in_chans, embed_dim, 4), stages, dims, reductions, nn.LayerNorm(dims[-1]), head, num_classes, in_chans,
        img_size,
    )  # fmt: skip
    init_weights(model)
    return model


register_models(
    "vsa-varied-size-window",
    swin_vsa,
    {
        "swin_vsa_tiny": dict(drop_path_rate=0.2),
        "swin_vsa_small": dict(depths=(2, 2, 18, 2), drop_path_rate=0.3),
    },
    params={"swin_vsa_tiny": 28_779_274, "swin_vsa_small": 50_549_338},
)
