"""Multi-head scan: subspaces of the channels, each walked along a family of routes of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_int, check_real
from ...types import Traits
from ..base import Mechanism
from ..layers import DepthwiseConv, through, zero_invalid
from ..registry import register
from ..released import Released, Rule
from .routed import RoutedScan
from .vmamba import scan_rules


def _both_ways(*routes: str) -> tuple[str, ...]:
    return tuple(way for name in routes for way in (name, f"{name}-reversed"))


#: Two routes and both from the end: consecutive (C), across (X), spiral (S), zigzag of rows (Z).
FAMILIES: dict[str, tuple[str, ...]] = {
    "C": _both_ways("snake", "snake-transposed"),
    "X": _both_ways("zigzag", "zigzag-mirrored"),
    "S": _both_ways("spiral", "spiral-flipped"),
    "Z": _both_ways("rows", "columns"),
}


@register("mhs-vm", "multi-head-scan")
class MultiHeadScan(Mechanism):
    """Multi-head scan (MHS): heads of channels, each scanned along four routes that a gate of their variation joins.

    ``[u, z] = W_in x``, ``u' = silu(conv(u))``, and ``[v_1, .., v_n] = W_s u'`` of floor(dim / n) channels each. Head p
    scans ``v_p`` along the four routes of its family, with parameters per route, and joins what they give,
    ``o_p = sum_r y_r * relu(std_r(y) / (mean_r(y - min_r y) + 1e-5) - t)``: where the routes agree, nothing is left.
    ``y = LN(W_o LN([o_1, .., o_n])) * silu(z)``. The width inside is that outside, and there is no map at the end.

    Families: ``C``, snakes along rows and along columns; ``X``, diagonals to and fro, from both upper corners; ``S``,
    clockwise spirals from the corner inwards, and the same upside down; ``Z``, rows and columns; each route both ways.

    Shapes: x and y (B, H, W, dim), any H and W; work and memory linear in the tokens. Defaults are those of the paper.

    Differs from the authors' code: routes are made for any map, also of one row or column, where theirs come from a
    file for maps of one size; tokens outside ``valid`` enter no convolution and no state.

    Args:
        dim: width.
        families: of the heads, any of C, X, S, Z; the paper has three (without Z) or four.
        threshold: t, 0.5 or 0 in the paper.
        with_proj: norm and map W_o behind the heads; without them ``dim`` must be a multiple of their number.
        gate: z; without it W_in is not there either.
        state_dim: numbers of state per channel.
        kernel_size: of the convolution, odd.
        conv_bias, bias: of the convolution; of W_in.
        proj_drop: dropout of the output.

    Reference: Ji, 2024, arXiv 2406.05992.

    >>> MultiHeadScan(dim=8)(torch.randn(2, 3, 5, 8)).shape
    torch.Size([2, 3, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1}
    )
    reads_length = True  # where a spiral turns depends on the sides

    def __init__(
        self,
        dim: int,
        families: Sequence[str] = ("C", "X", "S", "Z"),
        threshold: float = 0.0,
        with_proj: bool = True,
        gate: bool = True,
        state_dim: int = 16,
        kernel_size: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim)
        if isinstance(families, str) or not families or set(families) - set(FAMILIES):
            raise ValueError(f"families={families!r} must name one or more of {', '.join(FAMILIES)}")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {check_int('kernel_size', kernel_size, least=1)}")
        for name, flag in dict(with_proj=with_proj, gate=gate).items():
            check_flag(name, flag)
        count = len(families)
        self.head_dim = dim // count
        if not self.head_dim or (not with_proj and self.head_dim * count != dim):
            raise ValueError(
                f"dim={dim} has no {count} heads"
                + ("" if not self.head_dim else " of equal width, which with_proj=False needs")
            )
        self.families, self.threshold = tuple(families), check_real("threshold", threshold)
        self.in_proj = nn.Linear(dim, 2 * dim, bias=bias) if gate else None
        self.conv, self.act = DepthwiseConv(dim, kernel_size, bias=conv_bias), nn.SiLU()
        self.split = nn.Linear(dim, count * self.head_dim, bias=False)
        self.heads = nn.ModuleList(
            RoutedScan(self.head_dim, FAMILIES[f], state_dim, fusion="variation", threshold=threshold) for f in families
        )
        self.cat_norm = nn.LayerNorm(count * self.head_dim) if with_proj else None
        self.proj = nn.Linear(count * self.head_dim, dim, bias=False) if with_proj else None
        self.norm = nn.LayerNorm(dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        u, z = (x, None) if self.in_proj is None else self.in_proj(x).chunk(2, -1)
        u = self.split(zero_invalid(self.act(self.conv(zero_invalid(u, valid))), valid))
        parts = [head(part, valid) for head, part in zip(self.heads, u.split(self.head_dim, -1), strict=True)]
        y = torch.cat(parts, -1).to(x.dtype)
        if self.proj is not None and self.cat_norm is not None:
            y = self.proj(self.cat_norm(y))
        y = self.norm(y)
        return through(self.proj_drop, y if z is None else y * self.act(z))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """From the authors' ``VSSGate`` or ``VSSUnGated``, whose heads are called C, X, S and Z, in this order."""
        theirs = Released(state_dict, "the authors' VSSGate or VSSUnGated")
        theirs.leave(r"mhs\.x_ssproj_W", because="the same parameter as x_ssproj.weight")
        theirs.leave(r"mhs\.scanhead_\w\.scanning\.seq2seq_engine\..+", because="the same module as mambaeng")

        def head(entries: dict[str, Tensor]) -> dict[str, Tensor]:
            one = Released(entries, "the authors' MambaEngine")
            return one.close(one.renamed(scan_rules(one, "scan")))

        out: dict[str, Tensor] = {}
        for i, name in enumerate("CXSZ"):
            out |= theirs.parts(rf"mhs\.scanhead_{name}\.mambaeng\.(.+)", f"heads.{i}", head)
        rules: dict[str, Rule] = {
            r"in_proj\.(weight|bias)": r"in_proj.\1",
            r"conv2d\.(weight|bias)": r"conv.\1",
            r"mhs\.x_ssproj\.weight": "split.weight",
            r"mhs\.cat_norm\.(weight|bias)": r"cat_norm.\1",
            r"mhs\.y_proj\.weight": "proj.weight",
            r"out_norm\.(weight|bias)": r"norm.\1",
        }
        return theirs.close(out | theirs.renamed(rules))
