"""Sampled keys: every query reads a few points of a feature map, at predicted places with predicted weights.

Two backends serve the two-dimensional form. ``"grid_sample"`` is the specification; ``"gather"`` computes the four
corners of every point itself and adds up rows of the map with ``embedding_bag``, forward and backward, without ever
holding the samples. It is the automatic choice on the CPU. The form lifted into depth weighs every corner on its own
and is always gathered: the expanded volume is never built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import check_choice, check_rank, check_valid, exactly, stats_dtype
from ._call import expand_heads

Shapes = Sequence[Sequence[int]]

#: Backends of :func:`deformable_attention`.
SAMPLED_BACKENDS: tuple[str, ...] = ("grid_sample", "gather")


def _check(value: Tensor, spatial_shapes: Any, locations: Tensor, weights: Tensor, axes: int) -> list[tuple[int, int]]:
    check_rank("value", value, 4, "(B, H, M, D)")
    check_rank("sampling_locations", locations, 6, f"(B, H, N, L, P, {axes})")
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    shapes = [(s[0], s[1]) for s in spatial_shapes]
    if any(h < 1 or w < 1 for h, w in shapes):
        raise ValueError(f"spatial_shapes={shapes} contains an empty level")
    if sum(h * w for h, w in shapes) != value.shape[2]:
        raise ValueError(
            f"spatial_shapes={shapes} adds up to {sum(h * w for h, w in shapes)} tokens, but value has {value.shape[2]}"
        )
    batch, heads = locations.shape[:2]
    if value.shape[0] != batch:
        raise ValueError(f"value has batch {value.shape[0]}, sampling_locations have {batch}; they must agree")
    if value.shape[1] == 0 or heads % value.shape[1]:
        raise ValueError(f"value has {value.shape[1]} heads, which do not divide the {heads} of sampling_locations")
    if locations.shape[3] != len(shapes):
        raise ValueError(f"sampling_locations have {locations.shape[3]} levels, spatial_shapes have {len(shapes)}")
    if locations.shape[5] != axes:
        raise ValueError(f"sampling_locations must end in {axes} coordinates, got {locations.shape[5]}")
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f"attention_weights must have shape {tuple(locations.shape[:-1])}, got {tuple(weights.shape)}")
    return shapes


# --------------------------------------------------------------------------------------------------------------------
# The four corners of a point


def _axis(at: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and numbers of the two neighbours of ``at`` (in pixels) on one axis; weight 0 beyond the border."""
    low = at.detach().floor()
    part = at - low
    first = (1 - part) * ((low >= 0) & (low <= size - 1))
    second = part * ((low >= -1) & (low <= size - 2))
    number = low.clamp(-2, size).to(torch.int32)
    return first, second, number.clamp(0, size - 1), (number + 1).clamp(0, size - 1)


def _corners(locations: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(B, H, N, L, P, 4) numbers of the four pixels around each point in the flat map, and their bilinear weights."""
    numbers, weights = [], []
    start = 0
    for level, (height, width) in enumerate(shapes):
        x, y = (locations[:, :, :, level, :, i] * size - 0.5 for i, size in enumerate((width, height)))
        wx0, wx1, x0, x1 = _axis(x, width)
        wy0, wy1, y0, y1 = _axis(y, height)
        y0, y1 = y0 * width + start, y1 * width + start
        numbers.append(torch.stack([y0 + x0, y0 + x1, y1 + x0, y1 + x1], -1))
        weights.append(torch.stack([wy0 * wx0, wy0 * wx1, wy1 * wx0, wy1 * wx1], -1))
        start += height * width
    return torch.stack(numbers, 3), torch.stack(weights, 3)


def _inside(locations: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """(B, H, N, L, P, 4): which corners of each point lie on the map."""
    levels = []
    for level, size in enumerate(shapes):
        axes = []
        for axis, length in ((0, size[1]), (1, size[0])):
            low = (locations[:, :, :, level, :, axis] * length - 0.5).floor()
            axes.append(((low >= 0) & (low <= length - 1), (low >= -1) & (low <= length - 2)))
        (x0, x1), (y0, y1) = axes
        levels.append(torch.stack([y0 & x0, y0 & x1, y1 & x0, y1 & x1], -1))
    return torch.stack(levels, 3)


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _BagOfRows(torch.autograd.Function):
    """``out[i] = sum_j weights[i, j] table[numbers[i, j]]``; its gradient in the table is such a sum again.

    The gradient that comes with ``embedding_bag`` walks the table row by row and costs several times the forward.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, numbers, weights)
        return F.embedding_bag(numbers, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        table, numbers, weights = ctx.saved_tensors
        grad = grad.contiguous()
        table_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            # who reads row r? Sorted by row, the readers of each are one bag over the rows of ``grad``.
            rows, order = numbers.flatten().sort()
            starts = torch.searchsorted(rows, torch.arange(table.shape[0], device=rows.device, dtype=rows.dtype))
            table_grad = F.embedding_bag(
                order // numbers.shape[1], grad, starts, mode="sum", per_sample_weights=weights.flatten()[order]
            )
        if ctx.needs_input_grad[2]:
            n, each = numbers.shape
            place = torch.arange(n * each, device=numbers.device, dtype=numbers.dtype)
            weight_grad = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad, table, numbers.flatten(), place[::each].contiguous(), place // each, 0
            ).view_as(weights)
        return table_grad, None, weight_grad


def _sum_rows(value: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
    """``out[b, h, n] = sum_j weights[b, h, n, j] value[b, g(h), numbers[b, h, n, j]]``, trailing axes summed."""
    batch, kv_heads, m, d = value.shape
    heads, n = numbers.shape[1:3]
    row = torch.arange(batch * kv_heads, device=value.device, dtype=torch.int32) * m
    row = row.view(batch, kv_heads, 1).expand(batch, kv_heads, heads // kv_heads)
    numbers = (numbers.flatten(3) + row.reshape(batch, heads, 1, 1)).flatten(0, 2)
    table, weights = value.reshape(batch * kv_heads * m, d), weights.flatten(3).flatten(0, 2)
    if _wants_gradient(table, weights):
        return _BagOfRows.apply(table, numbers, weights).view(batch, heads, n, d)
    return F.embedding_bag(numbers, table, mode="sum", per_sample_weights=weights).view(batch, heads, n, d)


# --------------------------------------------------------------------------------------------------------------------
# Two dimensions


def _grid_sample(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    batch, heads, n = locations.shape[:3]
    value = expand_heads(value, heads)
    samples = []
    grids = 2 * locations - 1
    for level, (part, (height, width)) in enumerate(
        zip(value.split([h * w for h, w in shapes], 2), shapes, strict=True)
    ):
        image = part.reshape(batch * heads, height, width, value.shape[3]).permute(0, 3, 1, 2)
        samples.append(F.grid_sample(image, grids[:, :, :, level].flatten(0, 1), align_corners=False))
    out = (torch.cat(samples, -1) * weights.reshape(batch * heads, 1, n, math.prod(weights.shape[3:]))).sum(-1)
    return out.transpose(1, 2).view(batch, heads, n, value.shape[3])


def deformable_attention(
    value: Tensor,
    spatial_shapes: Shapes | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Multi-scale deformable attention: a weighted sum of bilinear samples.

    ``out[n] = sum_l sum_p A[n, l, p] V_l(location[n, l, p])``. Locations lie in [0, 1] with pixel centres at
    ``(i + 0.5) / size``; beyond the border the map is zero, and weights are not renormalised there.

    Args:
        value: (B, Hv, M, D), the levels flattened row-major one after the other, ``H % Hv == 0``.
        spatial_shapes: (height, width) per level.
        sampling_locations: (B, H, N, L, P, 2) as (x, y).
        attention_weights: (B, H, N, L, P), used as they are.
        valid: (B, M) boolean; other tokens read as zero, like those beyond the border.
        backend: one of :data:`SAMPLED_BACKENDS`, or ``None``: ``"gather"`` on the CPU, else ``"grid_sample"``.

    Returns:
        (B, H, N, D), differentiable in value, locations and weights.

    Raises:
        ValueError: shapes that do not fit.

    Reference: Zhu et al., 2021, arXiv 2010.04159, eq. 3.

    >>> points = torch.full((1, 1, 1, 1, 1, 2), 0.5)
    >>> deformable_attention(torch.arange(4.0).reshape(1, 1, 4, 1), [(2, 2)], points, torch.ones(1, 1, 1, 1, 1)).item()
    1.5
    """
    shapes = _check(value, spatial_shapes, sampling_locations, attention_weights, 2)
    check_valid("valid", valid, (value.shape[0], value.shape[2]))
    if backend is None:
        backend = "gather" if value.device.type == "cpu" else "grid_sample"
    check_choice("backend", backend, SAMPLED_BACKENDS)
    dtype, high = value.dtype, stats_dtype(value.dtype)
    if valid is not None:
        value = value.masked_fill(~valid[:, None, :, None], 0.0)
    value, locations, weights = (t.to(high) for t in (value, sampling_locations, attention_weights))
    with exactly(value):
        if backend == "grid_sample":
            return _grid_sample(value, shapes, locations, weights).to(dtype)
        numbers, bilinear = _corners(locations, shapes)
        return _sum_rows(value, numbers, bilinear * weights.unsqueeze(-1)).to(dtype)


# --------------------------------------------------------------------------------------------------------------------
# Lifted into depth


def _depth_score(depth: Tensor, numbers: Tensor, at: Tensor) -> Tensor:
    """(B, H, N, L, P, 4): the depth distribution of each corner, linear between bins, at ``at`` (B, H, N, L, P)."""
    batch, heads, m, bins = depth.shape
    first, second, low, high = _axis(at * bins - 0.5, bins)
    table = depth.reshape(batch, heads, m * bins)

    def read(number: Tensor) -> Tensor:
        index = numbers.long() * bins + number.unsqueeze(-1)
        # neighbouring heads share a distribution when there are fewer of them
        return table.gather(2, index.reshape(batch, heads, math.prod(index.shape[1:]) // heads)).view(index.shape)

    return first.unsqueeze(-1) * read(low) + second.unsqueeze(-1) * read(high)


def deformable_attention_3d(
    value: Tensor,
    depth: Tensor,
    spatial_shapes: Shapes | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    valid: Tensor | None = None,
    return_depth_score: bool = False,
) -> Any:
    """Deformable attention into the volume ``E[y, x, z] = V[y, x] D[y, x, z]``, which is never built.

    Two stages: the depth distribution is read at the four corners of every point, linearly between bins, and weighs
    each corner of the bilinear sample: ``out = sum_lp A_lp sum_c w_c (sum_k r_k D[c, k]) V[c]``. This equals trilinear
    sampling of E with zeros outside.

    Args:
        value: (B, Hv, M, D), ``H % Hv == 0``.
        depth: (B, Hd, M, Z) distribution over depth bins, ``H % Hd == 0``; used as it is.
        spatial_shapes: (height, width) per level.
        sampling_locations: (B, H, N, L, P, 3) as (x, y, z) in [0, 1].
        attention_weights: (B, H, N, L, P).
        valid: (B, M) boolean; other tokens read as zero.
        return_depth_score: also return the depth scores (B, H, N, L, P, 4) of the corners (upper left, upper right,
            lower left, lower right), zero beyond the border.

    Returns:
        (B, H, N, D), or a pair of it and the scores.

    Raises:
        ValueError: shapes that do not fit.

    Reference: Li et al., 2023, arXiv 2307.12972, eq. 4-7.

    >>> v, d, p = torch.ones(1, 1, 4, 1), torch.full((1, 1, 4, 8), 0.125), torch.full((1, 1, 1, 1, 1, 3), 0.5)
    >>> deformable_attention_3d(v, d, [(2, 2)], p, torch.ones(1, 1, 1, 1, 1)).item()
    0.125
    """
    shapes = _check(value, spatial_shapes, sampling_locations, attention_weights, 3)
    check_rank("depth", depth, 4, "(B, Hd, M, Z)")
    if depth.shape[0] != value.shape[0] or depth.shape[2] != value.shape[2]:
        raise ValueError(
            f"depth must have batch {value.shape[0]} and {value.shape[2]} tokens like value, got {tuple(depth.shape)}"
        )
    if depth.shape[1] == 0 or sampling_locations.shape[1] % depth.shape[1]:
        raise ValueError(f"depth has {depth.shape[1]} heads, which do not divide the {sampling_locations.shape[1]}")
    if depth.shape[3] == 0:
        raise ValueError("depth has no bins in its last axis")
    check_valid("valid", valid, (value.shape[0], value.shape[2]))
    dtype, high = value.dtype, stats_dtype(value.dtype)
    if valid is not None:
        dead = ~valid[:, None, :, None]
        value, depth = value.masked_fill(dead, 0.0), depth.masked_fill(dead, 0.0)
    value, depth, locations, weights = (t.to(high) for t in (value, depth, sampling_locations, attention_weights))
    with exactly(value):
        numbers, bilinear = _corners(locations[..., :2], shapes)
        score = _depth_score(depth, numbers, locations[..., 2])
        corner_weights = bilinear * score * weights.unsqueeze(-1)
        out = _sum_rows(value, numbers, corner_weights)
    out = out.to(dtype)
    return (out, (score * _inside(locations, shapes)).to(dtype)) if return_depth_score else out
