"""Additive attention gate of a skip connection: what the decoder holds says where the skip is let through.

Oktay et al., 2018, "Attention U-Net", arXiv 1804.03999, eq. 1 and 2, on grids that are alike:

    ``a = relu(BN(W_s skip) + BN(W_g signal))``,  ``psi = sigmoid(BN(w . a))``,  ``y = skip * psi``,

psi being one channel for all of the skip's. AGUNet (Bouget et al., 2021, arXiv 2101.07715) puts both projections side
by side instead of adding them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_int, check_real, check_valid, describe
from ..layers import masked_batch_norm, zero_invalid

COMBINES = ("sum", "concat")


class AdditiveSkipGate(nn.Module):
    """``skip * sigmoid(BN(w . relu([BN(W_g signal), BN(W_s skip)])))``; a sum in place of ``[,]`` with ``"sum"``.

    Args:
        skip_dim: channels of the skip.
        signal_dim: channels of the gating signal.
        dim: channels of each projection.
        combine: ``"sum"`` or ``"concat"``.
        norm: BatchNorm of the projections and of what the sigmoid sees.
        eps, momentum: of the norms.

    >>> AdditiveSkipGate(8, 6, 4)(torch.randn(2, 5, 6, 7, 8), torch.randn(2, 5, 6, 7, 6)).shape
    torch.Size([2, 5, 6, 7, 8])
    """

    def __init__(
        self, skip_dim: int, signal_dim: int, dim: int, combine: str = "sum", norm: bool = True, eps: float = 1e-5,
        momentum: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("skip_dim", skip_dim), ("signal_dim", signal_dim), ("dim", dim)):
            check_int(name, value, least=1)
        check_choice("combine", combine, COMBINES)
        check_flag("norm", norm)
        check_real("eps", eps, above=0)
        self.skip_dim, self.signal_dim, self.combine = skip_dim, signal_dim, combine
        self.signal, self.skip = nn.Linear(signal_dim, dim), nn.Linear(skip_dim, dim)
        self.psi = nn.Linear(dim * (1 + (combine == "concat")), 1)

        def made(width: int) -> nn.BatchNorm2d | None:
            return nn.BatchNorm2d(width, eps, momentum) if norm else None

        self.signal_norm, self.skip_norm, self.psi_norm = made(dim), made(dim), made(1)

    def gate(self, skip: Tensor, signal: Tensor, valid: Tensor | None = None) -> Tensor:
        """psi (B, *grid, 1), to look at; shapes as of :meth:`forward`."""
        for name, x, width in (("skip", skip, self.skip_dim), ("signal", signal, self.signal_dim)):
            if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[-1] != width or not x.is_floating_point():
                raise ValueError(f"{name} must be a map (B, *grid, {width}) of floating point, got {describe(x)}")
        if skip.shape[:-1] != signal.shape[:-1]:
            raise ValueError(
                f"skip and signal must have one grid, got {tuple(skip.shape[:-1])} and {tuple(signal.shape[:-1])}"
            )
        check_valid("valid", valid, skip.shape[:-1])
        g = self._normed(self.signal_norm, self.signal(zero_invalid(signal, valid)), valid)
        s = self._normed(self.skip_norm, self.skip(zero_invalid(skip, valid)), valid)
        a = torch.cat([g, s], -1) if self.combine == "concat" else g + s
        return self._normed(self.psi_norm, self.psi(a.relu()), valid).sigmoid()

    def forward(self, skip: Tensor, signal: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, skip_dim), (B, *grid, signal_dim) -> (B, *grid, skip_dim).

        Args:
            skip: what is gated.
            signal: what says where.
            valid: (B, *grid) boolean, which places exist; others are zeros and enter no statistic.
        """
        return zero_invalid(skip, valid) * self.gate(skip, signal, valid)

    @staticmethod
    def _normed(norm: nn.BatchNorm2d | None, x: Tensor, valid: Tensor | None) -> Tensor:
        return x if norm is None else masked_batch_norm(norm, x, valid)
