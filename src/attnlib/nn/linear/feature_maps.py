"""Learned feature maps of linear attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checks import check_real, checked
from ...ops.feature_maps import elu1, exp_features, joint_softmax_features, softmax_features
from ...types import check_choice

#: Kinds of features that have no second half.
HALVES = ("elu1", "relu")
KINDS = ("softmax", "exp", "exp-unstable", "joint-softmax", *HALVES)
#: What else a caller may set who has heads, widths and the kind from elsewhere.
OPTIONS = ("fullspace", "identity", "normal", "skip", "bias", "hidden", "eps")
#: Lower bound of every feature, so that a sum of them is never zero.
EPS = 1e-12


@checked
class HedgehogFeatures(nn.Module):
    """``phi(x) = [f(x W_h), f(-x W_h)]`` with one matrix ``W_h`` per head, trained to reproduce softmax attention.

    Args:
        num_heads: heads.
        head_dim: width D of a head.
        feature_dim: columns F of each matrix; the features are ``2 F`` wide (``F`` without ``fullspace``). Defaults to
            ``head_dim``.
        kind: ``"softmax"`` over each half, ``"exp"`` (after subtracting each token's maximum), ``"exp-unstable"`` (the
            paper's own form), ``"joint-softmax"`` over both halves, or LoLCATs' ``"elu1"`` and ``"relu"``, which have
            no second half.
        fullspace: append the features of ``-x W_h``.
        identity: start from the identity instead of random matrices; with ``skip``, from zeros.
        normal: start from standard normal matrices.
        skip: ``phi`` of ``x + x W_h`` instead of ``x W_h``; needs ``feature_dim == head_dim``.
        bias: add a number per head to ``x W_h``; ``"features"`` adds one per feature, which starts at zero.
        hidden: instead of ``W_h`` an adapter, ``x + relu(x A_h + a_h) B_h + b_h`` through this width, from zeros.
        eps: lower bound of every feature (``"joint-softmax"`` has none).

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
        normal: bool = False,
        skip: bool = False,
        bias: bool | str = False,
        hidden: int | None = None,
        eps: float = EPS,
    ):
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_real("eps", eps, least=0)
        check_choice("bias", bias, (False, True, "features"))
        if hidden is not None and (hidden < 1 or identity or normal or bias):
            raise ValueError(f"hidden={hidden} must be at least 1, and goes without identity, normal and bias")
        if identity and normal:
            raise ValueError("identity=True and normal=True are two starts; give one of them")
        skip = skip or hidden is not None
        fullspace = fullspace and kind not in HALVES
        if kind == "joint-softmax" and not fullspace:
            raise ValueError("fullspace=False is not possible with kind='joint-softmax', which spans both halves")
        feature_dim = head_dim if feature_dim is None else feature_dim
        if skip and feature_dim != head_dim:
            raise ValueError(f"skip needs feature_dim == head_dim, got {feature_dim} and {head_dim}")
        self.kind, self.fullspace, self.skip, self.eps = kind, fullspace, skip, eps
        self.width = feature_dim * (2 if fullspace else 1)
        self.hidden, self.bias = hidden, None
        if hidden is not None:
            self.layer0 = nn.Parameter(torch.zeros(num_heads, head_dim, hidden))
            self.layer1 = nn.Parameter(torch.zeros(num_heads, hidden, feature_dim))
            self.bias0 = nn.Parameter(torch.zeros(1, num_heads, 1, hidden))
            self.bias1 = nn.Parameter(torch.zeros(1, num_heads, 1, feature_dim))
            return
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim))
        if identity and skip:
            nn.init.zeros_(self.weight)
        elif identity:
            with torch.no_grad():
                self.weight.copy_(torch.eye(head_dim, feature_dim).expand_as(self.weight))
        elif normal:
            nn.init.normal_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight)
        if bias == "features":
            self.bias = nn.Parameter(torch.zeros(1, num_heads, 1, feature_dim))
        elif bias:
            self.bias = nn.Parameter(torch.empty(1, num_heads, 1, 1))
            nn.init.kaiming_uniform_(self.bias)

    def _linear(self, x: Tensor) -> Tensor:
        if self.hidden is not None:
            return torch.relu(x @ self.layer0 + self.bias0) @ self.layer1 + self.bias1
        z = x @ self.weight
        return z if self.bias is None else z + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, N, D) to (B, H, N, width)."""
        z = self._linear(x)
        if self.skip:
            z = x + z
        if self.kind in HALVES:
            return (elu1(z) if self.kind == "elu1" else torch.relu(z)).clamp(min=self.eps)
        if self.kind == "joint-softmax":
            return joint_softmax_features(z)
        if self.kind == "softmax":
            return softmax_features(z, self.fullspace, self.eps)
        return exp_features(z, self.fullspace, stable=self.kind == "exp", eps=self.eps)

    def extra_repr(self) -> str:
        shape = tuple(self.layer0.shape if self.hidden is not None else self.weight.shape)
        return f"{shape}, kind={self.kind!r}, fullspace={self.fullspace}"
