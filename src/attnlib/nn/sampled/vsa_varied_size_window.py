"""Varied-size window attention: queries stay in their windows, keys are sampled from a window that is predicted.

Zhang et al., 2022, "VSA: Learning Varied-Size Window Attention in Vision Transformers", arXiv 2204.08446. For every
window and head, linear maps of the window's mean token say by how much its window of keys is stretched and moved, from

    ``LeakyReLU(mean(x))``: ``s`` and ``o``, one number per axis each.

With ``e`` the place of a token from the centre of its window of ``w`` tokens, in tokens, and maps of ``L`` tokens that
are filled up to ``L'``, the key of that token is read at

    ``place + e s + o (L' - 1) / (2 floor(L / w))``

by bilinear interpolation: moved by about half a window where ``o = 1``. There are as many keys as queries, and a
relative bias of the places before they moved. ``s = o = 0`` is attention in windows.

As in the authors' code, keys and values beyond the border are zeros and take their share of the softmax
(``border="zeros"``); ``border="mask"`` leaves out keys with nothing of the map in them. The mean of a window that
reaches over the border counts zeros there. Their class has an initialisation of both regressors with zeros that nothing
calls: ours start at zero, and as theirs with ``zero_init=False``.

Differs from that code: any size, where theirs is built for one, also maps smaller than a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_grid, to_tuple
from ...grids import Windows, crop_grid, pad_to_multiple
from ...ops.partition import grouped_attention
from ...ops.sampled import sample_crossings
from ...positions import dense_window_bias
from ...types import Traits, stats_dtype
from ..base import Mechanism
from ..layers import flat_valid, through
from ..registry import register
from ..released import Released, Rule

BORDERS = ("zeros", "mask")


@register("vsa-varied-size-window", "vsa", "varied-size-window-attention")
class VariedSizeWindowAttention(Mechanism):
    """Attention in windows whose keys come from a window of another place and size, per window and head, on images.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``out_dim``.
        window_size: sides of a window of queries.
        rel_bias: learn a relative bias per head.
        border: what a key beyond the border of the map is: ``"zeros"``, as in the authors' models, or ``"mask"``.
        zero_init: regressors start at zero, as the paper has it; as linear maps do otherwise, as in the authors' code.
        qkv_bias: bias of the query, key and value projections.
        scale: of the scores; ``(dim // num_heads) ** -0.5`` by default, whatever ``out_dim``.
        attn_drop: dropout of attention weights in training. The authors' class has it and does not apply it.
        proj_drop: dropout of the output in training.
        out_dim: width of queries, keys, values and the output; ``dim`` by default, and any other for use inside another
            module only.

    Reference: Zhang et al., 2022, arXiv 2204.08446, section 3.2.

    >>> VariedSizeWindowAttention(dim=16, num_heads=2, window_size=4)(torch.randn(2, 8, 12, 16)).shape
    torch.Size([2, 8, 12, 16])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1})
    reads_length = True  # windows move in shares of the map

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        window_size: int | Sequence[int] = 7,
        rel_bias: bool = True,
        border: str = "zeros",
        zero_init: bool = True,
        qkv_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        out_dim: int | None = None,
    ):
        super().__init__(dim)
        width = dim if out_dim is None else out_dim
        check_divides("num_heads", num_heads, "dim" if out_dim is None else "out_dim", width)
        check_choice("border", border, BORDERS)
        self.border, self.num_heads, self.head_dim = border, num_heads, width // num_heads
        self.window_size = check_grid("window_size", to_tuple("window_size", window_size, 2))
        self.attn_drop = attn_drop
        self.scale = max(1, dim // num_heads) ** -0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)
        self.offsets, self.scales = nn.Linear(dim, 2 * num_heads), nn.Linear(dim, 2 * num_heads)
        if check_flag("zero_init", zero_init):
            for regressor in (self.offsets, self.scales):
                nn.init.zeros_(regressor.weight)
                nn.init.zeros_(regressor.bias)
        if rel_bias:
            self.rel_bias = nn.Parameter(torch.empty(num_heads, *(2 * w - 1 for w in self.window_size)))
            nn.init.trunc_normal_(self.rel_bias, std=0.02)
        else:
            self.register_parameter("rel_bias", None)

    @property
    def tables(self) -> dict[str, int]:
        """Tables of places, by how many of their last axes are places."""
        return {"rel_bias": 2}

    def places(self, means: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where keys are read.

        Args:
            means: (B, nh, nw, C) mean tokens of windows.
            grid: sides of the map.

        Returns:
            (B, H, nh * nw, h) rows and (B, H, nh * nw, w) columns of the map, in tokens.
        """
        seen = F.leaky_relu(means)
        high = stats_dtype(means.dtype)
        moved, stretched = (f(seen).unflatten(-1, (-1, 2)).to(high) for f in (self.offsets, self.scales))
        stretched = (stretched + 1).unsqueeze(-1)
        axes = []
        for axis in (0, 1):  # rows, columns; the regressors give columns first
            w, length, count = self.window_size[axis], grid[axis], means.shape[1 + axis]
            reach, half = (count * w - 1) / (2 * max(1, length // w)), (w - 1) / 2
            away = torch.arange(-half, half + 0.5, device=means.device, dtype=high)
            middle = torch.arange(half, count * w, w, device=means.device, dtype=high)
            middle = middle.view([-1, 1, 1] if axis == 0 else [1, -1, 1])
            centre = (middle + moved[..., 1 - axis] * reach).unsqueeze(-1)
            at = centre + away * stretched[..., 1 - axis, :]  # (B, nh, nw, H, w)
            axes.append(at.flatten(1, 2).transpose(1, 2))
        return axes[0], axes[1]

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        grid, heads, d = tuple(x.shape[1:3]), self.num_heads, self.head_dim
        padded = pad_to_multiple(x, self.window_size)
        means = F.avg_pool2d(padded.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
        rows, columns = self.places(means, grid)
        q, kv = self.qkv(x).split((heads * d, 2 * heads * d), -1)
        maps = kv.unflatten(-1, (2, heads, d)).flatten(1, 2).permute(0, 3, 1, 2, 4).flatten(3)
        if self.border == "mask":  # how much of the map is in each key
            maps = F.pad(maps, (0, 1), value=1.0)
        read = sample_crossings(maps, grid, rows, columns, valid=flat_valid(valid)).transpose(1, 2)  # (B, G, H, S, .)
        windows = Windows(tuple(padded.shape[1:3]), self.window_size)
        q = windows.cut(pad_to_multiple(q, self.window_size)).unflatten(-1, (heads, d))
        allowed = None
        k, v, *share = read.split((d, d, 1) if self.border == "mask" else (d, d), -1)
        if share:  # more than rounding
            allowed = (share[0] > 1e-4).mT.expand(*read.shape[:3], read.shape[3], -1)
        bias = None if self.rel_bias is None else dense_window_bias(self.rel_bias, self.window_size)[None, None]
        out = grouped_attention(
            q.transpose(2, 3), k, v, bias=bias, allowed=allowed, scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return through(self.proj_drop, self.proj(crop_grid(windows.join(out.transpose(2, 3).flatten(3)), grid)))

    @staticmethod
    def convert_state_dict(
        state_dict: Mapping[str, Tensor], window_size: int | Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """From the authors' ``VSAWindowAttention`` (1x1 convolutions).

        Args:
            state_dict: theirs.
            window_size: of the flat table of a window that is not square.
        """
        theirs = Released(state_dict, "VSAWindowAttention")
        theirs.leave(r"relative_position_index", because="a constant")

        def flat(to: str) -> Rule:
            return lambda match, value: {match.expand(to): value.flatten(1) if value.dim() > 1 else value}

        def table(match: Any, value: Tensor) -> dict[str, Tensor]:
            """Theirs is (displacements, heads), query minus key."""
            side = round(value.shape[0] ** 0.5)
            sides = (
                (side, side) if window_size is None else [2 * w - 1 for w in to_tuple("window_size", window_size, 2)]
            )
            if value.dim() != 2 or not value.numel() or sides[0] * sides[1] != value.shape[0] or sides[0] % 2 == 0:
                raise ValueError(f"{match.string} of state_dict has {value.shape[0]} displacements, not {sides}")
            return {"rel_bias": value.t().reshape(value.shape[1], *sides).flip(1, 2)}

        rules: dict[str, Rule] = {
            r"(qkv|proj)\.(weight|bias)": flat(r"\1.\2"),
            r"sampling_(offsets|scales)\.2\.(weight|bias)": flat(r"\1.\2"),
            r"relative_position_bias_table": table,
        }
        return theirs.close(theirs.renamed(rules))
