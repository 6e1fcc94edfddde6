"""Varying window attention: windows of queries read a context that is ``R`` times as large, with as many keys.

Yan et al., 2024, "Multi-Scale Representations by Varying Window Attention for Semantic Segmentation", arXiv 2404.16573.
The map is cut into windows of ``P`` tokens a side. The queries of one read the ``R P`` tokens a side around it, at the
cost of attention in windows, because the context is made small before it is read:

1. *Pre-scaling*: a convolution of ``R x R`` tokens, BatchNorm and ReLU leave ``C / R^2`` channels on the same grid.
2. *Copy-shift padding*: ``(R - 1) P / 2`` tokens on every side of the map, copied from inside it. What stands on the
   left are columns ``(R + 1) P / 2`` to ``R P``, the next ones behind what the context of the first window holds
   anyway; on the right likewise. With zeros there, attention at the border would collapse.
3. The context of a window, ``R P x R P`` tokens of ``C / R^2`` channels, is folded: ``R x R`` neighbouring tokens
   become one key of ``C`` channels. There are ``P x P`` keys for every ``R``.

Then ``y = BN(W_o softmax(q k^T D^-1/2) v)``. ``R = 1`` is attention in windows. Several ``R`` side by side make the
multi-scale representation of VWFormer (:mod:`attnlib.models.dense.vwformer`).

Where ``R`` divides ``P``, the keys of all windows lie on one lattice. They are computed on it once, and not once for
each of the up to ``R^2`` windows that read them: the same numbers in less time.

Differs from the authors' code: any map (what is padded is no key); windows of one token, where theirs stops; a number
of tokens a side instead of a number of windows. Under odd ``P`` and even ``R`` a context cannot lie in the middle: it
begins half a token early, as in theirs. Where a context is larger than the map, theirs copies from a map with zeros
around it; these are keys with ``compat="authors"``, and no keys otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_int
from ...grids import Windows
from ...ops.partition import grouped_attention
from ...types import Traits
from ..base import Mechanism
from ..layers import ConvNorm, head_dim_of, init_like_torch, zero_invalid
from ..registry import register
from ..released import Released, Rule


def copied_places(length: int, window: int, ratio: int) -> tuple[list[int], list[int]]:
    """What copy-shift padding puts before and behind an axis: places on it, -1 for zeros.

    Args:
        length: tokens of the axis.
        window: tokens of a window.
        ratio: how many times as large a context is.

    >>> copied_places(16, 4, 2)
    ([6, 7], [8, 9])
    >>> copied_places(4, 4, 2)  # a context larger than the map, which has two zeros on either side then
    ([-1, -1], [-1, -1])
    """
    reach, inner = ratio * window, (ratio + 1) * window // 2
    total = max(length, reach)
    shift = (total - length) // 2
    sides = range(inner, reach), range(total - reach, total - inner)
    before, behind = ([p - shift if 0 <= p - shift < length else -1 for p in side] for side in sides)
    return before, behind


def _taken(x: Tensor, axis: int, places: Sequence[int], fill: Any) -> Tensor:
    """The tokens at consecutive ``places`` of an axis of (B, H, W, C), ``fill`` where they are -1."""
    real = [p for p in places if p >= 0]
    first = places.index(real[0]) if real else len(places)
    part = x.narrow(axis, real[0], len(real)) if real else x.narrow(axis, 0, 0)
    pads = (first, len(places) - first - len(real))
    if not any(pads):
        return part
    return F.pad(part, [0, 0, *((0, 0) if axis == 1 else ()), *pads], value=fill)


def copy_shift_pad(x: Tensor, window: Sequence[int], ratio: int, fill: Any = 0) -> Tensor:
    """(B, H, W, C) with ``ceil((ratio - 1) * window / 2)`` tokens on every side, copied from inside.

    Args:
        x: the map.
        window: tokens a side of a window.
        ratio: how many times as large a context is.
        fill: stands where a context is larger than the map.
    """
    for axis in (2, 1):
        before, behind = copied_places(x.shape[axis], window[axis - 1], ratio)
        if before:
            x = torch.cat([_taken(x, axis, before, fill), x, _taken(x, axis, behind, fill)], axis)
    return x


def _contexts(x: Tensor, counts: Sequence[int], sides: Sequence[int], steps: Sequence[int]) -> Tensor:
    """(B, H, W, C) -> (B, windows, *sides, C): ``counts`` windows per axis, ``steps`` apart, from the first token."""
    for axis in (1, 2):
        x = x.narrow(axis, 0, (counts[axis - 1] - 1) * steps[axis - 1] + sides[axis - 1])
    x = x.unfold(1, sides[0], steps[0]).unfold(2, sides[1], steps[1])  # (B, nh, nw, C, h, w)
    return x.permute(0, 1, 2, 4, 5, 3).flatten(1, 2)


def _folded_tokens(x: Tensor, ratio: int) -> Tensor:
    """(..., R h, R w, C) -> (..., h, w, R R C): channels of neighbours side by side, rows first."""
    x = x.unflatten(-3, (-1, ratio)).unflatten(-2, (-1, ratio))  # (..., h, R, w, R, C)
    return x.transpose(-4, -3).flatten(-3)


@register("vwformer", "vwa", "varying-window-attention")
class VaryingWindowAttention(Mechanism):
    """Windows of queries, a context ``ratio`` times as large, as many keys.

    Args:
        dim: width of ``x``; ``ratio ** 2`` must divide it.
        num_heads: heads; must divide ``dim``.
        ratio: how many times as large a side of the context is, ``R``.
        num_windows: windows a side; the map is padded to a multiple.
        window_size: tokens a side of a window, instead of ``num_windows``.
        norm: BatchNorm behind the output projection; without it, that has a bias.
        scale: ``head_dim ** -0.5`` by default.
        attn_drop: dropout of attention weights in training.
        compat: ``"authors"``: zeros beyond a map that is smaller than a context are keys.

    With ``norm`` all starts as in the authors' ``VWA``: queries narrow, keys and values wide, and the last BatchNorm at
    0, so that a block around the layer starts as the identity; without it as in their heads with
    ``nn.MultiheadAttention``.

    Shapes: x and y (B, H, W, C).

    Reference: Yan et al., 2024, arXiv 2404.16573, section 3.

    >>> VaryingWindowAttention(dim=16, num_heads=2, ratio=2, num_windows=2)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    class_traits = Traits(grid_ranks=frozenset({2}), work={"N": 2}, memory={"N": 2})

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        ratio: int = 2,
        num_windows: int = 8,
        window_size: int | None = None,
        norm: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        compat: str | None = None,
    ):
        super().__init__(dim)
        check_choice("compat", compat, (None, "authors"))
        self.num_heads, self.head_dim = num_heads, head_dim_of(dim, num_heads)
        self.ratio = check_int("ratio", ratio, least=1)
        check_divides("ratio ** 2", ratio**2, "dim", dim)
        self.num_windows = check_int("num_windows", num_windows, least=1)
        self.window_size = window_size if window_size is None else check_int("window_size", window_size, least=1)
        self.scale, self.attn_drop = self.head_dim**-0.5 if scale is None else scale, attn_drop
        self.compat = compat
        self.pre = ConvNorm(dim, dim // ratio**2, ratio, activation=nn.ReLU) if ratio > 1 else None
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = ConvNorm(dim, dim, norm=norm, bias=not norm, gain=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors' classes start."""
        for linear in (self.q, self.kv):
            nn.init.zeros_(linear.bias)
        if self.pre is not None:
            nn.init.kaiming_normal_(self.pre.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.proj.norm is not None:
            nn.init.normal_(self.q.weight, std=0.01)
            nn.init.normal_(self.kv.weight, std=math.sqrt(2 / self.dim))
            nn.init.kaiming_normal_(self.proj.conv.weight, mode="fan_out", nonlinearity="relu")
        else:
            init_like_torch(self.dim, self.q, self.kv)
            assert self.proj.conv.bias is not None
            nn.init.zeros_(self.proj.conv.bias)

    @property
    def traits(self) -> Traits:
        norms = self.pre is not None or self.proj.norm is not None
        growth = {"N": 2 if self.window_size is None else 1}  # as many windows of any map, or as large ones
        return self.class_traits.but(work=growth, memory=growth, batch_independent=not (norms and self.training))

    @property
    def grid_step(self) -> int:
        return self.num_windows if self.window_size is None else self.window_size

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        grid, r = tuple(x.shape[1:-1]), self.ratio
        if self.window_size is None:
            size = tuple(n // self.num_windows for n in grid)
        else:
            size = (self.window_size,) * 2
        windows = Windows(grid, size)
        context = x if self.pre is None else zero_invalid(self.pre(x, valid), valid)
        beyond = any(r * w > n for w, n in zip(size, grid, strict=True))
        real = None
        if valid is not None or (beyond and self.compat is None):
            real = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        kv = self._keys(copy_shift_pad(context, size, r), windows)
        exists = None if real is None else self._some(real if valid is None else valid, windows)
        if real is not None and self.compat is not None and beyond:
            exists = exists | ~self._some(real, windows)  # type: ignore[operator]  # zeros of the padding alone
        k, v = kv.unflatten(-1, (2, self.num_heads, self.head_dim)).permute(3, 0, 1, 4, 2, 5)
        q = self.q(windows.cut(x)).unflatten(-1, (self.num_heads, self.head_dim)).transpose(2, 3)
        out = grouped_attention(
            q, k, v, valid=exists, scale=self.scale, dropout_p=self.attn_drop if self.training else 0.0
        )
        return self.proj(windows.join(out.transpose(2, 3).flatten(3)), valid)  # type: ignore[union-attr]

    def _keys(self, context: Tensor, windows: Windows) -> Tensor:
        """Keys and values (B, G, P P, 2 C) of the padded context."""
        return self._folded(context, windows, self.kv).flatten(2, 3)

    def _some(self, exists: Tensor, windows: Windows) -> Tensor:
        """Which keys hold a token that exists: (B, H, W) -> (B, G, P P)."""
        padded = copy_shift_pad(exists.unsqueeze(-1), windows.size, self.ratio, False)
        return self._folded(padded, windows, lambda cells: cells.any(-1, keepdim=True)).flatten(2)

    def _folded(self, context: Tensor, windows: Windows, project: Callable[[Tensor], Tensor]) -> Tensor:
        """(B, G, P, P, C'): what ``project`` makes of the ``R R`` tokens that become one, in the context of each."""
        r, counts, size = self.ratio, windows.counts, windows.size
        if all(w % r == 0 for w in size):  # one lattice for all windows: it is projected once
            height, width = ((n - 1) * w + r * w for n, w in zip(counts, size, strict=True))
            lattice = project(_folded_tokens(context[:, :height, :width], r))
            return _contexts(lattice, counts, size, [w // r for w in size])
        return project(_folded_tokens(_contexts(context, counts, [r * w for w in size], size), r))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``VWA`` or ``nn.MultiheadAttention``, and the pre-scaling that their heads hold beside it.

        Args:
            state_dict: ``theta.*``, ``phi.*``, ``g.*``, ``conv_out.*``, or ``in_proj_*`` and ``out_proj.*``; and
                ``ds.*`` of the same ratio.
        """
        theirs = Released(state_dict, "the authors' VWA")
        out: dict[str, Tensor] = {}
        for kind in ("weight", "bias"):
            if f"in_proj_{kind}" in theirs:
                value = theirs.take(f"in_proj_{kind}")
                out[f"q.{kind}"], out[f"kv.{kind}"] = value.split((value.shape[0] // 3, value.shape[0] // 3 * 2))
            else:
                out[f"q.{kind}"] = _flat(theirs.take(f"theta.conv.{kind}"))
                out[f"kv.{kind}"] = torch.cat([_flat(theirs.take(f"{n}.conv.{kind}")) for n in ("phi", "g")])
        norm = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
        rules: dict[str, Rule] = {
            r"out_proj\.weight": lambda match, value: {"proj.conv.weight": value[..., None, None]},
            r"out_proj\.bias": "proj.conv.bias",
            r"conv_out\.conv\.(weight|bias)": r"proj.conv.\1",
            rf"conv_out\.bn\.{norm}": r"proj.norm.\1",
            r"ds\.conv\.weight": "pre.conv.weight",
            rf"ds\.bn\.{norm}": r"pre.norm.\1",
        }
        return theirs.close(out | theirs.renamed(rules))


def _flat(value: Tensor) -> Tensor:
    return value.flatten(1) if value.dim() > 2 else value
