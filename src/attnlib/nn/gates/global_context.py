"""Global context: one attended mean of a whole map, added to every place of it.

Cao et al., 2019, "GCNet", arXiv 1904.11492. With ``a = softmax_n(w . x_n)`` over all places n,

    ``c = sum_n a_n x_n``,  ``y_n = x_n + W_2 relu(norm(W_1 c))``.

W_2 starts as zeros, so that the block starts as the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...checks import check_int, check_valid, describe
from ...types import stats_dtype
from ..layers import zero_invalid


class GlobalContext(nn.Module):
    """``x + W_2 relu(LayerNorm(W_1 c))`` with c the attended mean, on (B, *grid, dim).

    Args:
        dim: channels.
        hidden: of the middle layer; ``dim // 16`` by default, at least 4, as a norm of one number is a constant.

    >>> x = torch.randn(2, 4, 5, 32)
    >>> GlobalContext(32)(x).equal(x)
    True
    """

    def __init__(self, dim: int, hidden: int | None = None):
        super().__init__()
        self.dim = check_int("dim", dim, least=1)
        hidden = max(4, dim // 16) if hidden is None else check_int("hidden", hidden, least=1)
        self.score = nn.Linear(dim, 1)
        last = nn.Linear(hidden, dim)
        self.change = nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), last)
        nn.init.kaiming_normal_(self.score.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.score.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def context(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """c (B, dim); zeros where nothing exists."""
        if not isinstance(x, Tensor) or x.dim() < 3 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise ValueError(f"x must be a map (B, *grid, {self.dim}) of floating point, got {describe(x)}")
        check_valid("valid", valid, x.shape[:-1])
        x = zero_invalid(x, valid).flatten(1, -2)
        score = self.score(x).squeeze(-1).to(stats_dtype(x.dtype))
        if valid is not None:
            exists = valid.flatten(1)
            score = score.masked_fill(~exists, torch.finfo(score.dtype).min)
            share = score.softmax(1) * exists
        else:
            share = score.softmax(1)
        return (share.to(x.dtype).unsqueeze(1) @ x).squeeze(1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, *grid, dim) -> the same; places outside ``valid`` are zeros."""
        c = self.change(self.context(x, valid))
        return zero_invalid(x + c.view(len(x), *[1] * (x.dim() - 2), self.dim), valid)


__all__ = ["GlobalContext"]
