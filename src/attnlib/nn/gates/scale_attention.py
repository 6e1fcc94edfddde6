"""Attention over scales: at every place, by head, how much each of several maps counts, judged against one of them.

Hashmi et al., 2023, "FeatEnHancer", arXiv 2308.03594. Of maps ``S_1 ... S_n`` on one grid, K one of them, and a head's
share of the channels:

    ``w_i = softmax_i(<S_i, K> / sqrt(d))``,  ``y = sum_i w_i S_i``.

There is no attention between places: work and memory are linear in them.
"""

from __future__ import annotations

from torch import Tensor

from ...checks import check_divides, check_float, check_int, describe
from ...types import stats_dtype


def scale_weights(maps: Tensor, key: int, num_heads: int) -> Tensor:
    """How much each map counts, by place and head: (B, S, *grid, C) -> (B, S, *grid, num_heads), a sum of 1 over S.

    Args:
        maps: S maps on one grid.
        key: which of them the others are compared with.
        num_heads: divides C; a head has neighbouring channels.

    Raises:
        ValueError: no maps, a map that is not there, heads that do not divide C.

    >>> import torch
    >>> maps = torch.randn(1, 1, 3, 4, 8).expand(1, 2, 3, 4, 8)
    >>> scale_weights(maps, 1, 2).unique().tolist()
    [0.5]
    """
    check_float("maps", maps)
    if maps.dim() < 4 or not maps.shape[1]:
        raise ValueError(f"maps must be (B, S, *grid, C) with S of 1 or more, got {describe(maps)}")
    check_divides("num_heads", check_int("num_heads", num_heads, least=1), "channels", maps.shape[-1])
    check_int("key", key, least=0, most=maps.shape[1] - 1)
    heads = maps.unflatten(-1, (num_heads, -1)).to(stats_dtype(maps.dtype))
    scores = (heads * heads[:, key, None]).sum(-1) * heads.shape[-1] ** -0.5
    return scores.softmax(1).to(maps.dtype)


def attend_scales(maps: Tensor, key: int, num_heads: int) -> Tensor:
    """(B, S, *grid, C) -> (B, *grid, C): the maps, mixed by :func:`scale_weights`.

    >>> import torch
    >>> attend_scales(torch.randn(2, 3, 5, 5, 8), 0, 4).shape
    torch.Size([2, 5, 5, 8])
    """
    weights = scale_weights(maps, key, num_heads)
    return (maps.unflatten(-1, (num_heads, -1)) * weights.unsqueeze(-1)).sum(1).flatten(-2)


__all__ = ["attend_scales", "scale_weights"]
