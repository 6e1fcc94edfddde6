"""A decoder that goes up level by level, as a U-Net's: attention or bilinear resizing brings the coarse map along.

From the coarsest map on, the map so far is made as fine as the next lateral map, both stand side by side, and two 3 x 3
convolutions with BatchNorm and ReLU follow. With ``upsample="attention"`` the lateral map queries the coarse one
(:mod:`attnlib.nn.partition.window_attention_upsample`); with ``"bilinear"`` the coarse one is mapped to the lateral
map's width and resized, which is what attention is added to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...nn.layers import ConvNorm
from ...nn.partition.window_attention_upsample import WindowAttentionUpsample, resize_existing
from .heads import DenseHead, start_convs


class BilinearUpsample(nn.Module):
    """A linear map to the lateral map's width, resized to its size."""

    def __init__(self, dim: int, context_dim: int):
        super().__init__()
        self.low = nn.Linear(context_dim, dim)

    def forward(
        self, x: Tensor, context: Tensor, *, valid: Tensor | None = None, context_valid: Tensor | None = None
    ) -> Tensor:
        """(B, H, W, dim), (B, h, w, context_dim) -> (B, H, W, dim)."""
        size = (2 * context.shape[1], 2 * context.shape[2])
        return resize_existing(self.low(context), size, context_valid)[0][:, : x.shape[1], : x.shape[2]]


class UpsampleHead(DenseHead):
    """Level by level from the coarsest map to the finest.

    Args:
        in_dims: channels of the maps, finest first, each half as fine as the one before it.
        num_classes, drop: as of :class:`attnlib.models.dense.heads.DenseHead`.
        upsample: ``"attention"`` or ``"bilinear"``.
        window_size: fine tokens a side of a window; ``None`` for one window.
        head_dim: channels of a head.
        settings: of :class:`attnlib.nn.partition.window_attention_upsample.WindowAttentionUpsample`.

    >>> head = UpsampleHead([8, 16], num_classes=3, window_size=4, head_dim=8).eval()
    >>> head([torch.randn(1, 8, 9, 12), torch.randn(1, 16, 5, 6)]).shape
    torch.Size([1, 3, 9, 12])
    """

    def __init__(
        self,
        in_dims: Sequence[int],
        num_classes: int = 9,
        drop: float = 0.0,
        upsample: str = "attention",
        window_size: int | None = 8,
        head_dim: int = 32,
        settings: Mapping[str, Any] | None = None,
    ):
        super().__init__(in_dims, in_dims[0] if len(in_dims) else 1, num_classes, drop)
        check_choice("upsample", upsample, ("attention", "bilinear"))
        check_int("head_dim", head_dim, least=1)
        if upsample == "bilinear" and settings:
            raise ValueError(f"settings={dict(settings)} are those of upsample='attention'")
        ups: list[nn.Module] = []
        for fine, coarse in zip(self.in_dims[:-1], self.in_dims[1:], strict=True):
            if upsample == "bilinear":
                ups.append(BilinearUpsample(fine, coarse))
                continue
            own = dict(num_heads=max(1, fine // head_dim), window_size=window_size, **dict(settings or {}))
            ups.append(WindowAttentionUpsample(fine, coarse, **own))
        self.ups = nn.ModuleList(ups)
        self.convs = nn.ModuleList(
            nn.ModuleList([ConvNorm(2 * c, c, 3, activation=nn.ReLU), ConvNorm(c, c, 3, activation=nn.ReLU)])
            for c in self.in_dims[:-1]
        )
        start_convs(self)

    def fuse(self, maps: list[Tensor], valid: list[Tensor | None]) -> Tensor:
        x, exists = maps[-1], valid[-1]
        for i in range(len(maps) - 2, -1, -1):
            lateral, here = maps[i], valid[i]
            up = self.ups[i](lateral, x, valid=here, context_valid=exists)
            x = torch.cat([up, lateral], -1)
            for conv in self.convs[i]:  # type: ignore[union-attr, attr-defined]
                x = conv(x, here)
            exists = here
        return x
