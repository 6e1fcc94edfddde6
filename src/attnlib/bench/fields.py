"""What a token sees: from gradients, of trained models on average and of single modules exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def squared_gradients(y: Tensor, x: Tensor) -> Tensor:
    """(H, W): squared gradient of one token ``y`` (B, C) with regard to the pixels of ``x`` (B, C', H, W), summed.

    Of the token's mean and of its square, so that neither a norm nor a sign makes it vanish.
    """
    (grad,) = torch.autograd.grad(y.mean(-1).sum() + (y**2).sum(), x)
    return grad.square().sum((0, 1))


def mean_distance(mass: Tensor, centre: Sequence[float]) -> float:
    """Pixels between ``centre`` (row, column) and what the token depends on, weighted (Luo et al., 2016).

    >>> round(mean_distance(torch.eye(3), (1.0, 1.0)), 6) == round(2 * 2**0.5 / 3, 6)
    True
    """
    rows, columns = (torch.arange(n).double() - c for n, c in zip(mass.shape, centre, strict=True))
    distance = (rows[:, None] ** 2 + columns[None] ** 2).sqrt()
    return float((mass * distance).sum() / mass.sum())


def support(module: nn.Module, dim: int, side: int) -> tuple[int, int]:
    """Rows and columns of the smallest box with all tokens that the middle one of ``side`` x ``side`` depends on.

    Args:
        module: from (B, H, W, dim) to the same, in evaluation.
        dim: channels.
        side: odd.

    >>> support(nn.Identity(), 4, 5)
    (1, 1)
    """
    x = torch.randn(1, side, side, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x.movedim(-1, 1).requires_grad_()
    y = module.double().eval()(x.movedim(1, -1))
    rows, columns = squared_gradients(y[:, side // 2, side // 2], x).nonzero().T
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
