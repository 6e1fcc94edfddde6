"""What stands at the bottom of a U-Net: modules ``(B, *grid, C) -> (B, *grid, C)`` on images and volumes.

- :class:`ASPP`: Chen et al., 2017, "Rethinking Atrous Convolution", arXiv 1706.05587, section 3.3.
- :class:`DualAttention`: Bouget et al., 2021, arXiv 2101.07715: DANet's two attentions, each behind convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checks import check_choice, check_flag, check_float, check_int, check_ints, check_rank, check_real, check_width
from ...nn.dense.danet import PositionAttention
from ...nn.modulation.danet import ChannelAttention

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
DROP: dict[int, Any] = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}


def _channels_first(x: Tensor, dim: int, rank: int) -> Tensor:
    """(B, *grid, dim) with ``rank`` axes of a grid that is not empty -> (B, dim, *grid)."""
    check_float("x", x)
    check_rank("x", x, rank + 2, f"(B, {', '.join('DHW'[-rank:])}, {dim})")
    check_width("x", x, dim)
    if not all(x.shape[1:-1]):
        raise ValueError(f"x must hold at least one place of every axis, got {tuple(x.shape)}")
    return x.movedim(-1, 1)


def conv_norm_act(
    rank: int, dim: int, out_dim: int, kernel: int = 3, *, rate: int = 1, bias: bool = True, norm: bool = True,
    act: bool = True, eps: float = 1e-5, momentum: float = 0.1,
) -> nn.Sequential:  # fmt: skip
    """Convolution that keeps the grid, BatchNorm and ReLU, on (B, C, *grid) of ``rank`` axes."""
    check_choice("rank", rank, tuple(CONV))
    for name, count in (("dim", dim), ("out_dim", out_dim), ("kernel", kernel), ("rate", rate)):
        check_int(name, count, least=1)
    check_real("eps", eps, least=0)
    check_real("momentum", momentum, least=0, most=1)
    layers: list[nn.Module] = [CONV[rank](dim, out_dim, kernel, 1, rate * (kernel // 2), rate, bias=bias)]
    if norm:
        layers.append(NORM[rank](out_dim, eps, momentum))
    if act:
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class ASPP(nn.Module):
    """Convolutions of several dilations side by side, a pixel's own and the mean of all; a 1 x 1 convolution over them.

    Args:
        dim: channels in.
        out_dim: channels out, and of every branch.
        rates: dilations of the 3 x 3 convolutions.
        rank: axes of the grid.
        pointwise: the branch of single pixels.
        pooled: the branch of the mean, which is left without BatchNorm: one image has no statistics of its mean.
        project: the convolution over all; without it there must be one branch, which is the answer.
        last_dim: channels of that convolution's answer; ``out_dim`` by default.
        mean_bias, mean_norm: whether the convolution of the mean has a bias, and a BatchNorm after all.

    >>> ASPP(8, 4, rank=3).eval()(torch.randn(1, 3, 4, 5, 8)).shape
    torch.Size([1, 3, 4, 5, 4])
    """

    def __init__(
        self, dim: int, out_dim: int, rates: Sequence[int] = (6, 12, 18), rank: int = 2, pointwise: bool = True,
        pooled: bool = True, project: bool = True, last_dim: int | None = None, mean_bias: bool = True,
        mean_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_choice("rank", rank, (1, 2, 3))
        self.dim, self.rank = check_int("dim", dim, least=1), rank
        check_int("out_dim", out_dim, least=1)
        last_dim = out_dim if last_dim is None else check_int("last_dim", last_dim, least=1)
        rates = check_ints("rates", rates, least=1)
        for name, flag in (("pointwise", pointwise), ("pooled", pooled), ("project", project),
                           ("mean_bias", mean_bias), ("mean_norm", mean_norm)):  # fmt: skip
            check_flag(name, flag)
        self.branches = nn.ModuleList(
            [*([conv_norm_act(rank, dim, out_dim, 1, bias=False)] if pointwise else []),
             *(conv_norm_act(rank, dim, out_dim, 3, rate=r, bias=False) for r in rates)]
        )  # fmt: skip
        self.mean = conv_norm_act(rank, dim, out_dim, 1, bias=mean_bias, norm=mean_norm) if pooled else None
        count = len(self.branches) + pooled
        if not count or (count > 1 and not project):
            raise ValueError(f"project=False needs exactly one branch, got {count}" if count else "ASPP has no branch")
        self.project = conv_norm_act(rank, count * out_dim, last_dim, 1, bias=False) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, dim) -> (B, *grid, last_dim)."""
        x = _channels_first(x, self.dim, self.rank)
        parts = [branch(x) for branch in self.branches]
        if self.mean is not None:
            mean = self.mean(x.flatten(2).mean(-1).view(*x.shape[:2], *[1] * (x.dim() - 2)))
            parts.append(mean.expand(-1, -1, *x.shape[2:]))
        return self.project(torch.cat(parts, 1)).movedim(1, -1)


class DualAttention(nn.Module):
    """Position and channel attention, each followed by two convolutions; their sum through a 1 x 1 and BatchNorm.

    Args:
        dim: channels in and out.
        rank: axes of the grid.
        sign, transposed: of the channel attention; DAUNet's ``X softmax(X^T X)`` by default.
        bias: of the position attention's linear maps.
        drop: dropout of whole channels, between the convolutions and after the sum.
        eps, momentum: of the norms.

    >>> DualAttention(8).eval()(torch.randn(1, 3, 4, 5, 8)).shape
    torch.Size([1, 3, 4, 5, 8])
    """

    def __init__(
        self, dim: int, rank: int = 3, sign: str = "alike", transposed: bool = True, bias: bool = False,
        drop: float = 0.5, eps: float = 1e-3, momentum: float = 0.01,
    ):  # fmt: skip
        super().__init__()
        self.dim, self.rank = check_int("dim", dim, least=1), rank
        check_choice("rank", rank, (1, 2, 3))
        check_real("drop", drop, least=0, below=1)
        options: dict[str, Any] = dict(eps=eps, momentum=momentum)

        def behind() -> nn.Sequential:
            return nn.Sequential(
                conv_norm_act(rank, dim, dim, **options), DROP[rank](drop), CONV[rank](dim, dim, 3, padding=1)
            )

        self.position, self.channel = PositionAttention(dim, bias=bias), ChannelAttention(dim, sign, transposed)
        self.position_convs, self.channel_convs = behind(), behind()
        self.drop = DROP[rank](drop)
        self.project = conv_norm_act(rank, dim, dim, 1, act=False, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *grid, dim) -> the same."""
        _channels_first(x, self.dim, self.rank)
        p = self.position_convs(self.position(x).movedim(-1, 1))
        c = self.channel_convs(self.channel(x).movedim(-1, 1))
        return self.project(self.drop(p + c)).movedim(1, -1)


def resized_maps(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, *grid) at another size, linear along every axis, corners not aligned."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode={3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()])
