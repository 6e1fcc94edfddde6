"""Efficient local attention: a gate per row and a gate per column, from one-dimensional convolutions of strip means.

Xu and Wan, 2024, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", arXiv 2403.01123. The strip
means ``s_h`` (over the columns, one per row) and ``s_w`` (over the rows, one per column) are convolved along the strip,
normed over groups of channels and squashed,

    ``a = sigmoid(GroupNorm(conv_k(s_h)))``,  ``b = sigmoid(GroupNorm(conv_k(s_w)))``,  ``y_ij = x_ij a_i b_j``:

the gate of a channel has rank 1. No authors' code is released. Our reading: convolutions without bias, and one
convolution and norm for both directions, as the implementations that circulate have it; ``shared=False`` gives each
direction its own, as the paper's ``F_h`` and ``F_w`` may mean.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...checks import check_choice, check_divides, check_flag, check_int
from ...ops.modulation import pool
from ..layers import masked_group_norm, zero_invalid
from ..registry import register
from .base import Gate

#: Kernel, channels per group of the convolution (1: depthwise), groups of the norm.
VERSIONS = {"tiny": (5, 1, 32), "base": (7, 1, 16), "small": (5, 8, 16), "large": (7, 8, 16)}


@register("ela-efficient-local-attention", "ela")
class EfficientLocalAttention(Gate):
    """Row and column gates of a map; shapes x and y (B, H, W, C).

    The parameters, with one convolution and norm for both directions: tiny ``7 C``, base ``9 C``, small ``42 C``, large
    ``58 C``; twice as many with ``shared=False``. A strip of length 1 with one channel per group of the norm has no
    variance, so that its gate is that of the norm's bias, whatever the map holds.

    Args:
        dim: width C; a multiple of the groups.
        version: ``"tiny"`` (kernel 5, depthwise, 32 groups in the norm), ``"base"`` (7, depthwise, 16), ``"small"`` (5,
            8 channels per group, 16) or ``"large"`` (7, 8 channels per group, 16).
        num_groups: of the norm instead of the version's; ``"gcd"``: the greatest common divisor of the version's and
            C, for narrow maps.
        shared: one convolution and norm for rows and columns.

    Reference: Xu and Wan, 2024, arXiv 2403.01123, section 3.3 and table 1.

    >>> module = EfficientLocalAttention(dim=256)
    >>> sum(p.numel() for p in module.parameters()), module(torch.randn(2, 4, 5, 256)).shape
    (2304, torch.Size([2, 4, 5, 256]))
    """

    class_traits = Gate.class_traits.but(grid_ranks=frozenset({2}), permutation_equivariant=False)

    def __init__(self, dim: int, version: str = "base", num_groups: int | str | None = None, shared: bool = True):
        super().__init__(dim)
        check_choice("version", version, tuple(VERSIONS))
        check_flag("shared", shared)
        kernel, per_group, norm_groups = VERSIONS[version]
        if isinstance(num_groups, str):
            check_choice("num_groups", num_groups, ("gcd",))
            norm_groups = math.gcd(norm_groups, dim)
        elif num_groups is not None:
            norm_groups = check_int("num_groups", num_groups, least=1)
        check_divides("num_groups", norm_groups, "dim", dim)
        check_divides(f"channels per group of version={version!r}", per_group, "dim", dim)
        self.version, self.shared = version, shared
        count = 1 if shared else 2
        self.convs = nn.ModuleList(
            nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim // per_group, bias=False) for _ in range(count)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(norm_groups, dim) for _ in range(count))

    def strip_gates(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The gates of rows (B, H, 1, C) and of columns (B, 1, W, C); of a map whose absent tokens are zeros."""
        gates = []
        for axis in (0, 1):
            conv, norm = (layers[axis if len(layers) > 1 else 0] for layers in (self.convs, self.norms))
            exists = None if valid is None else valid.any(2 - axis)
            strip = zero_invalid(pool(x, keep=axis, valid=valid).squeeze(2 - axis), exists)
            strip = conv(strip.transpose(1, 2)).transpose(1, 2)
            assert isinstance(norm, nn.GroupNorm)
            gates.append(masked_group_norm(norm, strip, exists).sigmoid().unsqueeze(2 - axis))
        return gates[0], gates[1]

    def _gate(self, x: Tensor, valid: Tensor | None) -> Tensor:
        rows, columns = self.strip_gates(x, valid)
        return rows * columns

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:  # type: ignore[override]
        rows, columns = self.strip_gates(x, valid)
        return x * rows * columns  # the whole gate, as large as the map, need not exist
