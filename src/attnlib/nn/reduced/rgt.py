"""Recursive-generalization attention of RGT: every pixel reads a map that one convolution, applied again, made small.

Chen et al., 2023, "Recursive Generalization Transformer for Image Super-Resolution", arXiv 2303.06373. One depthwise
4 x 4 convolution of stride 4 is applied ``T`` times, with the same weights each time, so that few tokens are left:

    ``R = conv^T(x);  G = GELU(LN(W_c DWConv_3x3(R)))``
    ``q = W_q x, k = W_k G, v = W_v G;  y = W_o softmax(q k^T (c D)^-1/2) (v + DWConv_3x3(v))``

``R`` has the width of ``x``; ``G``, queries and keys have ``c`` times that, values the whole. On a map with sides ``H``
and ``W`` the authors take ``T = max log4(H // 4), log4(W // 4)`` in training and ``max(2, log4(H // 16),
log4(W // 16))`` afterwards, rounded down: the same weights serve larger maps by going deeper, and the number of keys
stays below a bound, whatever the map.

Differs from the authors' code: a cell that the map does not fill is read with zeros in the place of what is missing;
with ``compat="authors"`` it is left out, as in theirs, so that nobody reads the last rows and columns of such a map.
``T`` is counted in integers, where theirs rounds a logarithm; they agree. Maps below 4 or, after training, 16 pixels a
side, which theirs refuses, are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...ops.attention import attention
from ...types import Traits
from ..base import Mechanism
from ..layers import (
    ConvNorm,
    DepthwiseConv,
    PositionalConv,
    conv_any_size,
    flat_valid,
    head_dim_of,
    merge_heads,
    split_heads,
    strided_valid,
    through,
    zero_invalid,
)
from ..registry import register
from ..released import Released

SIDE = 4


def recursions_of(grid: Sequence[int], training: bool) -> int:
    """How often the authors apply the convolution on a map.

    >>> recursions_of((64, 64), True), recursions_of((64, 64), False), recursions_of((1024, 20), False)
    (2, 2, 3)
    """

    def floor_log(n: int) -> int:
        count = 0
        while n >= SIDE:
            n, count = n // SIDE, count + 1
        return count

    if training:
        return max(floor_log(n // 4) for n in grid)
    return max(2, *(floor_log(n // 16) for n in grid))


@register("rgt", "recursive-generalization-attention", "rg-sa")
class RecursiveGeneralization(Mechanism):
    """Attention from every token to a map that is made small by one convolution applied again and again.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim`` and ``int(dim * c_ratio)``.
        c_ratio: width of queries and keys over ``dim``.
        recursions: how often the convolution is applied; ``None``: as the authors do, by the size of the map and
            deeper in larger ones, with another rule in training than after it.
        qkv_bias: bias of the query, key and value maps.
        scale: of the scores; ``(c_ratio * dim / num_heads) ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        compat: ``"authors"``: cells that the map does not fill are left out.

    Shapes: x and y (B, H, W, C).

    Reference: Chen et al., 2023, arXiv 2303.06373, section 3.2.

    >>> import torch
    >>> RecursiveGeneralization(dim=96, num_heads=6)(torch.randn(1, 32, 48, 96)).shape
    torch.Size([1, 32, 48, 96])
    """

    zero_is_off = ("recursions",)
    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 2}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        c_ratio: float = 0.5,
        recursions: int | None = None,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        narrow = int(dim * check_real("c_ratio", c_ratio, above=0, most=1))
        head_dim = head_dim_of(dim, num_heads)
        if not narrow or narrow % num_heads:
            raise ValueError(
                f"c_ratio={c_ratio} makes keys of {narrow} channels of dim={dim}; that must be a multiple of "
                f"num_heads={num_heads}"
            )
        self.num_heads, self.compat, self.attn_drop = num_heads, compat, attn_drop
        self.recursions = recursions if recursions is None else check_int("recursions", recursions, least=0)
        self.reads_length = recursions is None
        self.scale = (head_dim * c_ratio) ** -0.5 if scale is None else scale
        self.reduce = nn.Conv2d(dim, dim, SIDE, SIDE, groups=dim)
        self.local = DepthwiseConv(dim, 3)
        self.narrow = ConvNorm(dim, narrow, norm=False, bias=True)
        self.norm = nn.LayerNorm(narrow)
        self.q = nn.Linear(dim, narrow, bias=qkv_bias)
        self.k = nn.Linear(narrow, narrow, bias=qkv_bias)
        self.v = nn.Linear(narrow, dim, bias=qkv_bias)
        self.position = PositionalConv(dim, 3)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    @property
    def traits(self) -> Traits:
        # With the authors' rule the number of keys goes up and down between 1 and 64 x 64 as maps grow: it is bounded.
        return self.class_traits.but(work={"N": 1 if self.recursions is None else 2})

    def depth(self, grid: Sequence[int]) -> int:
        """How often the convolution is applied on a map of these sides, in this mode."""
        return recursions_of(grid, self.training) if self.recursions is None else self.recursions

    def _small(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, h, w, C), and which of these exist."""
        for _ in range(self.depth(x.shape[1:-1])):
            if self.compat == "authors":  # one cell is left where not even one is full
                height, width = (n - n % SIDE if n > SIDE else n for n in x.shape[1:-1])
                x, valid = x[:, :height, :width], None if valid is None else valid[:, :height, :width]
            x = conv_any_size(self.reduce, x, self.reduce.weight, self.reduce.bias)
            valid = strided_valid(valid, SIDE)
            x = zero_invalid(x, valid)
        return x, valid

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        small, exists = self._small(x, valid)
        tokens = F.gelu(self.norm(self.narrow(self.local(small))))
        v = self.position(self.v(tokens), exists)
        q, k, v = (split_heads(t, self.num_heads) for t in (self.q(x), self.k(tokens), v))
        drop = self.attn_drop if self.training else 0.0
        out = attention(q, k, v, valid=flat_valid(exists), scale=self.scale, dropout_p=drop)
        return through(self.proj_drop, self.proj(merge_heads(out, x.shape[1:-1])))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``RG_SA``."""
        theirs = Released(state_dict, "the authors' RG_SA")
        return theirs.close(
            theirs.renamed(
                {
                    r"reduction1\.(weight|bias)": r"reduce.\1",
                    r"dwconv\.(weight|bias)": r"local.\1",
                    r"conv\.(weight|bias)": r"narrow.conv.\1",
                    r"norm_act\.0\.(weight|bias)": r"norm.\1",
                    r"(q|k|v|proj)\.(weight|bias)": r"\1.\2",
                    r"cpe\.(weight|bias)": r"position.conv.\1",
                }
            )
        )
