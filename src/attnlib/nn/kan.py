"""Layers whose weights are functions: a learned curve on every edge between channels, in the form of FasterKAN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..checks import check_int, check_real
from ..types import stats_dtype


class SwitchBasis(nn.Module):
    """Bumps around a few places: ``b_g(u) = 1 - tanh((u - p_g) / width)^2``; ``grid`` holds the places.

    With ``z = exp(2 (u - p) / width)`` that is ``4 z / (1 + z)^2``: one exponential for all places, and no difference
    of nearly equal numbers where a bump is flat.

    Args:
        low: first place.
        high: last place.
        count: places, evenly spread.
        width: of a bump.
    """

    def __init__(self, low: float = -2.0, high: float = 2.0, count: int = 8, width: float = 0.33):
        super().__init__()
        check_int("count", count, least=1)
        self.width = check_real("width", width, above=0)
        self.low, self.high = low, high
        self.grid = nn.Parameter(torch.linspace(low, high, count), requires_grad=False)

    def forward(self, u: Tensor) -> Tensor:
        """(...) -> (..., count)."""
        # Twenty widths beyond the last place no bump is above 1e-16; far from there exp would overflow.
        far, high = 20 * self.width, stats_dtype(u.dtype)
        near = u.to(high).clamp(self.low - far, self.high + far)
        z = (near * (2 / self.width)).exp().unsqueeze(-1) * (self.grid.to(high) * (-2 / self.width)).exp()
        r = (1 + z).reciprocal()
        return (4 * (z * r) * r).to(u.dtype)


class KANLayer(nn.Module):
    """``y = W b(LayerNorm(x))``: every channel as values of bumps, then one linear map without bias.

    Args:
        dim: width of ``x``.
        out_dim: width of the output.
        grids: bumps per channel.
    """

    def __init__(self, dim: int, out_dim: int, grids: int = 8):
        super().__init__()
        self.norm, self.basis = nn.LayerNorm(dim), SwitchBasis(count=grids)
        self.linear = nn.Linear(dim * grids, out_dim, bias=False)
        nn.init.xavier_uniform_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out_dim)."""
        return self.linear(self.basis(self.norm(x)).flatten(-2))


class KAN(nn.Sequential):
    """Layers of learned curves one after another; tokens on their own, as an MLP.

    Args:
        dims: widths, from that of ``x`` to that of the output.
        grids: bumps per channel.

    Reference: FasterKAN, 2024 (after Liu et al., 2024, arXiv 2404.19756, and Li, 2024, arXiv 2405.06721).

    >>> KAN((8, 16, 8))(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(self, dims: Sequence[int], grids: int = 8):
        widths = [check_int("dims", d, least=1) for d in dims]
        if len(widths) < 2:
            raise ValueError(f"dims={tuple(dims)} must hold two widths or more")
        super().__init__(*(KANLayer(a, b, grids) for a, b in zip(widths, widths[1:], strict=False)))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(..., dims[0]) -> (..., dims[-1])."""
        return cast(Tensor, super().forward(x))
