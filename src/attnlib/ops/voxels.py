"""Voxels as a list: which of them are neighbours, convolutions on those that exist, and windows as segments.

Voxels are features (N, C) with ``coords`` (N, 1 + r): the sample, and a place in a grid of r axes; nothing is held for
empty places. A convolution is a table of which voxel each of its outputs reads at each tap (:func:`conv_sites`), then a
product per tap (:func:`sparse_conv`, :func:`sparse_depthwise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    check_device,
    check_dtype,
    check_float,
    check_int,
    check_ints,
    check_rank,
    check_whole,
    check_within,
    to_tuple,
)


class Sites(NamedTuple):
    """Outputs of a convolution on voxels.

    Args:
        coords: (M, 1 + r) where they are.
        shape: sides of their grid.
        table: (M, K) which voxel each reads at each tap, N where there is none; taps in row-major order.
    """

    coords: Tensor
    shape: tuple[int, ...]
    table: Tensor


def check_voxels(coords: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """The sides of the grid, once ``coords`` are voxels of it."""
    sides = check_ints("shape", shape, least=1)
    check_whole("coords", coords, "an integer tensor")
    check_rank("coords", coords, 2, f"(N, {1 + len(sides)})")
    if coords.shape[1] != 1 + len(sides):
        raise ValueError(f"coords must be (N, {1 + len(sides)}) for a grid {sides}, got {tuple(coords.shape)}")
    if len(coords):
        low, high = coords.amin(0), coords[:, 1:].amax(0)
        if int(low.min()) < 0 or any(int(h) >= n for h, n in zip(high, sides, strict=True)):
            raise ValueError(
                f"coords must lie in samples from 0 and in the grid {sides}, got numbers from {low.tolist()} to "
                f"{coords.amax(0).tolist()}"
            )
        if len(numbers(coords, sides).unique()) != len(coords):
            raise ValueError("coords holds a voxel twice; every place has at most one")
    return sides


def numbers(coords: Tensor, shape: Sequence[int]) -> Tensor:
    """(N,) one number for every place of every sample, in row-major order."""
    out = coords[:, 0].long()
    for axis, side in enumerate(shape, 1):
        out = out * side + coords[:, axis].long()
    return out


def conv_sites(
    coords: Tensor,
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] | None = None,
) -> Sites:
    """Where a convolution of voxels has outputs, and what each of them reads.

    Args:
        coords: (N, 1 + r) voxels.
        shape: sides of the grid.
        kernel_size: taps per axis.
        stride: of the outputs, which are all places that some voxel reaches; ``None``: the voxels themselves are the
            outputs, in their order (a submanifold convolution).
        padding: empty places around the grid; ``kernel_size // 2`` by default.

    Reference: Graham and van der Maaten, 2017, arXiv 1706.01307.

    >>> voxels = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 3, 3]])
    >>> conv_sites(voxels, (4, 4), 3).table[0].tolist()
    [3, 3, 3, 3, 0, 1, 3, 3, 3]
    >>> conv_sites(voxels, (4, 4), 2, stride=2, padding=0).coords.tolist()
    [[0, 0, 0], [0, 1, 1]]
    """
    sides = check_voxels(coords, shape)
    rank, count, device = len(sides), len(coords), coords.device
    kernel = to_tuple("kernel_size", kernel_size, rank)
    check_ints("kernel_size", kernel, least=1)
    pad = tuple(k // 2 for k in kernel) if padding is None else to_tuple("padding", padding, rank)
    taps = torch.cartesian_prod(*(torch.arange(k, device=device) for k in kernel)).view(-1, rank)
    places, start = coords[:, None, 1:].long(), torch.tensor(pad, device=device)
    if stride is None:
        if any(k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size={kernel} must be odd where voxels are their own outputs")
        known, order = numbers(coords, sides).sort()
        reached = places + taps - start
        there = ((reached >= 0) & (reached < torch.tensor(sides, device=device))).all(-1)
        wanted = coords[:, :1].long().expand(-1, len(taps)).flatten()
        wanted = numbers(torch.cat([wanted[:, None], reached.clamp(min=0).flatten(0, 1)], 1), sides)
        found = torch.searchsorted(known, wanted).clamp(max=max(count - 1, 0))
        hit = there.flatten() & (known[found] == wanted) if count else there.flatten()
        table = torch.where(hit, order[found], count) if count else found
        return Sites(coords, sides, table.view(count, len(taps)))
    step = to_tuple("stride", stride, rank)
    check_ints("stride", step, least=1)
    out_sides = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(sides, pad, kernel, step, strict=True))
    if min(out_sides) < 1:
        raise ValueError(f"kernel_size={kernel} is larger than the grid {sides} with padding={pad}")
    steps, ends = torch.tensor(step, device=device), torch.tensor(out_sides, device=device)
    moved = places + start - taps  # the output at o reads o * stride - padding + tap
    there = ((moved % steps == 0) & (moved >= 0) & (moved < ends * steps)).all(-1)
    row, tap = there.nonzero(as_tuple=True)
    at = torch.cat([coords[row, :1].long(), moved[row, tap] // steps], 1)
    known, number = numbers(at, out_sides).unique(return_inverse=True)
    table = torch.full((len(known), len(taps)), count, device=device)
    table[number, tap] = row
    out = at.new_empty(len(known), 1 + rank)
    out[number] = at
    return Sites(out.to(coords.dtype), out_sides, table)


def _checked(x: Tensor, weight: Tensor, table: Tensor, axes: int, says: str) -> None:
    check_float("x", x)
    check_rank("x", x, 2, "(N, C)")
    check_float("weight", weight)
    check_whole("table", table, "an integer tensor")
    check_rank("table", table, 2, "(M, K)")
    check_device(x=x, weight=weight, table=table)
    check_within("table", table, len(x) + 1, "voxel")  # the last stands for none
    if weight.dim() != axes or weight.shape[0] != table.shape[1] or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must be {says} with K={table.shape[1]} and C={x.shape[1]}, got {tuple(weight.shape)}")


def _like(x: Tensor, **others: Tensor | None) -> list[Any]:
    """The others in the type of ``x`` under autocast; otherwise they must have it."""
    check_device(x=x, **others)
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return [None if t is None else t.to(x.dtype) for t in others.values()]
    check_dtype(x=x, **others)
    return list(others.values())


def sparse_conv(x: Tensor, weight: Tensor, table: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y_m = b + sum_k W_k^T x_table[m, k]``.

    Args:
        x: (N, C) features of the voxels.
        weight: (K, C, C') a matrix per tap.
        table: (M, K) of :class:`Sites`.
        bias: (C',).

    Returns:
        (M, C').
    """
    _checked(x, weight, table, 3, "(K, C, C')")
    weight, bias = _like(x, weight=weight, bias=bias)
    if bias is not None:
        if tuple(bias.shape) != (weight.shape[-1],):
            raise ValueError(f"bias must be (C',)={(weight.shape[-1],)}, got {tuple(bias.shape)}")
    out = x.new_zeros(len(table), weight.shape[-1])
    for tap in range(table.shape[1]):
        here = (table[:, tap] < len(x)).nonzero().squeeze(1)
        out.index_add_(0, here, x.index_select(0, table[here, tap]) @ weight[tap])
    return out if bias is None else out + bias


def sparse_depthwise(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """``y_m = sum_k w_k * x_table[m, k]``, a number per tap and channel.

    Args:
        x: (N, C) features of the voxels.
        weight: (K, C).
        table: (M, K) of :class:`Sites`.

    Returns:
        (M, C).
    """
    _checked(x, weight, table, 2, "(K, C)")
    (weight,) = _like(x, weight=weight)
    out = x.new_zeros(len(table), x.shape[1])
    for tap in range(table.shape[1]):
        here = (table[:, tap] < len(x)).nonzero().squeeze(1)
        out.index_add_(0, here, x.index_select(0, table[here, tap]) * weight[tap])
    return out


def window_segments(coords: Tensor, shape: Sequence[int], window_size: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Windows of voxels as segments of one sequence.

    Args:
        coords: (N, 1 + r) voxels.
        shape: sides of the grid.
        window_size: sides of windows along the last axes, an int for two of them; the axes before are not cut.

    Returns:
        (N,) the order in which the voxels of a window are neighbours, and (W + 1,) where windows begin, which is
        ``cu_seqlens`` of :func:`attnlib.ops.linear.linear_attention`. Windows without voxels are left out.

    >>> order, bounds = window_segments(torch.tensor([[0, 3, 3], [0, 0, 1], [0, 0, 0]]), (4, 4), 2)
    >>> order.tolist(), bounds.tolist()
    ([1, 2, 0], [0, 2, 3])
    """
    sides = check_voxels(coords, shape)
    if isinstance(window_size, int):
        window_size = (check_int("window_size", window_size, least=1),) * min(2, len(sides))
    window = check_ints("window_size", window_size, least=1)
    if len(window) > len(sides):
        raise ValueError(f"window_size={window} has more axes than the grid {sides}")
    first = 1 + len(sides) - len(window)
    cells = [-(-n // w) for n, w in zip(sides[first - 1 :], window, strict=True)]
    at = torch.cat([coords[:, :1].long(), coords[:, first:].long() // torch.tensor(window, device=coords.device)], 1)
    number, order = numbers(at, cells).sort(stable=True)
    _, counts = number.unique_consecutive(return_counts=True)
    return order, torch.cat([counts.new_zeros(1), counts.cumsum(0)])


__all__ = [
    "Sites", "check_voxels", "conv_sites", "numbers", "sparse_conv", "sparse_depthwise", "window_segments"
]  # fmt: skip
