"""Factorization self-attention of FaViT: every group of channels reads a short summary of the map of its own kind.

Qin et al., 2023, "Factorization Vision Transformer", arXiv 2312.08614. The channels are cut into
groups, of 1/8, 7/16 and 7/16 of them with a ratio ``r > 1``, of 1/8 and 7/8 with ``r = 1``:

- the first group reads the map made small: ``x_g <- LN(conv_(r x r, stride r) x_g)``, with one head;
- each further group reads ``w x w`` keys, the same for every query. A map ``z = W dwconv(x)`` of the remaining channels
  is cut into windows of ``w x w`` tokens, those of the second such group ``r`` tokens apart, and *fused*: the mean over
  all windows, place by place. Then ``k, v = W_kv W_fc fused``, the same maps for every head.

In every group ``v <- v + dwconv(v)`` on the keys' grid; ``y = W_o [o_g, o_1, o_2]``. A key of the fused windows is made
of tokens of the whole map, so that every token reads far for the price of one window.

A mean commutes with a linear map, and the mean over windows is a mean over their rows and then over their columns: here
``fused = W (A_rows dwconv(x) A_cols)`` with ``A (w x side)`` the shares, and no window is ever cut.

Differs from the authors' code: their average is taken over the wrong numbers. Windows and channels are laid out as one
axis, channels fastest, and neighbouring entries of it are averaged, so that a channel of a key is the mean of
neighbouring channels of one or two windows. ``legacy_fusion=True`` does so, as weights trained with the release need
it. Maps are padded to whole windows by reflection, as theirs, but again and again where one reflection does not reach,
so that any size works. Sides that ``r`` does not divide are read to their end, where theirs leaves out the last part of
a cell; ``compat="authors"`` does that and the legacy fusion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int
from ...grids import mirrored_places
from ...ops import attention
from ...types import Traits, check_divides
from ..base import Mechanism
from ..layers import (
    DepthwiseConv,
    conv_any_size,
    flat_valid,
    init_like_pvt,
    merge_heads,
    plain,
    split_heads,
    strided_valid,
    through,
    zero_invalid,
)
from ..registry import register
from ..released import Released, Rule

Project = Callable[[Tensor], Tensor]


class WindowReader(nn.Module):
    """A group of heads that reads fused windows.

    Args:
        dim: channels of the group.
        num_heads: heads; must divide it.
        dilation: tokens between neighbouring tokens of a window.
        window_size: side of a window.
        bias: of the maps to keys and values.
    """

    def __init__(self, dim: int, num_heads: int, dilation: int, window_size: int, bias: bool):
        super().__init__()
        self.num_heads, self.head_dim, self.dilation, self.window_size = (
            num_heads,
            dim // num_heads,
            dilation,
            window_size,
        )
        self.fc = nn.Linear(self.head_dim, self.head_dim, bias=bias)
        self.kv = nn.Linear(self.head_dim, 2 * self.head_dim, bias=bias)
        self.conv = DepthwiseConv(dim, 3)

    def places(self, size: int, device: torch.device | None) -> Tensor:
        """(windows, window_size) tokens along an axis of ``size``."""
        reach = self.dilation * (self.window_size - 1) + 1
        starts = torch.arange(0, size, reach, device=device)
        at = mirrored_places(0, -(-size // reach) * reach, size, device)
        return at[starts[:, None] + torch.arange(self.window_size, device=device) * self.dilation]

    def shares(self, size: int, like: Tensor) -> Tensor:
        """(window_size, size): how much of a token of an axis is in the mean of each place of a window."""
        places = self.places(size, like.device)
        return F.one_hot(places, size).sum(0).to(like.dtype) / places.shape[0]

    def fused(self, z: Tensor, project: Project, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) -> (B, w, w, dim) means over windows of ``project(z)``, and which of these are of a token."""
        rows, columns = self.shares(z.shape[1], z), self.shares(z.shape[2], z)
        means = torch.einsum("ah,bhwc->bawc", rows, zero_invalid(z, valid))
        means = torch.einsum("ew,bawc->baec", columns, means)
        some = None
        if valid is not None:
            parts = rows @ valid.to(z.dtype) @ columns.T
            some = parts > 0
            means = means / torch.where(some, parts, 1).unsqueeze(-1)
        return project(means), some

    def scrambled(self, z: Tensor, project: Project, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The same, but means of neighbouring entries of windows and channels of a head laid out as one axis."""
        rows, columns = (self.places(n, z.device) for n in z.shape[1:3])
        side = self.window_size

        def cut(t: Tensor) -> Tensor:
            """(B, H, W, C) -> (B, w, w, windows, C)."""
            t = t.index_select(1, rows.flatten()).index_select(2, columns.flatten())
            return t.unflatten(1, rows.shape).unflatten(3, columns.shape).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)

        windows = project(cut(z))  # (B, w, w, windows, dim)
        some = None
        if valid is not None:
            exists = cut(valid.unsqueeze(-1))
            windows, some = zero_invalid(windows, exists.squeeze(-1)), exists.flatten(3).any(-1)
        count = windows.shape[3]
        heads = windows.unflatten(-1, (self.num_heads, self.head_dim)).transpose(3, 4)
        means = heads.reshape(-1, side, side, self.num_heads, self.head_dim, count).mean(-1)
        return means.flatten(3), some

    def forward(self, q: Tensor, fused: Tensor, valid: Tensor | None, dropout_p: float) -> Tensor:
        """(B, H, N, D) queries and (B, w, w, dim) fused windows -> (B, H, N, D)."""
        k, v = self.kv(self.fc(fused.unflatten(-1, (self.num_heads, self.head_dim)))).chunk(2, -1)
        k, v = k.flatten(3), v.flatten(3)
        v = v + self.conv(zero_invalid(v, valid))
        return attention(
            q, split_heads(k, self.num_heads), split_heads(v, self.num_heads), valid=flat_valid(valid),
            scale=self.head_dim**-0.5, dropout_p=dropout_p,
        )  # fmt: skip


@register("favit", "fasa", "factorization-attention")
class FactorizationAttention(Mechanism):
    """Factorization self-attention (FaSA).

    Args:
        dim: width of ``x``; a multiple of 16, of 8 where ``sr_ratio`` is 1.
        num_heads: heads of the groups that read windows; must divide each of them.
        sr_ratio: side of the cells that the first group reads, and how far apart the tokens of the third group's
            windows lie; 1: no third group.
        window_size: side of the windows; ``window_size ** 2`` keys.
        qkv_bias: bias of the queries, keys and values.
        legacy_fusion: average neighbouring channels instead of windows, as the release does.
        attn_drop: dropout of attention weights in training.
        proj_drop: dropout of the output in training.
        compat: ``"authors"``: legacy fusion, and sides that ``sr_ratio`` does not divide are read up to their last
            whole cell by the first group.

    Reference: Qin et al., 2023, arXiv 2312.08614, section 3.

    >>> FactorizationAttention(dim=32, num_heads=2, sr_ratio=2)(torch.randn(2, 9, 6, 32)).shape
    torch.Size([2, 9, 6, 32])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), work={"N": 2}, memory={"N": 1}
    )

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        sr_ratio: int = 1,
        window_size: int = 7,
        qkv_bias: bool = True,
        legacy_fusion: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        self.sr_ratio = check_int("sr_ratio", sr_ratio, least=1)
        check_int("window_size", window_size, least=1)
        self.compat = compat
        self.legacy_fusion = check_flag("legacy_fusion", legacy_fusion) or compat == "authors"
        shares = (2, 7, 7) if sr_ratio > 1 else (1, 7)
        check_divides("shares of channels", sum(shares), "dim", dim)
        self.widths = [dim // sum(shares) * share for share in shares]
        for width in self.widths[1:]:
            check_divides("num_heads", num_heads, "channels of a group", width)
        first, rest = self.widths[0], dim - self.widths[0]
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.pool = nn.Conv2d(first, first, sr_ratio, sr_ratio)
        self.norm = nn.LayerNorm(first)
        self.kv = nn.Linear(first, 2 * first, bias=qkv_bias)
        self.conv = DepthwiseConv(first, 3)
        self.depthwise, self.pointwise = DepthwiseConv(rest, 3), nn.Linear(rest, rest)
        self.readers = nn.ModuleList(
            WindowReader(width, num_heads, sr_ratio if i else 1, window_size, qkv_bias)
            for i, width in enumerate(self.widths[1:])
        )
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear maps start narrow, convolutions, the 1 x 1 one among them, at unit gain over their fan-out."""
        init_like_pvt(self)
        nn.init.normal_(self.pointwise.weight, std=(2 / self.pointwise.out_features) ** 0.5)

    def _far(self, q: Tensor, x: Tensor, valid: Tensor | None) -> Tensor:
        """The first group: (B, H, W, C_g) queries and tokens -> (B, N, C_g)."""
        step = self.sr_ratio
        if self.compat == "authors" and min(x.shape[1:3]) >= step:
            whole = slice(x.shape[1] // step * step), slice(x.shape[2] // step * step)
            x, valid = x[:, *whole], valid if valid is None else valid[:, *whole]
        cells = self.norm(conv_any_size(self.pool, zero_invalid(x, valid), self.pool.weight, self.pool.bias))
        exists = strided_valid(valid, step)
        k, v = self.kv(cells).chunk(2, -1)
        v = v + self.conv(zero_invalid(v, exists))
        q, k, v = (split_heads(t, 1) for t in (q, k, v))
        return attention(q, k, v, valid=flat_valid(exists), dropout_p=self.attn_drop if self.training else 0.0).squeeze(
            1
        )

    def _project(self, group: int, z: Tensor) -> Tensor:
        """The channels of one of the groups that read windows, of the 1 x 1 convolution of all."""
        start = sum(self.widths[1 : 1 + group])
        rows = slice(start, start + self.widths[1 + group])
        if not plain(self.pointwise):
            return self.pointwise(z)[..., rows]
        return F.linear(z, self.pointwise.weight[rows], self.pointwise.bias[rows])

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        first, rest = x.split([self.widths[0], self.dim - self.widths[0]], -1)
        q_first, q_rest = self.q(x).split([self.widths[0], self.dim - self.widths[0]], -1)
        parts = [self._far(q_first, first, valid)]
        z = self.depthwise(zero_invalid(rest, valid))
        heads = split_heads(q_rest, self.num_heads).split([w // self.num_heads for w in self.widths[1:]], -1)
        for i, (reader, q) in enumerate(zip(self.readers, heads, strict=True)):
            fuse: Any = reader.scrambled if self.legacy_fusion else reader.fused
            fused, exists = fuse(z, functools.partial(self._project, i), valid)
            parts.append(merge_heads(reader(q, fused, exists, self.attn_drop if self.training else 0.0)))
        y = self.proj(torch.cat(parts, -1))
        return through(self.proj_drop, y).unflatten(1, x.shape[1:-1])

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention``; they were trained with ``compat="authors"``."""
        theirs = Released(state_dict, "FaViT's Attention")
        parts = {"fcs": "fc", "single_heads": "kv", "local_convs": "conv"}
        rules: dict[str, Rule] = {
            r"(q|norm|proj)\.(weight|bias)": r"\1.\2",
            r"sr\.(weight|bias)": r"pool.\1",
            r"kv_g\.(weight|bias)": r"kv.\1",
            r"local_conv_g\.(weight|bias)": r"conv.\1",
            r"kv_l\.depth_conv\.(weight|bias)": r"depthwise.\1",
            r"kv_l\.point_conv\.(weight|bias)": lambda match, value: {
                f"pointwise.{match[1]}": value.flatten(1) if value.dim() == 4 else value
            },
            **{rf"{name}\.(\d)\.(weight|bias)": rf"readers.\1.{ours}.\2" for name, ours in parts.items()},
        }
        return theirs.close(theirs.renamed(rules))
