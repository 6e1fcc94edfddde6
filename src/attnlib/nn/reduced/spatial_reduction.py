"""Spatial-reduction attention: every token reads the map made small by a strided convolution.

Wang et al., 2022, "PVT v2", arXiv 2106.13797; Xie et al., 2021, "SegFormer", arXiv 2105.15203, section 3.1. With a
ratio ``s`` the keys are ``x' = LN(conv_(s x s, stride s) x)``, and

    ``y = W_o softmax(q k^T D^-1/2) v``,  ``q = W_q x``,  ``k, v = W_kv x'``

for ``N^2 / s^2`` pairs. ``s = 1`` is plain attention. It is the attention of DATR's first three stages
(:mod:`attnlib.models.dense.datr`).

Differs from the authors' code: a map that ``s`` does not divide is read to its end, completed with zeros; theirs leaves
out the last rows and columns, and so does this with ``compat="authors"``, which released weights were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...ops import attention
from ...types import Traits
from ..base import Mechanism
from ..layers import (
    conv_any_size,
    flat_valid,
    head_dim_of,
    init_fan_out,
    merge_heads,
    split_heads,
    strided_valid,
    through,
    zero_invalid,
)
from ..registry import register
from ..released import Released


@register("spatial-reduction-attention", "sra")
class SpatialReductionAttention(Mechanism):
    """Queries of every token, keys and values of ``sr_ratio x sr_ratio`` cells.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        sr_ratio: side of a cell.
        qkv_bias: bias of the query, key and value projections.
        scale: ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        compat: ``"authors"``: rows and columns behind the last whole cell are not read.

    Shapes: x and y (B, H, W, C).

    Reference: Wang et al., 2022, arXiv 2106.13797; Xie et al., 2021, arXiv 2105.15203, eq. 1 and 2.

    >>> import torch
    >>> SpatialReductionAttention(dim=16, num_heads=2, sr_ratio=4)(torch.randn(2, 8, 10, 16)).shape
    torch.Size([2, 8, 10, 16])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 2}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.sr_ratio, self.compat = check_int("sr_ratio", sr_ratio, least=1), compat
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(proj_drop)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None
        for linear in (self.q, self.kv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.sr is not None:
            init_fan_out(self.sr)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(permutation_equivariant=self.sr is None)

    def reduced(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What keys and values are made of: (B, H, W, C) -> (B, h, w, C), and which of these exist."""
        if self.sr is None or self.norm is None:
            return x, valid
        if self.compat is not None:
            # A map that is smaller than a cell, on which theirs fails, is read as it is.
            height, width = (n - n % self.sr_ratio or n for n in x.shape[1:3])
            x = x[:, :height, :width]
            valid = None if valid is None else valid[:, :height, :width]
        x = conv_any_size(self.sr, zero_invalid(x, valid), self.sr.weight, self.sr.bias)
        return self.norm(x), strided_valid(valid, self.sr_ratio)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        source, exists = self.reduced(x, valid)
        q = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(t, self.num_heads) for t in self.kv(source).chunk(2, -1))
        out = attention(
            q, k, v, valid=flat_valid(exists), scale=self.scale, dropout_p=self.attn_drop if self.training else 0.0
        )
        return through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:-1])))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the ``Attention`` of SegFormer, PVTv2 and DATR: ``q``, ``kv``, ``proj``, ``sr``, ``norm``."""
        theirs = Released(state_dict, "the authors' Attention")
        return theirs.close(theirs.renamed({r"(q|kv|proj|sr|norm)\.(weight|bias)": r"\1.\2"}))
