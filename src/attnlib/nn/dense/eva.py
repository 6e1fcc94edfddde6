"""EVA's attention: softmax attention without a key bias, with BEiT's relative or EVA-02's rotary positions.

Fang et al., 2022, "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale", arXiv 2211.07636.

    o_h = softmax(q_h k_h^T / sqrt(D) + B_h) v_h,    q = W_q x + b_q,  k = W_k x,  v = W_v x + b_v

``B_h`` is absent in the released models. With ``relative="table"`` it is one learned number per displacement of two
patches; with ``"axes"`` the sum of one per row and one per column displacement. Tokens beside the patches have three
numbers of their own: from them to a patch, from a patch to them, and among them.

EVA-02 (Fang et al., 2023, "EVA-02: A Visual Representation for Neon Genesis", arXiv 2303.11331) turns queries and keys
of patches by their row and column, neighbouring channels together, half of a head for each axis; places are those of
the grid of pretraining, to which other grids are stretched (``rotary_grid``). Its models for CLIP norm the heads'
outputs side by side before the last projection (``inner_norm``).

Differs from the authors' class: tables serve any grid, interpolated (bicubic) where it is another than that they were
made for, instead of one fixed grid; more than one token may stand beside the patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_grid, check_real
from ...grids import Layout, coordinates
from ...masks import Mask
from ...ops import attention
from ...positions import dense_window_bias, resized, rotary_angles, rotate
from ...types import Output, Traits
from ..base import Mechanism
from ..layers import flat_valid, head_dim_of, merge_heads, split_heads
from ..registry import register
from ..released import Released, split_rule

#: What ``relative`` can be.
RELATIVE = (None, "table", "axes")


class RelativeTable(nn.Module):
    """A bias per head and displacement of patches, and of pairs with tokens beside them.

    Args:
        num_heads: tables.
        grid: patches (h, w) that the table is made for.
        axes: one table per axis, added up, instead of one of both.
    """

    def __init__(self, num_heads: int, grid: Sequence[int], axes: bool = False):
        super().__init__()
        self.grid, self.axes = tuple(grid), axes
        height, width = (2 * side - 1 for side in self.grid)
        if axes:
            self.rows = nn.Parameter(torch.zeros(num_heads, height))
            self.columns = nn.Parameter(torch.zeros(num_heads, width))
            self.beside_rows = nn.Parameter(torch.zeros(num_heads, 3))
            self.beside_columns = nn.Parameter(torch.zeros(num_heads, 3))
        else:
            self.table = nn.Parameter(torch.zeros(num_heads, height, width))
            self.beside = nn.Parameter(torch.zeros(num_heads, 3))
        self.tables = {"rows": 1, "columns": 1} if axes else {"table": 2}

    def forward(self, grid: Sequence[int], before: int = 0, after: int = 0) -> Tensor:
        """(H, N, N) for a grid (h, w) with so many tokens before and behind it; rows are queries."""
        height, width = (2 * side - 1 for side in grid)
        if self.axes:
            rows, columns = resized(self.rows, (height,)), resized(self.columns, (width,))
            table, beside = rows[:, :, None] + columns[:, None], self.beside_rows + self.beside_columns
        else:
            table, beside = resized(self.table, (height, width)), self.beside
        bias = dense_window_bias(table, grid)
        if not before + after:
            return bias
        count = bias.shape[1]
        away, back, own = (beside[:, i, None, None] for i in range(3))
        ends = [(before, count), (after, count)]
        bias = torch.cat([away.expand(-1, *ends[0]), bias, away.expand(-1, *ends[1])], 1)
        sides = []
        for size in (before, after):
            to_beside = back.expand(-1, count, size)
            parts = [own.expand(-1, before, size), to_beside, own.expand(-1, after, size)]
            sides.append(torch.cat(parts, 1))
        return torch.cat([sides[0], bias, sides[1]], 2)


@register("eva")
class EvaAttention(Mechanism):
    """Softmax attention with biases of queries and values, and relative positions.

    Args:
        dim: width of ``x``.
        num_heads: heads.
        head_dim: width of a head; ``dim / num_heads`` by default.
        qkv_bias: biases of the query and the value projection.
        relative: ``None``, ``"table"`` or ``"axes"``; the last two need maps, or a layout with one.
        grid: patches (h, w) that tables are made for.
        scale: of the scores; ``1 / sqrt(head_dim)`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        rotary: base of rotary positions of patches; ``None`` for none. They need maps, or a layout with one, and heads
            that are a multiple of 4 wide.
        rotary_grid: grid (h, w) that every other one is stretched to; ``None`` takes places as they are.
        inner_norm: LayerNorm of all heads' outputs before the last projection.

    Raises:
        ValueError: heads that do not divide the width, another ``relative``, a grid that is none.

    >>> EvaAttention(dim=16, num_heads=2, relative="table", grid=(3, 3))(torch.randn(2, 4, 5, 16)).shape
    torch.Size([2, 4, 5, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        layout=True,
        work={"N": 2},
        memory={"N": 2},
        permutation_equivariant=True,
        weights=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        relative: str | None = None,
        grid: Sequence[int] = (14, 14),
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        rotary: float | None = None,
        rotary_grid: Sequence[int] | None = None,
        inner_norm: bool = False,
    ):
        super().__init__(dim)
        check_choice("relative", relative, RELATIVE)
        self.num_heads = num_heads
        self.head_dim = head_dim_of(dim, num_heads) if head_dim is None else head_dim
        self.rotary = None if rotary is None else check_real("rotary", rotary, above=0)
        if self.rotary is not None and self.head_dim % 4:
            raise ValueError(f"head_dim={self.head_dim} must be a multiple of 4 for rotary positions of two axes")
        if rotary_grid is not None and self.rotary is None:
            raise ValueError("rotary_grid was given without rotary")
        self.rotary_grid = None if rotary_grid is None else check_grid("rotary_grid", rotary_grid, (2,))
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop
        width = num_heads * self.head_dim
        self.q = nn.Linear(dim, width, bias=qkv_bias)
        self.k = nn.Linear(dim, width, bias=False)
        self.v = nn.Linear(dim, width, bias=qkv_bias)
        self.norm = nn.LayerNorm(width, eps=1e-6) if check_flag("inner_norm", inner_norm) else nn.Identity()
        self.proj = nn.Linear(width, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        side = check_grid("grid", grid, (2,))
        self.relative = None if relative is None else RelativeTable(num_heads, side, relative == "axes")

    @property
    def traits(self) -> Traits:
        if self.relative is None and self.rotary is None:
            return self.class_traits.but(memory={"N": 1})
        if self.relative is None:
            return self.class_traits.but(grid_ranks=frozenset({2}), permutation_equivariant=False, memory={"N": 1})
        return self.class_traits.but(grid_ranks=frozenset({2}), permutation_equivariant=False)

    @staticmethod
    def _patches(grid: Sequence[int], layout: Layout | None) -> tuple[tuple[int, ...], int, int]:
        """The grid of the patches, and how many tokens stand before and behind it."""
        if layout is None:
            return tuple(grid), 0, 0
        name = layout.grid_name()
        own = layout.grid(name)
        if len(own) != 2:
            raise ValueError(f"layout's grid {name!r} must have two axes, got {own}")
        start, stop = layout.span(name)
        return own, start, len(layout) - stop

    def _angles(self, grid: Sequence[int], before: int, after: int, device: torch.device) -> Tensor:
        """(N, D / 2): by how much queries and keys are turned; those beside the patches are not."""
        assert self.rotary is not None
        at = coordinates(grid, device).to(torch.float32)
        if self.rotary_grid is not None:
            at = at / at.new_tensor(grid) * at.new_tensor(self.rotary_grid)
        angles = rotary_angles(at, self.head_dim, self.rotary, grid=grid)
        return F.pad(angles, (0, 0, before, after)) if before + after else angles

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        layout: Layout | None = None,
        valid: Tensor | None = None,
        mask: Mask | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        grid = x.shape[1:-1]
        q, k, v = (split_heads(part(x), self.num_heads) for part in (self.q, self.k, self.v))
        bias = None
        if self.relative is not None or self.rotary is not None:
            patches, before, after = self._patches(grid, layout)
            bias = None if self.relative is None else self.relative(patches, before, after)
            if self.rotary is not None:
                angles = self._angles(patches, before, after, x.device)
                q, k = rotate(q, angles, interleaved=True), rotate(k, angles, interleaved=True)
        out, weights = attention(
            q, k, v, mask=mask, bias=bias, valid=flat_valid(valid), scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0, return_weights="weights" in returns,
        ), None  # fmt: skip
        if "weights" in returns:
            out, weights = out  # type: ignore[misc]
        return Output(self.proj_drop(self.proj(self.norm(merge_heads(out, grid)))), weights=weights)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor], grid: Sequence[int] | None = None) -> dict[str, Tensor]:
        """From the authors' ``Attention`` or timm's ``EvaAttention``.

        Args:
            state_dict: theirs.
            grid: patches (h, w) of a table of positions; a square by default.
        """
        theirs = Released(state_dict, "EVA's Attention")
        theirs.leave(r"rope\.freqs_(cos|sin)", because="constants of a grid")
        theirs.leave(r"(?:rel_pos_bias\.)?relative_position(_high|_width)?_index", because="a constant of a grid")
        return theirs.close(
            theirs.renamed(
                {
                    r"qkv\.(weight)": split_rule("q", "k", "v"),
                    r"([qv])_bias": r"\1.bias",
                    r"([qkv])_proj\.(weight|bias)": r"\1.\2",
                    r"proj\.(weight|bias)": r"proj.\1",
                    r"(?:norm|inner_attn_ln)\.(weight|bias)": r"norm.\1",
                    r"(?:rel_pos_bias\.)?relative_position_bias_table": lambda match, value: _table(value, grid),
                    r"rel_pos_bias\.relative_position_bias_for_(high|width)": lambda match, value: _axis(
                        "rows" if match[1] == "high" else "columns", value
                    ),
                }
            )
        )


def _table(theirs: Tensor, grid: Sequence[int] | None) -> dict[str, Tensor]:
    """BEiT's (displacements + 3, H), by query minus key, as ours by key minus query."""
    count = theirs.shape[0] - 3
    if grid is None:
        side = round(count**0.5) if count > 0 else 0
        sides = [side, side]
    else:
        sides = [2 * n - 1 for n in grid]
    if count < 1 or sides[0] * sides[1] != count:
        raise ValueError(f"it has {count} displacements, which are none of a grid {grid or 'with equal sides'}")
    table = theirs[:count].T.unflatten(1, sides).flip(1, 2)
    return {"relative.table": table.contiguous(), "relative.beside": theirs[count:].T.contiguous()}


def _axis(name: str, theirs: Tensor) -> dict[str, Any]:
    return {
        f"relative.{name}": theirs[:-3].transpose(0, -1).contiguous(),
        f"relative.beside_{name}": theirs[-3:].transpose(0, -1).contiguous(),
    }
