"""Halo attention of HaloNet: blocks of queries read their block and a halo of keys around it.

Vaswani et al., 2021, "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731. The map
is cut into blocks of ``b`` tokens a side; all queries of a block read the same ``w = b + 2 h`` keys a side:

    ``softmax(q k^T D^-1/2 + q . R_y[key - query] + q . R_x[key - query]) v``

with one learned vector per displacement and axis, shared by all heads; in the position term q is not scaled. Keys are
shared by a block, so that windows are copied once per block and not once per query. ``h = 0`` is attention in windows,
``b = 1`` a sliding window of ``2 h + 1``. There is no output projection: the 1 x 1 convolution of the block follows.

Attention downsampling keeps every second query of a block and all of its keys: :class:`HaloDownsampling`.

No authors' code in PyTorch exists; parameters and weights are those of timm's ``HaloAttn``. Differs from it: keys
outside the map do not exist (``pad_mode="masked"``); ``"zero"`` leaves them in the softmax as zeros, as timm does and
its weights know it, ``"clamp"`` moves windows inside the map. With a stride timm takes the displacement of the k-th
query as if it stood at ``k`` and not at ``k`` strides: ``compat="authors"``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_rank, check_real, check_width
from ...ops.halo import halo_attention
from ...types import Traits, check_divides
from ..base import PADS, Mechanism
from ..layers import cell_means, flat_valid, merge_heads, split_heads, strided_valid, zero_invalid
from ..registry import register
from ..released import Released, Rule

#: The border of ops.halo_attention for each padding.
BORDERS = {"masked": "mask", "zero": "zeros", "clamp": "clamp"}


def qk_head_dim(out_dim: int, num_heads: int, qk_ratio: float) -> int:
    """Width of heads of queries and keys: ``out_dim * qk_ratio`` to the nearest multiple of 8, but not below 9 / 10 of
    it, over the heads."""
    whole = out_dim * qk_ratio
    rounded = max(8, int(whole + 4) // 8 * 8)
    return (rounded + 8 if rounded < 0.9 * whole else rounded) // num_heads


class _Halo(nn.Module):
    """Projections, tables of positions, and blocks."""

    def __init__(
        self, dim: int, out_dim: int, num_heads: int, block_size: int, halo_size: int, head_dim: int | None,
        qk_ratio: float, qkv_bias: bool, scale_pos_embed: bool, pad_mode: str, stride: int = 1,
        compat: str | None = None,
    ):  # fmt: skip
        super().__init__()
        check_choice("pad_mode", pad_mode, tuple(BORDERS))
        check_choice("compat", compat, (None, "authors"))
        check_int("block_size", block_size, least=1)
        check_int("halo_size", halo_size, least=0)
        check_real("qk_ratio", qk_ratio, above=0)
        check_flag("qkv_bias", qkv_bias)
        check_flag("scale_pos_embed", scale_pos_embed)
        check_divides("num_heads", num_heads, "the width of the output", out_dim)
        check_divides("stride", stride, "block_size", block_size)
        self.num_heads, self.block_size, self.halo_size, self.stride = num_heads, block_size, halo_size, stride
        self.head_dim = qk_head_dim(out_dim, num_heads, qk_ratio) if head_dim is None else head_dim
        if self.head_dim < 1:
            raise ValueError(f"qk_ratio={qk_ratio} leaves nothing for {num_heads} heads; give head_dim")
        self.value_dim, self.scale = out_dim // num_heads, self.head_dim**-0.5
        self.scale_pos_embed, self.pad_mode, self.compat = scale_pos_embed, pad_mode, compat
        self.q = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(dim, num_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(dim, out_dim, bias=qkv_bias)
        window = block_size + 2 * halo_size
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, self.head_dim))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, self.head_dim))
        for layer in (self.q, self.k, self.v):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5)
        for table in (self.height_rel, self.width_rel):
            nn.init.trunc_normal_(table, std=self.scale)

    def _tables(self, q: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """One (B, H, N, L) per axis: ``q . R`` at displacements from ``-(L // 2)`` to ``L // 2``."""
        window, queries = self.block_size + 2 * self.halo_size, self.block_size // self.stride
        reach = (window if self.pad_mode == "clamp" else self.block_size + self.halo_size) - 1
        gap = torch.arange(-reach, reach + 1, device=q.device)
        # timm counts keys from the start of the window, and queries from that of the block
        at = (gap + self.halo_size).expand(queries, -1)
        if self.compat is not None:
            at = at + torch.arange(queries, device=q.device)[:, None] * (self.stride - 1)
        # the displacements that only a window moved inside has stand in entries that no other reads
        at = (at + window - 1) % (2 * window - 1)
        split = q.unflatten(2, grid)
        out = []
        for axis, table in enumerate((self.height_rel, self.width_rel)):
            if self.stride == 1 or self.compat is None:
                scores = q @ table.index_select(0, at[0]).T
            else:  # every place in a block has displacements of its own
                rows = split.unflatten(2 + axis, (-1, queries)).movedim(3 + axis, 0)
                some = torch.stack([r @ table.index_select(0, a).T for r, a in zip(rows, at, strict=True)])
                scores = some.movedim(0, 3 + axis).flatten(2 + axis, 3 + axis).flatten(2, 3)
            out.append(scores * self.scale if self.scale_pos_embed else scores)
        return out

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """(B, H, W, dim), sides multiples of the block -> (B, H / stride, W / stride, out_dim)."""
        grid, s = tuple(x.shape[1:-1]), self.stride
        few = x[:, ::s, ::s]
        k, v = (split_heads(layer(x), self.num_heads) for layer in (self.k, self.v))
        q, q_grid = split_heads(self.q(few), self.num_heads), (few.shape[1], few.shape[2])
        out = halo_attention(
            q, k, v, q_grid, self.block_size // s, self.halo_size, k_grid=grid, k_block=self.block_size,
            border=BORDERS[self.pad_mode], axis_tables=self._tables(q, q_grid), valid=flat_valid(valid),
            scale=self.scale,
        )  # fmt: skip
        return merge_heads(out, q_grid)


def _convert(state_dict: Mapping[str, Tensor], num_heads: int, head_dim: int | None) -> dict[str, Tensor]:
    theirs = Released(state_dict, "timm's HaloAttn or BottleneckAttn")

    def qkv(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
        rows = value.flatten(1) if value.dim() > 1 else value
        check_divides("num_heads", num_heads, f"rows of {match.string}", rows.shape[0])
        width = rows.shape[0] // 3 if head_dim is None else head_dim * num_heads
        q, k, v = rows.split([width, width, rows.shape[0] - 2 * width])
        return {f"{name}.{match[1]}": part for name, part in (("q", q), ("k", k), ("v", v))}

    def kv(match: re.Match[str], value: Tensor) -> dict[str, Tensor]:
        rows = value.flatten(1) if value.dim() > 1 else value
        check_divides("num_heads", num_heads, f"rows of {match.string}", rows.shape[0])
        by_head = rows.unflatten(0, (num_heads, -1))
        # keys and values of a head lie side by side; with heads of one width each has half
        width = by_head.shape[1] // 2 if head_dim is None else head_dim
        k, v = by_head[:, :width].flatten(0, 1), by_head[:, width:].flatten(0, 1)
        return {f"k.{match[1]}": k, f"v.{match[1]}": v}

    rules: dict[str, Rule] = {
        r"q\.(weight|bias)": lambda m, t: {f"q.{m[1]}": t.flatten(1) if t.dim() > 1 else t},
        r"kv\.(weight|bias)": kv,
        r"qkv\.(weight|bias)": qkv,
        r"pos_embed\.(height_rel|width_rel)": r"\1",
    }
    return theirs.close(theirs.renamed(rules))


@register("halonet", "halo-attention")
class HaloAttention(Mechanism):
    """Blocks of queries, and a halo of keys around each.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        block_size: queries a side of a block.
        halo_size: keys beyond the block on every side.
        head_dim: width of heads of queries and keys; by default ``qk_ratio * dim`` rounded to a multiple of 8, over
            the heads.
        qk_ratio: width of queries and keys over that of values.
        qkv_bias: bias of the query, key and value projections.
        scale_pos_embed: scale the position term, too.
        pad_mode: what lies outside the map: ``"masked"``, ``"zero"`` or ``"clamp"`` (the window lies inside).
        pad: of a grid that blocks do not divide: ``"mask"``, ``"zeros"`` or ``"refuse"``.

    Shapes: x and y (B, H, W, C).

    Reference: Vaswani et al., 2021, arXiv 2103.12731, section 2.

    >>> HaloAttention(dim=16, num_heads=2, block_size=4, halo_size=1)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    zero_is_off = ("halo_size",)
    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1})

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        head_dim: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        scale_pos_embed: bool = False,
        pad_mode: str = "masked",
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("pad", pad, PADS)
        self.pad, self.num_heads = pad, num_heads
        self.halo = _Halo(
            dim, dim, num_heads, block_size, halo_size, head_dim, qk_ratio, qkv_bias, scale_pos_embed, pad_mode
        )
        self.proj = nn.Identity()  # the layer behind it projects; where one stands here, it reads the mixed values

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_multiple=self._grid_multiple)

    @property
    def grid_step(self) -> int:
        return self.halo.block_size

    def _full_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        full = super()._full_grid(grid)
        b = self.halo.block_size
        if self.halo.pad_mode != "clamp":
            return full
        least = -(-(b + 2 * self.halo.halo_size) // b) * b  # a window must lie inside
        return tuple(max(n, least) for n in full)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.proj(self.halo(x, valid))

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor], num_heads: int = 8, head_dim: int | None = None
    ) -> dict[str, Tensor]:
        """From timm's ``HaloAttn``; from its ``BottleneckAttn``, which is one block without a halo.

        Args:
            state_dict: ``q.*``, ``kv.*`` (or ``qkv.*``), ``pos_embed.*``.
            num_heads: theirs.
            head_dim: of queries and keys, where it is not that of values.
        """
        return {f"halo.{name}": value for name, value in _convert(state_dict, num_heads, head_dim).items()}


class HaloDownsampling(nn.Module):
    """Halo attention to a map of half the side: every second query, all keys; or the mean of four outputs.

    Args:
        dim: width of ``x``.
        out_dim: width of the output; ``dim`` by default.
        stride: tokens a side per query; 1 for a halo attention whose output has another width.
        average: take means of the outputs instead of fewer queries; always where ``stride`` does not divide the block.
        compat: ``"authors"``: displacements as timm counts them.
        num_heads, block_size, halo_size, head_dim, qk_ratio, qkv_bias, scale_pos_embed, pad_mode: as in
            :class:`HaloAttention`.

    Shapes: x (B, H, W, C), y (B, ceil(H / stride), ceil(W / stride), out_dim).

    >>> HaloDownsampling(16, num_heads=2, block_size=4, halo_size=1)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 4, 4, 16])
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        stride: int = 2,
        num_heads: int = 8,
        block_size: int = 8,
        halo_size: int = 3,
        head_dim: int | None = None,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        average: bool = False,
        scale_pos_embed: bool = False,
        pad_mode: str = "masked",
        compat: str | None = None,
    ):
        super().__init__()
        self.dim, self.stride = dim, check_int("stride", stride, least=1)
        self.average = stride > 1 and (check_flag("average", average) or block_size % stride != 0)
        self.halo = _Halo(
            dim, out_dim or dim, num_heads, block_size, halo_size, head_dim, qk_ratio, qkv_bias, scale_pos_embed,
            pad_mode, 1 if self.average else stride, compat,
        )  # fmt: skip

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Tokens outside ``valid`` are not read; a cell without any gives zeros."""
        check_rank("x", x, 4, "(B, H, W, C)")
        check_width("x", x, self.dim)
        x = zero_invalid(x, valid)
        height, width = x.shape[1:3]
        b = self.halo.block_size
        ends = [-height % b, -width % b]
        if any(ends):
            if valid is None:
                valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            x, valid = F.pad(x, (0, 0, 0, ends[1], 0, ends[0])), F.pad(valid, (0, ends[1], 0, ends[0]))
        y = self.halo(x, valid)
        if self.average:
            y = cell_means(y, self.stride, valid)
        exists = strided_valid(valid, self.stride)
        if exists is not None:
            y = y.masked_fill(~exists.unsqueeze(-1), 0.0)
        return y[:, : -(-height // self.stride), : -(-width // self.stride)]

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor], num_heads: int = 8, head_dim: int | None = None
    ) -> dict[str, Tensor]:
        """As :meth:`HaloAttention.convert_state_dict`."""
        return HaloAttention.convert_state_dict(state_dict, num_heads, head_dim)
