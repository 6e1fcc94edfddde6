"""Sampled keys: every query reads a few points of a feature map, at predicted places with predicted weights.

``"gather"`` computes the four corners of every point itself and adds up rows of the map with ``embedding_bag``, forward
and backward, without ever holding the samples. It is the automatic choice on the CPU; elsewhere that is
``"grid_sample"``, torch's kernel. ``"eager"``, the specification, holds the rows it reads. The form lifted into depth
weighs every corner on its own, and the expanded volume is never built.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_device,
    check_flag,
    check_float,
    check_ints,
    check_rank,
    check_tensor,
    check_valid,
    check_whole,
    describe,
)
from ..types import exactly, stats_dtype
from ._call import expand_heads
from ._dispatch import Operator, transformed, twice, wants_gradient
from ._guard import bad_rows, finite, readable, spoil

Shapes = Sequence[Sequence[int]]

#: Backends of :func:`deformable_attention`.
SAMPLED_BACKENDS: tuple[str, ...] = ("gather", "grid_sample", "eager")


def _check(value: Tensor, spatial_shapes: Any, locations: Tensor, weights: Tensor, axes: int) -> list[tuple[int, int]]:
    check_rank("value", value, 4, "(B, H, M, D)")
    check_rank("sampling_locations", locations, 6, f"(B, H, N, L, P, {axes})")
    if isinstance(spatial_shapes, Tensor):
        check_whole("spatial_shapes", spatial_shapes)
        spatial_shapes = spatial_shapes.tolist()
    if not isinstance(spatial_shapes, (tuple, list)):
        raise TypeError(f"spatial_shapes must be (height, width) of each level, got {describe(spatial_shapes)}")
    levels = [check_ints("spatial_shapes", s, least=1) for s in spatial_shapes]
    if any(len(s) != 2 for s in levels):
        raise ValueError(f"spatial_shapes must be (height, width) of each level, got {levels}")
    shapes = [(s[0], s[1]) for s in levels]
    for name, t in (("value", value), ("sampling_locations", locations), ("attention_weights", weights)):
        check_float(name, t)
    check_device(value=value, sampling_locations=locations, attention_weights=weights)
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


class _BagOfRows(torch.autograd.Function):
    """``out[i] = sum_j weights[i, j] table[numbers[i, j]]``; its gradient in the table is such a sum again.

    The gradient that comes with ``embedding_bag`` walks the table row by row and costs several times the forward.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, numbers, weights)
        ctx.set_materialize_grads(False)
        return F.embedding_bag(numbers, table, mode="sum", per_sample_weights=weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, Tensor | None]:
        if grad is None:
            return None, None, None
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


def _flat_rows(value: Tensor, numbers: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map as one table of rows, and for each query the numbers and weights of the rows it reads."""
    batch, kv_heads, m, d = value.shape
    heads = numbers.shape[1]
    row = torch.arange(batch * kv_heads, device=value.device, dtype=torch.int32) * m
    row = row.view(batch, kv_heads, 1).expand(batch, kv_heads, heads // kv_heads)
    numbers = (numbers.flatten(3) + row.reshape(batch, heads, 1, 1)).flatten(0, 2)
    return value.reshape(batch * kv_heads * m, d), numbers, weights.flatten(3).flatten(0, 2)


def _plain_sum(table: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
    """``out[i] = sum_j weights[i, j] table[numbers[i, j]]``, holding every row that is read."""
    return (table[numbers.long()] * weights.unsqueeze(-1)).sum(-2)


def _sum_rows(value: Tensor, numbers: Tensor, weights: Tensor, plain: bool = False) -> Tensor:
    """``out[b, h, n] = sum_j weights[b, h, n, j] value[b, g(h), numbers[b, h, n, j]]``, trailing axes summed."""
    table, rows, flat = _flat_rows(value, numbers, weights)
    if plain or transformed((table, flat)):
        out = _plain_sum(table, rows, flat)
    elif wants_gradient((table, flat)):
        out = _BagOfRows.apply(table, rows, flat)
        out = twice((out,), (table, flat), lambda table, flat: (_plain_sum(table, rows, flat),))[0]
    else:
        out = F.embedding_bag(rows, table, mode="sum", per_sample_weights=flat)
    return out.view(*numbers.shape[:3], value.shape[3])


class _Call(NamedTuple):
    """A checked problem in the statistics dtype; tokens of the map that do not exist are zero."""

    value: Tensor
    depth: Tensor | None
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor
    dtype: torch.dtype

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.value, self.depth, self.locations, self.weights) if t is not None]


# --------------------------------------------------------------------------------------------------------------------
# Two dimensions


def _grid_sample(call: _Call) -> Tensor:
    batch, heads, n = call.locations.shape[:3]
    value = expand_heads(call.value, heads)
    samples = []
    grids = 2 * call.locations - 1
    for level, (part, (height, width)) in enumerate(
        zip(value.split([h * w for h, w in call.shapes], 2), call.shapes, strict=True)
    ):
        image = part.reshape(batch * heads, height, width, value.shape[3]).permute(0, 3, 1, 2)
        samples.append(F.grid_sample(image, grids[:, :, :, level].flatten(0, 1), align_corners=False))
    weights = call.weights
    out = (torch.cat(samples, -1) * weights.reshape(batch * heads, 1, n, math.prod(weights.shape[3:]))).sum(-1)
    out = out.transpose(1, 2).view(batch, heads, n, value.shape[3])

    def spec(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor]:
        return (_by_rows(call._replace(value=value, locations=locations, weights=weights), plain=True),)

    return twice((out,), call.inputs(), spec)[0]


def _by_rows(call: _Call, plain: bool = False) -> Tensor:
    numbers, bilinear = _corners(call.locations, call.shapes)
    return _sum_rows(call.value, numbers, bilinear * call.weights.unsqueeze(-1), plain)


def _prepare(
    value: Tensor, spatial_shapes: Shapes | Tensor, sampling_locations: Tensor, attention_weights: Tensor, *,
    valid: Tensor | None = None,
) -> _Call:  # fmt: skip
    shapes = _check(value, spatial_shapes, sampling_locations, attention_weights, 2)
    check_valid("valid", valid, (value.shape[0], value.shape[2]))
    check_device(value=value, valid=valid)
    high = stats_dtype(value.dtype)
    if valid is not None:
        value = value.masked_fill(~valid[:, None, :, None], 0.0)
    locations, weights = sampling_locations.to(high), attention_weights.to(high)
    return _Call(value.to(high), None, shapes, locations, weights, value.dtype)


def _run(operator: Operator, call: _Call, backend: str | None) -> tuple[Tensor, ...]:
    """The operator, whatever absent queries hold: NaN in their points or weights stays in their own row."""

    def run(call: _Call) -> tuple[Tensor, ...]:
        out = operator.run(call, backend)
        return out if isinstance(out, tuple) else (out,)

    tensors = (call.locations, call.weights)
    inputs = call.inputs()
    if not wants_gradient(inputs) or not readable(*tensors) or transformed(inputs) or finite(*tensors):
        return run(call)
    bad = bad_rows(call.locations.flatten(3), call.weights.flatten(3))
    gone = bad[..., None, None]
    weights = call.weights.masked_fill(gone, 0.0)
    out, *rest = run(call._replace(locations=call.locations.masked_fill(gone.unsqueeze(-1), 0.0), weights=weights))
    return spoil(out, bad.unsqueeze(-1)), *rest


def _off_cpu(call: _Call) -> str | None:
    device = call.value.device.type
    return None if device == "cpu" else f"on {device} grid_sample is one kernel"


_OPERATOR = Operator("deformable_attention", _prepare)
_OPERATOR.register("gather", _by_rows, prefers=_off_cpu, second="the specification")
_OPERATOR.register(
    "grid_sample", _grid_sample, prefers=lambda call: None if _off_cpu(call) else "on the CPU gather is faster",
    second="the specification", transforms="torch differentiates its kernel once only",
)  # fmt: skip
_OPERATOR.register("eager", partial(_by_rows, plain=True))


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
        backend: one of :data:`SAMPLED_BACKENDS`, or ``None``: ``"gather"`` on the CPU, else ``"grid_sample"``;
            ``"eager"`` is the specification.

    Returns:
        (B, H, N, D), differentiable in value, locations and weights.

    Raises:
        ValueError: shapes that do not fit.

    Reference: Zhu et al., 2021, arXiv 2010.04159, eq. 3.

    >>> points = torch.full((1, 1, 1, 1, 1, 2), 0.5)
    >>> deformable_attention(torch.arange(4.0).reshape(1, 1, 4, 1), [(2, 2)], points, torch.ones(1, 1, 1, 1, 1)).item()
    1.5
    """
    check_tensor("value", value)
    with exactly(value):
        call = _prepare(value, spatial_shapes, sampling_locations, attention_weights, valid=valid)
        return _run(_OPERATOR, call, backend)[0].to(call.dtype)


def sample_crossings(
    value: Tensor, grid: Sequence[int], rows: Tensor, columns: Tensor, *, valid: Tensor | None = None
) -> Tensor:
    """Bilinear samples of a map where rows and columns cross, zero beyond the border: windows of any place and size.

    What points of a window share is computed once: the weights of its rows and of its columns. On the CPU rows of the
    map are added up as :func:`deformable_attention` does; elsewhere that serves it.

    Args:
        value: (B, H, N, D), the map flattened row-major.
        grid: (height, width) of the map.
        rows: (B, H, G, h) places of rows in tokens, whole numbers at centres of tokens.
        columns: (B, H, G, w) places of columns.
        valid: (B, N) boolean; other tokens read as zero, like those beyond the border.

    Returns:
        (B, H, G, h * w, D), differentiable in value and places.

    Raises:
        ValueError: shapes that do not fit.

    >>> at = torch.tensor([0.5, 1.0]).view(1, 1, 1, 2)
    >>> sample_crossings(torch.arange(4.0).view(1, 1, 4, 1), (2, 2), at, at).flatten().tolist()
    [1.5, 2.0, 2.5, 3.0]
    """
    check_rank("value", value, 4, "(B, H, N, D)")
    for name, t in (("value", value), ("rows", rows), ("columns", columns)):
        check_float(name, t)
    check_rank("rows", rows, 4, "(B, H, G, h)")
    check_rank("columns", columns, 4, "(B, H, G, w)")
    check_valid("valid", valid, (value.shape[0], value.shape[2]))
    check_device(value=value, rows=rows, columns=columns, valid=valid)
    height, width = check_ints("grid", grid, least=1)
    if height * width != value.shape[2]:
        raise ValueError(f"grid={(height, width)} has {height * width} tokens, but value has {value.shape[2]}")
    if rows.shape[:3] != columns.shape[:3] or rows.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"rows and columns must lie in the same windows of {tuple(value.shape[:2])} samples and heads, as value, "
            f"got {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    with exactly(value):
        high = stats_dtype(value.dtype)
        rows, columns, groups = rows.to(high), columns.to(high), rows.shape[2]
        if value.device.type != "cpu":
            places = [(t + 0.5) / n for t, n in ((columns.unsqueeze(-2), width), (rows.unsqueeze(-1), height))]
            points = torch.stack(torch.broadcast_tensors(*places), -1).flatten(2, 4)[:, :, :, None, None]
            out = deformable_attention(
                value, [(height, width)], points, points.new_ones(points.shape[:-1]), valid=valid
            )
            return out.unflatten(2, (groups, -1))
        if valid is not None:
            value = value.masked_fill(~valid[:, None, :, None], 0.0)
        if height == width and rows.shape == columns.shape:  # both at once
            first, second, low, high_at = _axis(torch.stack([rows, columns]), height)
            (wy, wx), (y, x) = torch.stack([first, second], -1), torch.stack([low, high_at], -1)
        else:
            (wy, y), (wx, x) = (
                [torch.stack(pair, -1) for pair in (made[:2], made[2:])]
                for made in (_axis(rows, height), _axis(columns, width))
            )
        y = y * width
        numbers = y[..., :, None, :, None] + x[..., None, :, None, :]  # (B, H, G, h, w, 2, 2)
        weights = wy[..., :, None, :, None] * wx[..., None, :, None, :]
        out = _sum_rows(value.to(high), numbers.flatten(2, 4).flatten(3), weights.flatten(2, 4).flatten(3))
        return out.unflatten(2, (groups, -1)).to(value.dtype)


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
    backend: str | None = None,
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
        backend: ``"gather"``, also by default; ``"eager"``, the specification, holds every row that is read.

    Returns:
        (B, H, N, D), or a pair of it and the scores.

    Raises:
        ValueError: shapes that do not fit.

    Reference: Li et al., 2023, arXiv 2307.12972, eq. 4-7.

    >>> v, d, p = torch.ones(1, 1, 4, 1), torch.full((1, 1, 4, 8), 0.125), torch.full((1, 1, 1, 1, 1, 3), 0.5)
    >>> deformable_attention_3d(v, d, [(2, 2)], p, torch.ones(1, 1, 1, 1, 1)).item()
    0.125
    """
    check_flag("return_depth_score", return_depth_score)
    check_tensor("value", value)
    with exactly(value):
        call = _prepare_3d(value, depth, spatial_shapes, sampling_locations, attention_weights, valid=valid)
        out, score = _run(_OPERATOR_3D, call, backend)
        if not return_depth_score:
            return out.to(call.dtype)
        return out.to(call.dtype), (score * _inside(call.locations[..., :2], call.shapes)).to(call.dtype)


def _prepare_3d(
    value: Tensor, depth: Tensor, spatial_shapes: Shapes | Tensor, sampling_locations: Tensor,
    attention_weights: Tensor, *, valid: Tensor | None = None,
) -> _Call:  # fmt: skip
    shapes = _check(value, spatial_shapes, sampling_locations, attention_weights, 3)
    check_rank("depth", depth, 4, "(B, Hd, M, Z)")
    check_float("depth", depth)
    check_device(value=value, depth=depth)
    if depth.shape[0] != value.shape[0] or depth.shape[2] != value.shape[2]:
        raise ValueError(
            f"depth must have batch {value.shape[0]} and {value.shape[2]} tokens like value, got {tuple(depth.shape)}"
        )
    if depth.shape[1] == 0 or sampling_locations.shape[1] % depth.shape[1]:
        raise ValueError(f"depth has {depth.shape[1]} heads, which do not divide the {sampling_locations.shape[1]}")
    if depth.shape[3] == 0:
        raise ValueError("depth has no bins in its last axis")
    check_valid("valid", valid, (value.shape[0], value.shape[2]))
    check_device(value=value, valid=valid)
    dtype, high = value.dtype, stats_dtype(value.dtype)
    if valid is not None:
        dead = ~valid[:, None, :, None]
        value, depth = value.masked_fill(dead, 0.0), depth.masked_fill(dead, 0.0)
    locations, weights = sampling_locations.to(high), attention_weights.to(high)
    return _Call(value.to(high), depth.to(high), shapes, locations, weights, dtype)


def _lifted(call: _Call, plain: bool = False) -> tuple[Tensor, Tensor]:
    """The output and the depth scores of the corners."""
    assert call.depth is not None
    numbers, bilinear = _corners(call.locations[..., :2], call.shapes)
    score = _depth_score(call.depth, numbers, call.locations[..., 2])
    return _sum_rows(call.value, numbers, bilinear * score * call.weights.unsqueeze(-1), plain), score


_OPERATOR_3D = Operator("deformable_attention_3d", _prepare_3d)
_OPERATOR_3D.register("gather", _lifted, second="the specification")
_OPERATOR_3D.register("eager", partial(_lifted, plain=True))
