"""HiLo attention of LITv2: some heads read fine detail inside windows, the others the means of all windows.

Pan et al., 2022, "Fast Vision Transformers with HiLo Attention", arXiv 2205.13213. Of ``h`` heads, ``int(alpha h)`` are
low-frequency heads, the others high-frequency heads, with windows of ``s x s`` tokens:

- high: ``softmax(q k^T D^-1/2) v`` among the tokens of a window, without a relative bias;
- low: queries are all tokens, keys and values are made of one token per window, its mean.

``y = [W_hi o_hi, W_lo o_lo]``: each branch has an output map of its own, nothing joins the two. Windows of one token
make every head a low-frequency head, which is plain attention then. ``alpha = 0`` is window attention, ``alpha = 1``
spatial reduction by an average pool.

Differs from the authors' code: grids that windows do not divide are padded with tokens that nobody reads and that no
mean counts (``pad="zeros"``: with zeros that take part, as their detection class does; their classification class
stops), maps need not be square, and ``attn_drop`` and ``proj_drop`` act, which theirs takes and forgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_grid, check_int, check_real
from ...grids import Windows, crop_grid, pad_to_multiple
from ...masks import Mask, Padded
from ...ops import attention
from ...types import Output, Traits, to_tuple
from ..base import PADS, Mechanism
from ..layers import cell_means, flat_valid, head_dim_of, merge_heads, split_heads, strided_valid, through
from ..partition.maxvit import attend_in_windows
from ..registry import register
from ..released import Released, Rule


class HighHeads(nn.Module):
    """What the heads that read inside windows learn."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, bias: bool, attn_drop: float, proj_drop: float):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_drop = num_heads, head_dim, attn_drop
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=bias)
        self.proj = nn.Linear(num_heads * head_dim, num_heads * head_dim)
        self.proj_drop = nn.Dropout(proj_drop)


class LowHeads(nn.Module):
    """What the heads that read the means of windows learn."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, bias: bool, attn_drop: float, proj_drop: float):
        super().__init__()
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.q = nn.Linear(dim, num_heads * head_dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * num_heads * head_dim, bias=bias)
        self.proj = nn.Linear(num_heads * head_dim, num_heads * head_dim)
        self.proj_drop = nn.Dropout(proj_drop)


@register("hilo-litv2", "hilo", "hilo-attention")
class HiLoAttention(Mechanism):
    """High-frequency heads inside windows beside low-frequency heads over the means of windows.

    Args:
        dim: width of ``x``.
        num_heads: heads of both kinds; must divide ``dim``.
        window_size: sides ``s`` of a window; 1 is plain attention.
        alpha: share of low-frequency heads, from 0 to 1; ``int(num_heads * alpha)`` of them.
        rank: axes of the grid; any from 1 to 3, unless it or a tuple ``window_size`` says otherwise.
        qkv_bias: bias of the query, key and value projections.
        scale: of the scores; ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        pad: of a grid that windows do not divide: ``"mask"`` adds tokens that do not exist, ``"zeros"`` zeros that take
            part, ``"refuse"`` raises.

    Reference: Pan et al., 2022, arXiv 2205.13213, section 3.

    >>> HiLoAttention(dim=16, num_heads=4, alpha=0.5)(torch.randn(2, 6, 8, 16)).shape
    torch.Size([2, 6, 8, 16])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}),
        grid_ranks=frozenset({1, 2, 3}),
        mask=True,
        weights=True,
        work={"N": 2},
        memory={"N": 1},
        permutation_equivariant=True,
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | Sequence[int] = 2,
        alpha: float = 0.5,
        rank: int | None = None,
        qkv_bias: bool = False,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pad: str = "mask",
    ):
        super().__init__(dim)
        check_choice("pad", pad, PADS)
        if isinstance(window_size, (tuple, list)):
            rank = len(window_size) if rank is None else rank
        if rank is not None:
            check_int("rank", rank, least=1, most=3)
            window_size = check_grid("window_size", to_tuple("window_size", window_size, rank))
        else:
            check_int("window_size", window_size, least=1)
        self.pad, self.rank, self.window_size, self.num_heads = pad, rank, window_size, num_heads
        self.alpha = check_real("alpha", alpha, least=0, most=1)
        self.head_dim = head_dim_of(dim, num_heads)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.plain = window_size == 1 or (rank is not None and window_size == (1,) * rank)
        low = num_heads if self.plain else int(num_heads * alpha)
        options = (self.head_dim, qkv_bias, attn_drop, proj_drop)
        self.high = HighHeads(dim, num_heads - low, *options) if low < num_heads else None
        self.low = LowHeads(dim, low, *options) if low else None

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(
            grid_ranks=self.class_traits.grid_ranks if self.rank is None else frozenset({self.rank}),
            grid_multiple=1
            if self.pad != "refuse"
            else math.lcm(*to_tuple("window_size", self.window_size, self.rank or 1)),
            mask=self.plain or self.low is None,  # a mean is made of tokens that a mask tells apart
            weights=self.plain,
            work={"N": 1 if self.low is None else 2},
            permutation_equivariant=self.plain,
        )

    def mix(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        mask: Mask | None = None,
        returns: tuple[str, ...] = (),
    ) -> Output:
        grid = tuple(x.shape[1:-1])
        size = to_tuple("window_size", self.window_size, len(grid))
        full = tuple(-(-n // s) * s for n, s in zip(grid, size, strict=True))
        if full != grid and self.pad == "refuse":
            raise ValueError(f"window_size={size} does not divide the grid {grid}; pad it first")
        padded, exists = x, valid
        if full != grid and (self.high is not None or self.pad == "zeros"):
            padded = pad_to_multiple(x, size)
            added = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device) if valid is None else valid
            if valid is not None or self.pad == "mask":
                ends = [e for n, m in zip(reversed(grid), reversed(full), strict=True) for e in (0, m - n)]
                exists = F.pad(added, ends, value=self.pad == "zeros")
        parts, weights = [], None
        if self.high is not None:
            inner = mask if mask is None or full == grid else Padded(mask, grid, full)
            high = attend_in_windows(self.high, padded, Windows(full, size), None, self.scale, exists, inner)
            parts.append(crop_grid(high, grid))
        if self.low is not None:
            means, some = x, valid
            if not self.plain:
                # Zeros that take part are in the means, but make no cell of theirs.
                means = cell_means(padded, size, exists) if self.pad == "zeros" else cell_means(x, size, valid)
                some = strided_valid(valid, size)
            low, weights = self._read(self.low, x, means, some, mask, "weights" in returns)
            parts.append(low)
        return Output(torch.cat(parts, -1) if len(parts) > 1 else parts[0], weights=weights)

    def _read(
        self, m: LowHeads, x: Tensor, means: Tensor, valid: Tensor | None, mask: Mask | None, shown: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(B, *grid, low heads * D), and (B, H, N, M) weights if they are to be shown."""
        k, v = (split_heads(t, m.num_heads) for t in m.kv(means).chunk(2, -1))
        out: Any = attention(
            split_heads(m.q(x), m.num_heads), k, v, mask=mask, valid=flat_valid(valid), scale=self.scale,
            dropout_p=m.attn_drop if self.training else 0.0, return_weights=shown,
        )  # fmt: skip
        out, weights = out if shown else (out, None)
        return through(m.proj_drop, m.proj(merge_heads(out, x.shape[1:-1]))), weights

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``HiLo``: ``h_qkv``, ``h_proj``, ``l_q``, ``l_kv``, ``l_proj``."""
        theirs = Released(state_dict, "the authors' HiLo")
        rules: dict[str, Rule] = {
            r"h_(qkv|proj)\.(weight|bias)": r"high.\1.\2",
            r"l_(q|kv|proj)\.(weight|bias)": r"low.\1.\2",
        }
        return theirs.close(theirs.renamed(rules))
