"""The attention of the Dilated Neighborhood Attention Transformer (and of NAT, its undilated case).

Hassani, Shi, 2022, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001: neighborhood attention with
``kernel_size`` keys ``dilation`` tokens apart and a learned relative bias
``softmax(q k^T D^-1/2 + rpb[h, key - query + w - 1]) v``, keys and queries counted in units of dilation. The table is
indexed *key minus query*, opposite to Swin's. ``dilation = 1`` is local, ``dilation = floor(X / w)`` sparse and global;
the transformer alternates both. Parameters carry the authors' names: ``qkv``, ``proj``, ``rpb``.

Differs from the authors' code: a map smaller than ``kernel_size * dilation`` is padded with tokens that nobody attends
to, unless ``compat="authors"`` pads it with zeros that are attended, as their modules do; odd and even kernels are both
possible.
"""

from __future__ import annotations

from typing import Any

from ...checks import check_choice
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
        if compat is not None:
            options = {"pad": "zeros", **options}
        super().__init__(dim, num_heads, kernel_size, dilation, rank=rank, rel_bias=rel_bias, **options)
        self.compat = compat
