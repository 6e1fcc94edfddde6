"""Long and short distance attention of CrossFormer: groups of near tokens, or of tokens at an interval, by turns.

Wang et al., 2021, "CrossFormer: A Versatile Vision Transformer Hinging on Cross-scale Attention", arXiv 2108.00154.
*Near* groups are ``G x G`` neighbouring tokens. *Far* groups are ``G x G`` tokens that lie ``I`` apart: a block of
``G I`` tokens a side holds ``I x I`` of them, one between the other. Inside a group

    ``softmax(q k^T D^-1/2 + B[h, query - key]) v``

where ``B`` is no table but an MLP of the displacement, the dynamic position bias,

    ``B = L3(f(L2(f(L1(f(L0(d)))))))``, ``f = relu(norm(.))``

which has the same value for the same displacement in groups of any size. Its hidden width is ``dim / 16`` by default; a
norm over one or two channels leaves nothing but signs, so that it learns little where ``dim < 64``.

A map whose shorter side is no longer than ``G`` has near groups alone, of that side, as in the authors' classification
class; the weights serve any group. A map that groups do not divide is padded at its end with keys that nobody attends
to.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int
from ...grids import Windows
from ...masks import Mask
from ...positions import dense_window_bias
from ...types import Traits
from ..base import Mechanism
from ..layers import head_dim_of
from ..registry import register
from ..released import Released
from .maxvit import attend_in_windows

KINDS = ("near", "far")


class DynamicPositionBias(nn.Module):
    """A relative bias per head as a function of the displacement in tokens, as it is: three norms, four linear maps.

    Args:
        num_heads: tables.
        hidden: width of the layers in between.
        residual: the two layers in the middle are added to what they read.
        rank: axes of a group.
    """

    def __init__(self, num_heads: int, hidden: int, residual: bool = False, rank: int = 2):
        super().__init__()
        self.residual = check_flag("residual", residual)
        self.fc0 = nn.Linear(rank, hidden)
        self.fc1, self.fc2, self.fc3 = (nn.Linear(hidden, out) for out in (hidden, hidden, num_heads))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden) for _ in range(3))

    def forward(self, group: Sequence[int]) -> Tensor:
        """Sides of a group -> (num_heads, *(2 g - 1)), by displacements key minus query from 1 - g to g - 1."""
        like = self.norm1.weight  # a linear map may have become one of whole numbers
        sides = [torch.arange(g - 1, -g, -1, device=like.device, dtype=like.dtype) for g in group]  # it reads q - k
        y = self.fc0(torch.stack(torch.meshgrid(*sides, indexing="ij"), -1))
        for norm, linear in ((self.norm1, self.fc1), (self.norm2, self.fc2)):
            z = linear(F.relu(norm(y)))
            y = y + z if self.residual else z
        return self.fc3(F.relu(self.norm3(y))).movedim(-1, 0)


@register("crossformer", "lsda", "long-short-distance-attention")
class LongShortAttention(Mechanism):
    """One half of LSDA: attention in near groups or in far groups, with the dynamic position bias.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``. The authors' models have ``dim / 32``.
        group_size: tokens per side of a group, ``G``.
        kind: ``"near"``: groups of neighbouring tokens (SDA); ``"far"``: of tokens at an interval (LDA).
        interval: how far apart those lie, ``I``; ``None``: as far as one group reaches over the height of the map.
        rel_bias: the dynamic position bias.
        rel_hidden: its hidden width; ``dim // 16``, and at least 1, by default.
        rel_residual: its layers in the middle are residual.
        qkv_bias: bias of the query, key and value projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        pad: of maps that groups do not divide: ``"mask"`` or ``"zeros"``, which take part (``no_mask`` of theirs).

    Reference: Wang et al., 2021, arXiv 2108.00154, sections 3.2 and 3.3.

    >>> LongShortAttention(dim=64, num_heads=2, group_size=2, kind="far", interval=2)(torch.randn(1, 8, 4, 64)).shape
    torch.Size([1, 8, 4, 64])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), mask=True, work={"N": 1}, memory={"N": 1}
    )

    table: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        group_size: int = 7,
        kind: str = "near",
        interval: int | None = 1,
        rel_bias: bool = True,
        rel_hidden: int | None = None,
        rel_residual: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("kind", kind, KINDS)
        check_choice("pad", pad, ("mask", "zeros"))
        self.pad, self.kind, self.num_heads = pad, kind, num_heads
        self.head_dim = head_dim_of(dim, num_heads)
        self.group_size = check_int("group_size", group_size, least=1)
        self.interval = interval if interval is None else check_int("interval", interval, least=1)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        hidden = max(1, dim // 16) if rel_hidden is None else rel_hidden
        self.rel_bias = DynamicPositionBias(num_heads, hidden, rel_residual) if rel_bias else None
        self.register_buffer("table", None)

    def groups(self, grid: Sequence[int]) -> tuple[int, int]:
        """Side of a group and interval on this grid; the grid may be padded for it already."""
        if min(grid) <= self.group_size:
            return max(1, min(grid)), 1
        if self.kind == "near":
            return self.group_size, 1
        return self.group_size, -(-grid[0] // self.group_size) if self.interval is None else self.interval

    def _full_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        group, interval = self.groups(grid)
        return tuple(-(-n // (group * interval)) * group * interval for n in grid)

    def _bias(self, group: int) -> Tensor | None:
        """(heads, S, S) inside a group."""
        if self.table is not None:  # the displacements of a smaller group lie in its middle
            out = self.group_size - group
            side = slice(out, out + 2 * group - 1)
            return dense_window_bias(self.table[:, side, side], (group, group))
        return None if self.rel_bias is None else dense_window_bias(self.rel_bias((group, group)), (group, group))

    @torch.no_grad()
    def deployed(self) -> nn.Module:
        """The same with the values of its bias laid out once."""
        out = copy.deepcopy(self).eval()
        if out.rel_bias is not None:
            out.table, out.rel_bias = out.rel_bias((self.group_size,) * 2), None
        return out

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        mask: Mask | None = None,
    ) -> Tensor:
        grid = tuple(x.shape[1:-1])
        group, interval = self.groups(grid)
        windows = Windows(grid, (group,) * 2, interval=(interval,) * 2)
        return attend_in_windows(self, x, windows, self._bias(group), self.scale, valid, mask)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention``: ``qkv.*``, ``proj.*``, ``pos.*``."""
        theirs = Released(state_dict, "CrossFormer's Attention")
        theirs.leave(r"biases|relative_position_index", because="constants")
        rules: dict[str, Any] = {r"(qkv|proj)\.(weight|bias)": r"\1.\2"}
        rules[r"pos\.pos_proj\.(weight|bias)"] = r"rel_bias.fc0.\1"
        rules[r"pos\.pos([123])\.0\.(weight|bias)"] = r"rel_bias.norm\1.\2"
        rules[r"pos\.pos([123])\.2\.(weight|bias)"] = r"rel_bias.fc\1.\2"
        return theirs.close(theirs.renamed(rules))
