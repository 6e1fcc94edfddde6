"""Scale-aware modulation: a gate from depthwise convolutions of several sizes, whose channels are mixed across sizes.

Lin et al., 2023, "Scale-Aware Modulation Meet Transformer", arXiv 2307.08579. Runs of channels see kernels of 3, 5,
7 ... (multi-head mixed convolution); groups of one channel of every run are mixed, then all of them (scale-aware
aggregation). What comes out is multiplied onto the values: no softmax, no sigmoid, linear in the tokens.

Differs from the authors' code: tokens outside ``valid`` are zero before every convolution and enter no statistic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...checks import check_divides, check_int
from ...ops.modulation import mixed_depthwise
from ...types import Traits
from ..base import Mechanism
from ..layers import ConvNorm, DepthwiseConv, init_like_pvt
from ..registry import register
from ..released import Released, Rule


@register("smt-scale-aware-modulation", "scale-aware-modulation")
class ScaleAwareModulation(Mechanism):
    """``y = W_o (a * W_v x)`` with ``a = W_2 gelu(BN(W_1 s))`` and ``s = interleave(conv_i((W_s x)_i))``.

    ``(W_s x)_i`` is the i-th of H runs of channels, its kernel ``2 i + 3`` wide, i from 0. Interleaved, the channels j
    of all runs stand side by side; ``W_1`` maps each such group of H channels by itself, ``W_2`` all of them.

    Args:
        dim: width.
        num_heads: H; must divide ``dim``.
        expand_ratio: width between ``W_1`` and ``W_2`` over ``dim``.
        bias: of ``W_v`` and ``W_s``.

    Reference: Lin et al., 2023, arXiv 2307.08579, section 3.1.

    >>> import torch
    >>> ScaleAwareModulation(dim=8)(torch.randn(2, 6, 5, 8)).shape
    torch.Size([2, 6, 5, 8])
    """

    class_traits = Traits(
        patterns=frozenset({"noncausal-self"}), grid_ranks=frozenset({2}), work={"N": 1}, memory={"N": 1}
    )

    def __init__(self, dim: int, num_heads: int = 4, expand_ratio: int = 2, bias: bool = True):
        super().__init__(dim)
        check_divides("num_heads", num_heads, "dim", dim)
        hidden = dim * check_int("expand_ratio", expand_ratio, least=1)
        self.num_heads, groups = num_heads, dim // num_heads
        self.v, self.s = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.local = nn.ModuleList(DepthwiseConv(groups, 3 + 2 * i) for i in range(num_heads))
        self.within = ConvNorm(dim, hidden, groups=groups, bias=True, activation=nn.GELU)
        self.across = ConvNorm(hidden, dim, bias=True, norm=False)
        self.proj = nn.Linear(dim, dim)
        init_like_pvt(self)

    @property
    def traits(self) -> Traits:
        return self.class_traits.but(batch_independent=not self.training)

    def scales(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, H, W, dim) through the convolutions of several sizes, the channels interleaved."""
        convs: list[Any] = list(self.local)
        s = mixed_depthwise(self.s(x), [c.weight for c in convs], biases=[c.bias for c in convs], valid=valid)
        return s.unflatten(-1, (self.num_heads, -1)).transpose(-1, -2).flatten(-2)

    def gate(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the values of (B, H, W, dim) are multiplied by."""
        return self.across(self.within(self.scales(x, valid), valid))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.proj(self.gate(x, valid) * self.v(x))

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the authors' ``Attention`` with ``ca_attention=1``."""
        theirs = Released(state_dict, "SMT's Attention with ca_attention=1")
        rules: dict[str, Rule] = {
            r"(v|s|proj)\.(weight|bias)": r"\1.\2",
            r"local_conv_(\d+)\.(weight|bias)": lambda m, t: {f"local.{int(m[1]) - 1}.{m[2]}": t},
            r"proj0\.(weight|bias)": r"within.conv.\1",
            r"bn\.(weight|bias|running_mean|running_var|num_batches_tracked)": r"within.norm.\1",
            r"proj1\.(weight|bias)": r"across.conv.\1",
        }
        return theirs.close(theirs.renamed(rules))
