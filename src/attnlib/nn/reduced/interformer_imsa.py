"""Pooling attention of InterFormer's I-MSA: queries read maxima of cells of several sizes, laid over one map.

Huang et al., 2023, "InterFormer: Real-time Interactive Image Segmentation", arXiv 2304.02942. Of the map ``F`` that is
read, the tokens themselves in self-attention or what an encoder made of the image, once and for all clicks, in
cross-attention, a pyramid is made:

    ``P_r = pool_r(F);  P_r <- P_r + DWConv_r(P_r);  K = LN(concat_r P_r)``
    ``y = W_o softmax(W_q x (W_k K)^T D^-1/2) W_v K``

``pool_r`` takes the maximum of each cell of a grid of about ``target / r`` cells a side, where ``target`` is the side
that the layer was built for: a map of any size has about as many cells. Of a side of ``h`` tokens

    ``n = min(target / r, h)``, cells: ``round(h / round(h / n))``

so that cells are nearly alike. A ratio of 1 reads the map as it is.

Differs from the authors' code: where rounding leaves no cell there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_grid, check_ints
from ...ops.attention import attention
from ...types import Traits, to_tuple
from ..base import Mechanism
from ..layers import (
    PositionalConv,
    flat_valid,
    head_dim_of,
    merge_heads,
    split_heads,
    through,
    zero_invalid,
)
from ..registry import register
from ..released import Released


def cells_of(side: int, target: int, ratio: int) -> int:
    """Cells along a side of ``side`` tokens.

    >>> [cells_of(128, 128, r) for r in (12, 16, 20, 24)], cells_of(100, 128, 12), cells_of(3, 128, 12)
    ([11, 8, 6, 5], 11, 3)
    """
    if ratio == 1:
        return side
    cells = min(target / ratio, side)
    return max(1, round(side / max(1, round(side / cells))))


@register("interformer-imsa", "pooling-attention", "pmsa")
class PoolingAttention(Mechanism):
    """Attention to maxima of cells of several sizes.

    Args:
        dim: width of ``x`` and of ``context``.
        num_heads: heads; must divide ``dim``.
        pool_ratios: tokens of ``target_size`` per side of a cell, one number per level of the pyramid.
        target_size: sides of the map that the layer is built for, which bound the number of cells; ``None``: those of
            the map that is read.
        qkv_bias: bias of the query, key and value maps.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.

    Shapes: x and y (B, H, W, C); ``context`` (B, H', W', C), any other map, which is read instead of ``x``.

    Reference: Huang et al., 2023, arXiv 2304.02942, section 3.3.

    >>> m = PoolingAttention(dim=16, num_heads=2, pool_ratios=(2, 4))
    >>> m(torch.randn(1, 5, 6, 16), torch.randn(1, 10, 12, 16)).shape
    torch.Size([1, 5, 6, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self", "noncausal-cross"}),
        grid_ranks=frozenset({2}),
        work={"N": 2},
        memory={"N": 1},
    )
    reads_length = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        pool_ratios: Sequence[int] = (1, 2, 3, 4),
        target_size: int | Sequence[int] | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.pool_ratios = check_ints("pool_ratios", pool_ratios, least=1)
        if not self.pool_ratios:
            raise ValueError("pool_ratios must hold at least one number, got none")
        self.target_size = None
        if target_size is not None:
            self.target_size = check_grid("target_size", to_tuple("target_size", target_size, 2))
        self.scale, self.attn_drop = self.head_dim**-0.5 if scale is None else scale, attn_drop
        self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.local = nn.ModuleList(PositionalConv(dim, 3) for _ in self.pool_ratios)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        bounded = self.target_size is not None and 1 not in self.pool_ratios
        return self.class_traits.but(work={"N": 1 if bounded else 2})

    def cells(self, grid: Sequence[int]) -> list[tuple[int, int]]:
        """Cells per side of every level, of a map of these sides."""
        target = self.target_size or grid
        return [
            (cells_of(grid[0], target[0], r), cells_of(grid[1], target[1], r)) for r in self.pool_ratios
        ]  # fmt: skip

    def _pyramid(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, M, C), and which of these exist."""
        grid = tuple(x.shape[1:3])
        levels, exist = [], []
        low = None if valid is None else x.masked_fill(~valid.unsqueeze(-1), -torch.inf)
        for cells, local in zip(self.cells(grid), self.local, strict=True):
            pooled, some = x, valid
            if cells != grid:
                pooled = F.adaptive_max_pool2d((x if low is None else low).permute(0, 3, 1, 2), cells)
                pooled = pooled.permute(0, 2, 3, 1)
                if valid is not None:
                    some = F.adaptive_max_pool2d(valid.unsqueeze(1).to(x.dtype), cells)[:, 0] > 0
                    pooled = zero_invalid(pooled, some)
            levels.append(local(pooled, some).flatten(1, 2))
            if some is not None:
                exist.append(some.flatten(1))
        return self.norm(torch.cat(levels, 1)), torch.cat(exist, 1) if exist else None

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        context_valid: Tensor | None = None,
    ) -> Tensor:
        if context is None:
            context, context_valid = x, valid
        elif context.dim() != 4:
            raise ValueError(f"context must be a map (B, H, W, C), got {tuple(context.shape)}")
        keys, exist = self._pyramid(context, context_valid)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), *self.kv(keys).chunk(2, -1)))
        drop = self.attn_drop if self.training else 0.0
        out = attention(q, k, v, valid=flat_valid(exist), scale=self.scale, dropout_p=drop)
        return through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:-1])))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``PoolingAttention``."""
        theirs = Released(state_dict, "the authors' PoolingAttention")
        return theirs.close(
            theirs.renamed(
                {
                    r"query_proj\.(weight|bias)": r"q.\1",
                    r"key_value_proj\.(weight|bias)": r"kv.\1",
                    r"dconvs\.(\d+)\.(weight|bias)": r"local.\1.conv.\2",
                    r"(norm|proj)\.(weight|bias)": r"\1.\2",
                }
            )
        )
