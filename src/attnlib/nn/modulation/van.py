"""Large kernel attention: a gate from a large depthwise kernel, taken apart into a small, a dilated and a 1 x 1 one.

Guo et al., 2022, "Visual Attention Network", arXiv 2202.09741. A K x K kernel becomes a depthwise one of ``2 d - 1``,
one of ``K / d``, rounded up, with dilation d, and a linear map over channels. What comes out is multiplied onto what
went in: no softmax, no sigmoid, linear in the tokens.

Differs from the authors' code: other kernels and dilations than 21 and 3; grids of rank 1 and 3; tokens outside
``valid`` are zero before both convolutions. Where ``K / d`` is even, the dilated kernel has one tap more, for a middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...checks import check_choice, check_int
from ...types import Traits
from ..base import Mechanism
from ..layers import DepthwiseConv, zero_invalid
from ..registry import register
from ..released import Released, Rule


@register("van-large-kernel-attention", "lka", "large-kernel-attention")
class LargeKernelAttention(Mechanism):
    """``y = x + W_2 (u * g(u))`` with ``u = gelu(W_1 x)`` and ``g(u) = W conv_d(conv(u))``, the large kernel.

    The gate of a token reads ``2 d - 1 + d (k - 1)`` tokens along each axis, with k taps of the dilated kernel: 23 for
    the defaults. The shortcut inside is that of the authors, beside the one of the block around it; it adds what comes
    in here, which is normed there.

    Args:
        dim: width.
        kernel_size: K.
        dilation: d.
        grid_rank: axes of the grid.

    Reference: Guo et al., 2022, arXiv 2202.09741, section 3.1.

    >>> import torch
    >>> LargeKernelAttention(dim=8)(torch.randn(2, 6, 5, 8)).shape
    torch.Size([2, 6, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({1, 2, 3}), work={"N": 1}, memory={"N": 1}
    )

    def __init__(self, dim: int, kernel_size: int = 21, dilation: int = 3, grid_rank: int = 2):
        super().__init__(dim)
        check_choice("grid_rank", grid_rank, (1, 2, 3))
        check_int("dilation", dilation, least=1)
        check_int("kernel_size", kernel_size, least=dilation)
        self.grid_rank = grid_rank
        self.proj_in, self.act = nn.Linear(dim, dim), nn.GELU()
        self.conv = DepthwiseConv(dim, 2 * dilation - 1, grid_rank)
        self.dilated = DepthwiseConv(dim, -(-kernel_size // dilation) | 1, grid_rank, dilation=dilation)
        self.point, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(grid_ranks=frozenset({self.grid_rank}))

    def gate(self, u: Tensor, valid: Tensor | None = None) -> Tensor:
        """What (B, *grid, dim) is multiplied by."""
        u = zero_invalid(self.conv(zero_invalid(u, valid)), valid)
        return self.point(self.dilated(u))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        u = self.act(self.proj_in(x))
        return x + self.proj(u * self.gate(u, valid))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """From the authors' ``Attention``."""
        theirs = Released(state_dict, "VAN's Attention")
        names = {"proj_1": "proj_in", "proj_2": "proj", r"spatial_gating_unit\.conv1": "point"}
        rules: dict[str, Rule] = {
            r"spatial_gating_unit\.conv0\.(weight|bias)": r"conv.\1",
            r"spatial_gating_unit\.conv_spatial\.(weight|bias)": r"dilated.\1",
        }
        for name, ours in names.items():
            rules[rf"{name}\.(weight|bias)"] = lambda m, t, ours=ours: {  # type: ignore[misc]
                f"{ours}.{m[1]}": t.flatten(1) if t.dim() == 4 else t
            }
        return theirs.close(theirs.renamed(rules))
