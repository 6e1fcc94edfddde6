"""Generalized neighborhood attention: neighborhood attention whose window moves in strides.

Hassani et al., 2025, "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
arXiv 2504.16922. In the notation of ``fused-neighborhood-attention``, ``s`` consecutive queries share the window of
their leader:

- bidirectional: ``leader = min((i // s) s + s // 2, L - 1)``, ``centre = clamp(leader, w // 2, L - 1 - (w - 1) // 2)``;
- causal: ``leader = min((i // s) s + s - 1, L - 1)``, keys ``max(leader - w + 1, 0) .. i``.

``s = 1`` is neighborhood attention, ``s = w`` with ``w | L`` is attention in windows that do not overlap. Shared
windows make tiles of queries read whole tiles of keys: :mod:`attnlib.ops.neighborhood_sim` counts them.

A causal axis with ``s > 1`` does not stream: the leader of the last, incomplete group depends on the length of the
whole sequence.
"""

from __future__ import annotations

from typing import Any

from ..registry import register
from .fused_neighborhood_attention import FusedNeighborhoodAttention, PerAxis


@register("generalized-neighborhood-attention", "gna")
class GeneralizedNeighborhoodAttention(FusedNeighborhoodAttention):
    """Neighborhood attention with a stride between windows.

    Args:
        dim: width of ``x``.
        num_heads: heads; must divide ``dim``.
        kernel_size: keys per axis, at least 2.
        stride: queries that share a window, per axis, from 1 to ``kernel_size``.
        options: as in :class:`attnlib.nn.local.fused_neighborhood_attention.FusedNeighborhoodAttention`.

    Reference: Hassani et al., 2025, arXiv 2504.16922, section 3.

    >>> import torch
    >>> GeneralizedNeighborhoodAttention(dim=16, num_heads=4, kernel_size=4, stride=2)(torch.randn(2, 8, 8, 16)).shape
    torch.Size([2, 8, 8, 16])
    """

    def __init__(self, dim: int, num_heads: int = 8, kernel_size: PerAxis = 7, stride: PerAxis = 1, **options: Any):
        self.stride = stride  # first, because the parent checks its settings
        super().__init__(dim, num_heads, kernel_size, **options)
        self.reads_length = stride != 1
