"""Small pieces that many mechanisms share. All are channels-last; none knows a paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import check_divides, to_tuple


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, *grid, H * D) -> (B, H, N, D) with the grid flattened."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), num_heads, x.shape[-1] // num_heads)
    return x.transpose(1, 2)


def merge_heads(x: Tensor, grid: Sequence[int] | None = None) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D), or (B, *grid, H * D)."""
    x = x.transpose(1, 2).flatten(2)
    return x if grid is None else x.reshape(x.shape[0], *grid, x.shape[-1])


def head_dim_of(dim: int, num_heads: int) -> int:
    """``dim / num_heads``, checked."""
    check_divides("num_heads", num_heads, "dim", dim)
    return dim // num_heads


def flat_valid(valid: Tensor | None) -> Tensor | None:
    """(B, *grid) -> (B, N)."""
    return None if valid is None else valid.flatten(1)


def zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the tokens that do not exist: before convolutions, pools and scans. ``x`` is (B, *grid, C)."""
    return x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)


class DepthwiseConv(nn.Module):
    """Depthwise convolution of (B, *grid, C), zero padded to keep the size (or strided).

    Parameters live under the names and shapes of ``nn.Conv{r}d(dim, dim, kernel_size, groups=dim)``.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int | Sequence[int],
        rank: int = 2,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ):
        super().__init__()
        kernel = to_tuple("kernel_size", kernel_size, rank)
        self.rank, self.stride, self.dilation, self.dim = rank, stride, dilation, dim
        self.padding = tuple(dilation * (k // 2) for k in kernel)
        self.weight = nn.Parameter(torch.empty(dim, 1, *kernel))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        fan_in = math.prod(kernel)
        nn.init.uniform_(self.weight, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))

    def forward(self, x: Tensor) -> Tensor:
        conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        out = conv(
            x.movedim(-1, 1), self.weight, self.bias, stride=self.stride, padding=self.padding, dilation=self.dilation,
            groups=self.dim,
        )  # fmt: skip
        return out.movedim(1, -1)

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={tuple(self.weight.shape[2:])}, stride={self.stride}, dilation={self.dilation}"


class Mlp(nn.Module):
    """``Linear -> activation -> Linear`` on the last axis."""

    def __init__(self, dim: int, ratio: float = 4.0, activation: type[nn.Module] = nn.GELU, drop: float = 0.0):
        super().__init__()
        hidden = int(dim * ratio)
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))
