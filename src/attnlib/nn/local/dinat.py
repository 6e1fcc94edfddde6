"""The attention of the Dilated Neighborhood Attention Transformer (and of NAT, its undilated case).

Hassani, Shi, 2022, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001: neighborhood attention with
``kernel_size`` keys ``dilation`` tokens apart and a learned relative bias
``softmax(q k^T D^-1/2 + rpb[h, key - query + w - 1]) v``, keys and queries counted in units of dilation. The table is
indexed *key minus query*, opposite to Swin's. ``dilation = 1`` is local, ``dilation = floor(X / w)`` sparse and global;
the transformer alternates both. Parameters carry the authors' names: ``qkv``, ``proj``, ``rpb``.

Differs from the authors' code: a map smaller than ``kernel_size * dilation`` is refused, unless ``compat="authors"``
pads it with zeros that are attended, as their modules do; odd and even kernels are both possible.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...checks import check_choice, to_tuple
from ...grids import Layout, crop_grid
from ...masks import Mask
from ...types import Output, State
from ..registry import register
from .fused_neighborhood_attention import FusedNeighborhoodAttention, PerAxis


@register("dinat", "nat")
class DilatedNeighborhoodAttention(FusedNeighborhoodAttention):
    """Dilated neighborhood attention with a relative bias.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``. The authors' models have ``dim / 32``.
        kernel_size: keys per axis.
        dilation: tokens between neighbouring keys, per axis.
        rank: axes of the grid; 2 with a relative bias, unless a tuple among the settings says otherwise.
        rel_bias: learn the relative bias; the authors' classes have it on, current NATTEN has none.
        compat: ``"authors"`` pads a map that is smaller than ``kernel_size * dilation``: zeros at the bottom and on the
            right, before the projections, which queries attend to as to any token; their outputs are cut off.
        options: as in :class:`attnlib.nn.local.fused_neighborhood_attention.FusedNeighborhoodAttention`.

    Reference: Hassani, Shi, 2022, arXiv 2209.15001, section 3.

    >>> import torch
    >>> DilatedNeighborhoodAttention(dim=16, num_heads=4, kernel_size=3, dilation=2)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: PerAxis = 7,
        dilation: PerAxis = 1,
        rank: int | None = None,
        rel_bias: bool = True,
        compat: str | None = None,
        **options: Any,
    ):
        check_choice("compat", compat, (None, "authors"))
        causal = options.get("causal", False)
        if (
            rank is None
            and rel_bias
            and causal is not True
            and all(isinstance(s, (int, bool)) for s in (kernel_size, dilation, causal))
        ):
            rank = 2
        super().__init__(dim, num_heads, kernel_size, dilation, rank=rank, rel_bias=rel_bias, **options)
        self.compat = compat

    def _missing(self, x: Tensor, layout: Layout | None) -> list[int]:
        """Tokens per axis that the authors' padding adds."""
        if self.compat != "authors" or layout is not None:
            return []
        grid = x.shape[1:-1]
        sides, steps, causal = (
            to_tuple(name, value, len(grid))
            for name, value in (
                ("kernel_size", self.kernel_size), ("dilation", self.dilation), ("causal", self.causal),
            )
        )  # fmt: skip
        return [0 if c else max(0, w * d - n) for n, w, d, c in zip(grid, sides, steps, causal, strict=True)]

    def mix(
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        mask: Mask | None = None,
        state: State | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        missing = self._missing(x, layout)
        if not any(missing):
            return super().mix(x, layout=layout, valid=valid, mask=mask, state=state, returns=returns)
        if mask is not None or returns:
            what = "mask" if mask is not None else f"returns={returns}"
            raise ValueError(
                f"{what} is not possible on a grid {tuple(x.shape[1:-1])} that compat='authors' pads: it needs "
                "at least kernel_size * dilation tokens per axis"
            )
        grid = x.shape[1:-1]
        ends = [end for m in reversed(missing) for end in (0, m)]
        if valid is not None:
            valid = F.pad(valid, ends, value=True)
        y = super().mix(F.pad(x, [0, 0, *ends]), valid=valid).y
        return Output(crop_grid(y, grid))
