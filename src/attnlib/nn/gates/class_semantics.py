"""Class semantics-based attention: what a recogniser said of a video gates what a localiser makes of it.

Along time, a localiser maps recognition features ``R`` to ``F`` and reads off where actions begin and end. Here ``F``
is weighed by two gates that are computed from ``R`` and not from ``F`` (as squeeze-and-excitation would):

    ``a_c = sigmoid(W_2 relu(W_1 mean_t(conv_k R)))`` for every channel of ``F``,
    ``a_t = sigmoid(conv_k relu(conv_k R))`` for every point in time,

and what both leave is fused, ``F' = F a_c + F a_t`` or by a 1 x 1 convolution of the two.

Reference: Sridhar et al., 2021, "Class Semantics-based Attention for Action Detection", arXiv 2109.02613. No code was
released: that both gates look at channels and a stretch of time of ``R`` is the paper's, the layers are our reading.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_axes, check_choice, check_float, check_int, check_valid
from ..layers import zero_invalid

FUSIONS = ("sum", "concat")


class SemanticGates(NamedTuple):
    """Between 0 and 1: of channels (B, 1, C), of points in time (B, T, 1)."""

    channel: Tensor
    time: Tensor


class _Along(nn.Conv1d):
    """A convolution along time of (B, T, C), zeros beyond both ends."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class ClassSemanticsAttention(nn.Module):
    """Features of a localiser, weighed by gates from the features of a recogniser.

    Args:
        dim: C, channels of the features that are weighed.
        semantic_dim: channels of ``R``; C by default.
        hidden: of both gates; a quarter of C by default.
        kernel_size: stretch of time, odd; 1 looks at single points, and without ``channel_conv`` the channel gate of
            ``R = F`` is squeeze-and-excitation.
        channel_conv: whether the channel gate convolves ``R`` along time before it averages.
        fusion: ``"sum"``, or ``"concat"`` and a 1 x 1 convolution.

    Shape:
        x: (B, T, C). semantics: (B, S, semantic_dim); another number of points in time is resampled linearly. ``valid``
        (B, T) boolean, which points of ``x`` exist; others come out as zeros. Returns (B, T, C).

    >>> module = ClassSemanticsAttention(8, semantic_dim=5)
    >>> module(torch.randn(2, 10, 8), torch.randn(2, 10, 5)).shape
    torch.Size([2, 10, 8])
    """

    def __init__(
        self, dim: int, semantic_dim: int | None = None, hidden: int | None = None, kernel_size: int = 3,
        channel_conv: bool = True, fusion: str = "sum",
    ):  # fmt: skip
        super().__init__()
        check_int("dim", dim, least=1)
        semantic_dim = dim if semantic_dim is None else check_int("semantic_dim", semantic_dim, least=1)
        hidden = max(1, dim // 4) if hidden is None else check_int("hidden", hidden, least=1)
        check_int("kernel_size", kernel_size, least=1)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        check_choice("fusion", fusion, FUSIONS)
        self.dim, self.semantic_dim = dim, semantic_dim
        around = kernel_size // 2
        self.conv = _Along(semantic_dim, semantic_dim, kernel_size, padding=around) if channel_conv else nn.Identity()
        self.fc1, self.fc2 = nn.Linear(semantic_dim, hidden), nn.Linear(hidden, dim)
        self.time1 = _Along(semantic_dim, hidden, kernel_size, padding=around)
        self.time2 = _Along(hidden, 1, kernel_size, padding=around)
        self.fuse = nn.Linear(2 * dim, dim) if fusion == "concat" else None

    def gates(self, semantics: Tensor, length: int | None = None, valid: Tensor | None = None) -> SemanticGates:
        """Both gates.

        Args:
            semantics: (B, S, semantic_dim).
            length: T, points in time of what is gated; S by default.
            valid: (B, T) boolean, which of these exist.
        """
        check_axes("semantics", semantics, B=None, S=None, semantic_dim=self.semantic_dim)
        check_float("semantics", semantics)
        if not semantics.shape[1]:
            raise ValueError("semantics must hold one point in time at least, got none")
        length = semantics.shape[1] if length is None else check_int("length", length, least=1)
        if semantics.shape[1] != length:
            if valid is not None and not torch.compiler.is_compiling() and not bool(valid.all()):
                raise ValueError(
                    f"valid marks points of x, but semantics has {semantics.shape[1]} points for {length}: resample it "
                    "to the same points first, so that absent ones are not mixed in"
                )
            semantics = F.interpolate(semantics.mT, length, mode="linear", align_corners=False).mT
        check_valid("valid", valid, semantics.shape[:2])
        semantics = zero_invalid(semantics, valid)
        seen = self.conv(semantics)
        if valid is None:
            mean = seen.mean(1)
        else:
            mean = zero_invalid(seen, valid).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        channel = self.fc2(self.fc1(mean).relu()).sigmoid().unsqueeze(1)
        # What absent points would hold counts as the zeros beyond the end do.
        time = self.time2(zero_invalid(self.time1(semantics).relu(), valid)).sigmoid()
        return SemanticGates(channel, time)

    def forward(self, x: Tensor, semantics: Tensor, valid: Tensor | None = None) -> Tensor:
        check_axes("x", x, B=None, T=None, C=self.dim)
        check_float("x", x)
        check_valid("valid", valid, x.shape[:2])
        check_float("semantics", semantics)
        if semantics.shape[:1] != x.shape[:1]:
            raise ValueError(f"x and semantics must share the batch, got {tuple(x.shape)} and {tuple(semantics.shape)}")
        channel, time = self.gates(semantics, x.shape[1], valid)
        x = zero_invalid(x, valid)
        if self.fuse is None:
            return x * channel + x * time
        return zero_invalid(self.fuse(torch.cat([x * channel, x * time], -1)), valid)
