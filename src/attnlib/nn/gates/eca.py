"""Efficient channel attention: a channel's gate from the means of its neighbours. A yardstick for other gates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from ...checks import check_int
from ..layers import masked_mean
from ..registry import register
from ..released import Released
from .base import Gate


@register("eca", "efficient-channel-attention")
class EfficientChannelAttention(Gate):
    """``y = x * sigmoid(conv_k(mean(x)))``, a convolution along the channels: k parameters.

    Args:
        dim: width of ``x``.
        kernel_size: k, odd; by default ``|log2(C) + 1| / 2`` rounded down, made odd by adding one, and at least 3.

    Reference: Wang et al., 2020, "ECA-Net", arXiv 1910.03151.

    >>> import torch
    >>> sum(p.numel() for p in EfficientChannelAttention(dim=64).parameters())
    3
    >>> EfficientChannelAttention(dim=8)(torch.randn(2, 4, 5, 8)).shape
    torch.Size([2, 4, 5, 8])
    """

    def __init__(self, dim: int, kernel_size: int | None = None):
        super().__init__(dim)
        if kernel_size is None:
            kernel_size = max(int(abs(math.log2(dim) + 1) / 2) // 2 * 2 + 1, 3)
        check_int("kernel_size", kernel_size, least=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def _gate(self, x: Tensor, valid: Tensor | None) -> Tensor:
        gate = self.conv(masked_mean(x, valid).unsqueeze(1)).sigmoid()
        return gate.view(x.shape[0], *[1] * (x.dim() - 2), x.shape[-1])

    @staticmethod
    def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's ``EcaModule`` and the authors' ``eca_layer``."""
        theirs = Released(state_dict, "timm's EcaModule or the authors' eca_layer")
        return theirs.close(theirs.renamed({r"conv\.weight": "conv.weight"}))
