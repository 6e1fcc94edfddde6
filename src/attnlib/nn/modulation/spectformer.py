"""Spectral gating: tokens of a grid are mixed by a learned gate per frequency (SpectFormer, GFNet).

Patro et al., 2023, "SpectFormer: Frequency and Attention is what you need in a Vision Transformer", arXiv 2304.06446;
the layer is the global filter of Rao et al., 2021, "GFNet", arXiv 2107.00645.

Differs from the authors' code: a filter made for another grid is interpolated on request, tokens outside ``valid`` are
zeros to the transform, and the output has the type of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...checks import check_flag, check_grid
from ...ops.modulation import spectral_gate
from ...types import Traits
from ..base import Mechanism
from ..registry import register
from ..released import Released


@register("spectformer", "spectral-gating", "global-filter")
class SpectralGating(Mechanism):
    """``y = ifft(W * fft(x))``, a complex weight for every frequency and channel: a circular kernel of the whole grid.

    Args:
        dim: width.
        grid: sides of the grid that the filter is made for; a last side of an even n and of n + 1 have the same.
        resample: interpolate the filter for other grids, of rank 1 or 2, instead of refusing them.

    Reference: Patro et al., 2023, arXiv 2304.06446; Rao et al., 2021, arXiv 2107.00645.

    >>> import torch
    >>> SpectralGating(dim=8, grid=(6, 5))(torch.randn(2, 6, 5, 8)).shape
    torch.Size([2, 6, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({1, 2, 3}), work={"N": 1}, memory={"N": 1}
    )
    #: The filter is a table of frequencies, interpolated when weights of another grid are loaded.
    tables = {"filter": 2}
    table_mode = "bilinear"

    def __init__(self, dim: int, grid: Sequence[int] = (14, 14), resample: bool = False):
        super().__init__(dim)
        self.grid, self.resample = check_grid("grid", grid), check_flag("resample", resample)
        self.filter = nn.Parameter(torch.randn(2, dim, *self.grid[:-1], self.grid[-1] // 2 + 1) * 0.02)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(
            grid_ranks=frozenset({len(self.grid)}), resolution_free=self.resample and len(self.grid) < 3
        )

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return spectral_gate(x, self.filter, resample=self.resample, valid=valid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``SpectralGatingNetwork``, or GFNet's ``GlobalFilter``."""
        theirs = Released(state_dict, "the authors' SpectralGatingNetwork")
        return theirs.close({"filter": theirs.take("complex_weight").permute(3, 2, 0, 1)})
