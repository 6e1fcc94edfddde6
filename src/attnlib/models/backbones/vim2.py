"""ViM2: hierarchical models of MambaMixer blocks, which scan maps along their tokens and tokens along their channels.

Behrouz et al., 2024, "MambaMixer", arXiv 2403.19888. Patches of 4 x 4, merging between stages, VMamba's four routes for
tokens; learned averages of earlier answers reach as far as a stage.

The authors released no code and leave the wiring of the channel mixer open; see :mod:`attnlib.nn.scan.mambamixer` for
our reading. The paper's table gives token mixers, channel mixers and the widths that the latter scan: a block here has
as many token mixers as there are of them for each channel mixer. The paper counts 20, 43 and 74 million parameters;
this reading has 24.0, 43.7 and 75.6 million.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...checks import check_real
from ...nn.layers import Patchify, PatchMerging
from ...nn.scan.mambamixer import MambaMixer
from ..blocks import Block, Make, init_weights, places
from ..build import register_models
from .stages import Backbone, Head, Stage


class Alone(nn.Module):
    """A mechanism as a block, without a residual around it."""

    def __init__(self, mixer: MambaMixer):
        super().__init__()
        self.mixer = mixer

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None = None,
        carry: Any = None,
        losses: dict[str, Tensor] | None = None,
        layout: Any = None,
    ) -> tuple[Tensor, Any]:
        """(B, H, W, C) -> the same."""
        return self.mixer(x, valid=valid), carry


def vim2(
    embed_dims: Sequence[int] = (96, 192, 384, 768),
    token_mixers: Sequence[int] = (2, 2, 6, 2),
    channel_mixers: Sequence[int] = (1, 1, 3, 1),
    widths: Sequence[int] = (192, 384, 768, 768),
    d_state: int = 16,
    group: int = 1,
    averaging: str = "free",
    residual: bool = False,
    num_heads: Sequence[int] | None = None,
    mechanism: Make | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] = 224,
    drop_path_rate: float = 0.0,
    drop_rate: float = 0.0,
    global_pool: str = "avg",
) -> Backbone:
    """A ViM2.

    Args:
        embed_dims: width per stage.
        token_mixers, channel_mixers: how many per stage; the latter divide the former.
        widths: numbers that channel mixers scan, per stage.
        d_state: numbers of state.
        group, averaging, residual: of :class:`attnlib.nn.scan.mambamixer.MambaMixer`.
        num_heads: heads per stage of another ``mechanism``; ``width / 32`` by default.
        mechanism: in blocks of its own, as many as token mixers; else as in :func:`attnlib.create_model`.
        num_classes, in_chans, img_size, drop_rate, global_pool: as in :func:`attnlib.create_model`.
        drop_path_rate: the same; needs ``residual`` or a ``mechanism``, since there is nothing to fall back to.

    >>> import torch
    >>> model = vim2(embed_dims=(8, 16), token_mixers=(2, 1), channel_mixers=(1, 1), widths=(8, 8), num_classes=3)
    >>> model(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 3])
    """
    lengths = {len(embed_dims), len(token_mixers), len(channel_mixers), len(widths)}
    if len(lengths) > 1:
        raise ValueError(
            f"token_mixers={tuple(token_mixers)}, channel_mixers={tuple(channel_mixers)} and widths={tuple(widths)} "
            f"must have one number for each of {len(embed_dims)} stages"
        )
    for tokens, channels in zip(token_mixers, channel_mixers, strict=True):
        if channels < 1 or tokens % channels:
            raise ValueError(f"channel_mixers={tuple(channel_mixers)} must divide token_mixers={tuple(token_mixers)}")
    if check_real("drop_path_rate", drop_path_rate, least=0, below=1) and not (residual or mechanism):
        raise ValueError(f"drop_path_rate={drop_path_rate} needs residual=True: without it nothing passes a mixer")
    heads = [max(1, d // 32) for d in embed_dims] if num_heads is None else num_heads
    reductions = [4 * 2**i for i in range(len(embed_dims))]
    stages = []
    for row in places(embed_dims, token_mixers, heads, reductions, drop_path_rate):
        stage, dim = row[0].stage, row[0].dim
        between = PatchMerging(embed_dims[stage - 1], dim) if stage else None
        if mechanism is not None:
            blocks: list[nn.Module] = [Block(p.dim, mechanism(p), mlp_ratio=0, drop_path=p.drop_path) for p in row]
        else:
            per_block = token_mixers[stage] // channel_mixers[stage]
            blocks = [
                Alone(
                    MambaMixer(
                        dim, channel_mixers[stage], per_block, token="ss2d", averaging=averaging, residual=residual,
                        drop_path=row[-1].drop_path, d_state=d_state, width=widths[stage], group=group,
                    )
                )
            ]  # fmt: skip
        stages.append(Stage(blocks, between))
    dims = list(embed_dims)
    head = Head(dims[-1], num_classes, global_pool, drop=drop_rate)
    model = Backbone(
        Patchify(in_chans, dims[0], 4), stages, dims, reductions, nn.LayerNorm(dims[-1]), head, num_classes, in_chans,
        img_size,
    )  # fmt: skip
    init_weights(model)
    return model


_NARROW: dict[str, Any] = dict(embed_dims=(96, 192, 384, 768), widths=(192, 384, 768, 768))
_DEEP: dict[str, Any] = dict(token_mixers=(2, 2, 18, 2), channel_mixers=(1, 1, 9, 1))
register_models(
    "mambamixer",
    vim2,
    {
        "vim2_tiny": _NARROW,
        "vim2_small": _NARROW | _DEEP,
        "vim2_base": _DEEP | dict(embed_dims=(128, 256, 512, 1024), widths=(256, 512, 1024, 1024)),
    },
    source="MambaMixer/M2",
)
