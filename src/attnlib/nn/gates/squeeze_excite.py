"""Squeeze-and-excitation: one gate per channel from the mean token. A yardstick for other gates."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ...checks import check_int, check_real
from ..layers import SqueezeExcite
from ..registry import register
from ..released import Released, Rule
from .base import Gate


@register("squeeze-excite", "se")
class SqueezeExciteGate(Gate):
    """``y = x * sigmoid(W_2 relu(W_1 mean(x)))``; 2 C h + C + h parameters with h hidden channels.

    Args:
        dim: width of ``x``.
        reduction: C / h before rounding.
        divisor: h is rounded to a multiple of it, half up, and is at least as large.

    Differs from timm's ``SEModule``: its ``make_divisible`` has ``divisor=8`` (and ``reduction=16``), where any one is
    possible here; absent tokens leave the mean.

    Reference: Hu et al., 2018, "Squeeze-and-Excitation Networks", arXiv 1709.01507.

    >>> import torch
    >>> SqueezeExciteGate(dim=32)(torch.randn(2, 4, 5, 32)).shape
    torch.Size([2, 4, 5, 32])
    """

    def __init__(self, dim: int, reduction: float = 16, divisor: int = 1):
        super().__init__(dim)
        check_real("reduction", reduction, above=0)
        check_int("divisor", divisor, least=1)
        self.hidden = max(divisor, int(dim / reduction + divisor / 2) // divisor * divisor)
        self.se = SqueezeExcite(dim, self.hidden)

    def _gate(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.se.weights(x, valid)

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's ``SEModule`` and ``SqueezeExcite``, whose linear maps are 1 x 1 convolutions."""
        theirs = Released(state_dict, "timm's SEModule")
        rules: dict[str, Rule] = {
            r"(?:fc1|conv_reduce)\.weight": lambda match, value: {"se.fc1.weight": value.flatten(1)},
            r"(?:fc2|conv_expand)\.weight": lambda match, value: {"se.fc2.weight": value.flatten(1)},
            r"(?:fc1|conv_reduce)\.bias": "se.fc1.bias",
            r"(?:fc2|conv_expand)\.bias": "se.fc2.bias",
        }
        return theirs.close(theirs.renamed(rules))
