"""Overlapping cross-attention of HAT: windows of queries read larger windows of keys that overlap each other.

Chen et al., 2023, "HAT: Hybrid Attention Transformer for Image Restoration", arXiv 2309.05239. The map is cut into
windows of ``w`` tokens a side; the queries of one read the ``w + 2 h`` keys a side around it, with
``h = overlap_ratio * w / 2``:

    ``softmax(q k^T D^-1/2 + B[h, key - query + w - 1]) v``

with a learned table ``B`` of ``(2 w + 2 h - 1)`` displacements a side. It is a halo attention (Vaswani et al., 2021)
with a table for a bias. ``overlap_ratio = 0`` is attention in windows.

Differs from the authors' code: what lies outside the map is no key; with ``compat="authors"`` it is keys and values of
zeros, as in theirs, which every released model was trained with. Their index into the table is negative in part and
wraps around; the table here has one entry per displacement, and :meth:`OverlappingCrossAttention.convert_state_dict`
puts theirs in order.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_int, check_real
from ...ops.halo import halo_attention
from ...positions import dense_window_bias
from ...types import Traits
from ..base import PADS, Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released


def overlap_of(window_size: int, overlap_ratio: float) -> int:
    """Tokens that a window of keys reaches beyond its window of queries, on every side."""
    more = int(check_int("window_size", window_size, least=1) * check_real("overlap_ratio", overlap_ratio, least=0))
    if more % 2:
        raise ValueError(
            f"overlap_ratio={overlap_ratio} makes windows of {window_size} tokens {more} larger; that must be even"
        )
    return more // 2


@register("hat", "overlapping-cross-attention", "ocab")
class OverlappingCrossAttention(Mechanism):
    """Windows of queries, larger windows of keys.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        window_size: queries a side of a window.
        overlap_ratio: how much larger, relative to ``window_size``, a window of keys is; the difference must be even.
        qkv_bias: bias of the query, key and value projections.
        scale: ``head_dim ** -0.5`` by default.
        compat: ``"authors"``: keys and values outside the map are zeros that take part.
        pad: of a grid that windows do not divide: ``"mask"``, ``"zeros"`` or ``"refuse"``.

    Shapes: x and y (B, H, W, C).

    Reference: Chen et al., 2023, arXiv 2309.05239, section 3.2.3.

    >>> OverlappingCrossAttention(dim=16, num_heads=2, window_size=4)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    zero_is_off = ("overlap_ratio",)
    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 6,
        window_size: int = 16,
        overlap_ratio: float = 0.5,
        qkv_bias: bool = True,
        scale: float | None = None,
        compat: str | None = None,
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        check_choice("pad", pad, PADS)
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.halo = overlap_of(window_size, overlap_ratio)
        self.window_size, self.compat, self.pad = window_size, compat, pad
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        sides = 2 * (window_size + self.halo) - 1
        self.rel_bias = nn.Parameter(torch.empty(num_heads, sides, sides))
        nn.init.trunc_normal_(self.rel_bias, std=0.02)

    @property
    def tables(self) -> dict[str, int]:
        """Tables of places, by how many of their last axes are places."""
        return {"rel_bias": 2}

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_multiple=self._grid_multiple)

    @property
    def grid_step(self) -> int:
        return self.window_size

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        grid = x.shape[1:-1]
        q, k, v = (split_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        w, side = self.window_size, self.window_size + 2 * self.halo
        bias = dense_window_bias(self.rel_bias, (w, w), (side, side))
        out = halo_attention(
            q, k, v, grid, self.window_size, self.halo, border="mask" if self.compat is None else "zeros",
            bias=bias, valid=flat_valid(valid), scale=self.scale,
        )  # fmt: skip
        return self.proj(merge_heads(out, grid))

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor], window_size: int = 16, overlap_ratio: float = 0.5
    ) -> dict[str, Tensor]:
        """From the authors' ``OCAB``; its norms and its MLP are no part of this mechanism and are left out by name.

        Args:
            state_dict: ``qkv.*``, ``proj.*`` and ``relative_position_bias_table``.
            window_size, overlap_ratio: theirs, which say how their index wraps around.
        """
        theirs = Released(state_dict, "the authors' OCAB")
        theirs.leave(r"norm[12]\..*|mlp\..*", because="parts of the block around the mechanism")
        table = theirs.take("relative_position_bias_table")
        w, more = window_size, 2 * overlap_of(window_size, overlap_ratio)
        sides = 2 * w + more - 1
        if table.shape[0] != sides * sides:
            raise ValueError(
                f"relative_position_bias_table has {table.shape[0]} displacements, which is not that of "
                f"window_size={window_size} and overlap_ratio={overlap_ratio}: {sides * sides}"
            )
        at = torch.arange(sides) - (w - 1) + 1 - more  # of displacements from -(w - 1) on
        index = (at[:, None] * sides + at) % (sides * sides)
        out = {"rel_bias": table[index].permute(2, 0, 1).contiguous()}
        return theirs.close(out | theirs.renamed({r"(qkv|proj)\.(weight|bias)": r"\1.\2"}))
