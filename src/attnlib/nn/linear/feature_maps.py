"""Learned feature maps of linear attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.feature_maps import exp_features, joint_softmax_features, softmax_features
from ...types import check_choice


class HedgehogFeatures(nn.Module):
    """``phi(x) = [f(x W_h), f(-x W_h)]`` with one matrix ``W_h`` per head, trained to reproduce softmax attention.

    Args:
        num_heads: heads.
        head_dim: width D of a head.
        feature_dim: columns F of each matrix; the features are ``2 F`` wide (``F`` without ``fullspace``). Defaults to
            ``head_dim``.
        kind: ``"softmax"`` over each half, ``"exp"`` (after subtracting each token's maximum), ``"exp-unstable"`` (the
            paper's own form) or ``"joint-softmax"`` over both halves.
        fullspace: append the features of ``-x W_h``.
        identity: start from the identity instead of random matrices.
        skip: ``phi`` of ``x + x W_h`` instead of ``x W_h``; needs ``feature_dim == head_dim``.

    Reference: Zhang et al., 2024, arXiv 2402.04347; the stable forms are those of LoLCATs, arXiv 2410.10254.

    >>> HedgehogFeatures(num_heads=2, head_dim=4)(torch.randn(1, 2, 5, 4)).shape
    torch.Size([1, 2, 5, 8])
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        feature_dim: int | None = None,
        kind: str = "softmax",
        fullspace: bool = True,
        identity: bool = False,
        skip: bool = False,
    ):
        super().__init__()
        check_choice("kind", kind, ("softmax", "exp", "exp-unstable", "joint-softmax"))
        if kind == "joint-softmax" and not fullspace:
            raise ValueError("fullspace=False is not possible with kind='joint-softmax', which spans both halves")
        feature_dim = head_dim if feature_dim is None else feature_dim
        if skip and feature_dim != head_dim:
            raise ValueError(f"skip needs feature_dim == head_dim, got {feature_dim} and {head_dim}")
        self.kind, self.fullspace, self.skip = kind, fullspace, skip
        self.width = feature_dim * (2 if fullspace else 1)
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim))
        if skip:
            nn.init.zeros_(self.weight)
        elif identity:
            with torch.no_grad():
                self.weight.copy_(torch.eye(head_dim, feature_dim).expand_as(self.weight))
        else:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, N, width)."""
        z = x @ self.weight
        if self.skip:
            z = x + z
        if self.kind == "joint-softmax":
            return joint_softmax_features(z)
        if self.kind == "softmax":
            return softmax_features(z, self.fullspace)
        return exp_features(z, self.fullspace, stable=self.kind == "exp")

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, kind={self.kind!r}, fullspace={self.fullspace}"
