"""Triton kernels of :mod:`attnlib.ops.kernels.streamed`; importing this imports Triton.

All tensors are contiguous (B, H, N, D). A program has a tile of queries (of keys, in the second half of the backward)
of one sample and query head, and walks along the other side between the borders of the band.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuning import configurations, width


@triton.jit
def _log1p(x):
    # What rounding takes from 1 + x, the quotient gives back.
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _phi(s, ACT: tl.constexpr):
    if ACT == "sigmoid":
        return tl.sigmoid(s)
    elif ACT == "softplus":
        return tl.maximum(s, 0.0) + _log1p(tl.exp(-tl.abs(s)))
    else:
        return tl.maximum(s, 0.0)


@triton.jit
def _slope(s, a, ACT: tl.constexpr):
    if ACT == "sigmoid":
        return a * (1.0 - a)
    elif ACT == "softplus":
        return tl.sigmoid(s)
    else:
        return tl.where(s > 0.0, 1.0, 0.0)


@triton.jit
def _meet(i, j, valid, sample, n, m, low, high, VALID: tl.constexpr):
    # (rows, columns) which queries i and keys j meet.
    step = j[None, :] - i[:, None]
    meet = (i[:, None] < n) & (j[None, :] < m) & (step >= low) & (step <= high)
    if VALID:
        meet = meet & (tl.load(valid + sample * m + j, mask=j < m, other=0) != 0)[None, :]
    return meet


@triton.jit
def _tile(x, rows, count, D: tl.constexpr, W: tl.constexpr):
    # (rows, W) of a contiguous (count, D), with zeros beyond.
    columns = tl.arange(0, W)
    inside = (rows[:, None] < count) & (columns[None, :] < D)
    return tl.load(x + rows[:, None].to(tl.int64) * D + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _put(x, rows, count, value, D: tl.constexpr, W: tl.constexpr):
    columns = tl.arange(0, W)
    inside = (rows[:, None] < count) & (columns[None, :] < D)
    tl.store(x + rows[:, None].to(tl.int64) * D + columns[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.autotune(configs=configurations(), key=["n", "m", "D", "E"])
@triton.jit
def _forward(
    q, k, v, valid, out, total, n, m, heads, k_heads, v_heads, scale, offset, divisor, low, high,
    D: tl.constexpr, E: tl.constexpr, DW: tl.constexpr, EW: tl.constexpr, ACT: tl.constexpr, L1: tl.constexpr,
    VALID: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1)
    sample, head = plane // heads, plane % heads
    first = tl.program_id(0) * ROWS
    i = first + tl.arange(0, ROWS)
    k += (sample * k_heads + head // (heads // k_heads)).to(tl.int64) * m * D
    v += (sample * v_heads + head // (heads // v_heads)).to(tl.int64) * m * E
    rows = _tile(q + plane.to(tl.int64) * n * D, i, n, D, DW)
    mixed = tl.zeros([ROWS, EW], tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    begin = tl.maximum(0, first + low) // COLUMNS * COLUMNS
    end = tl.minimum(m, first + ROWS + high)
    for start in range(begin, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        keys, values = _tile(k, j, m, D, DW), _tile(v, j, m, E, EW)
        s = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * scale + offset
        a = tl.where(_meet(i, j, valid, sample, n, m, low, high, VALID), _phi(s, ACT), 0.0)
        sums += tl.sum(a, 1)
        mixed += tl.dot(a.to(values.dtype), values, input_precision=PRECISION)
    if L1:
        sums = tl.where(sums == 0.0, 1.0, sums)
        mixed = mixed / sums[:, None]
        tl.store(total + plane.to(tl.int64) * n + i, sums, mask=i < n)
    _put(out + plane.to(tl.int64) * n * E, i, n, mixed / divisor, E, EW)


@triton.jit
def _adjoint(s, a, go, values, met, ACT: tl.constexpr, PRECISION: tl.constexpr):
    # Gradient of scores whose weights a are not yet divided by anything.
    return (tl.dot(go, tl.trans(values), input_precision=PRECISION) - met[:, None]) * _slope(s, a, ACT)


@triton.jit
def _upstream(grad, out, total, i, n, divisor, E: tl.constexpr, EW: tl.constexpr, L1: tl.constexpr, ROWS: tl.constexpr):
    # Gradient of the sum over weights that are not yet divided, and what dividing by their sum takes from it.
    go = _tile(grad, i, n, E, EW).to(tl.float32) / divisor
    met = tl.zeros([ROWS], tl.float32)
    if L1:
        go = go / tl.load(total + i, mask=i < n, other=1.0)[:, None]
        met = tl.sum(go * _tile(out, i, n, E, EW).to(tl.float32), 1)
    return go, met


@triton.autotune(configs=configurations(), key=["n", "m", "D", "E"])
@triton.jit
def _backward_rows(
    grad, q, k, v, valid, out, total, dq, n, m, heads, k_heads, v_heads, scale, offset, divisor, low, high,
    D: tl.constexpr, E: tl.constexpr, DW: tl.constexpr, EW: tl.constexpr, ACT: tl.constexpr, L1: tl.constexpr,
    VALID: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1)
    sample, head = plane // heads, plane % heads
    first = tl.program_id(0) * ROWS
    i = first + tl.arange(0, ROWS)
    k += (sample * k_heads + head // (heads // k_heads)).to(tl.int64) * m * D
    v += (sample * v_heads + head // (heads // v_heads)).to(tl.int64) * m * E
    at = plane.to(tl.int64) * n
    rows = _tile(q + at * D, i, n, D, DW)
    go, met = _upstream(grad + at * E, out + at * E, total + at, i, n, divisor, E, EW, L1, ROWS)
    go = go.to(rows.dtype)
    held = tl.zeros([ROWS, DW], tl.float32)
    begin = tl.maximum(0, first + low) // COLUMNS * COLUMNS
    end = tl.minimum(m, first + ROWS + high)
    for start in range(begin, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        keys, values = _tile(k, j, m, D, DW), _tile(v, j, m, E, EW)
        s = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * scale + offset
        ds = _adjoint(s, _phi(s, ACT), go, values, met, ACT, PRECISION)
        ds = tl.where(_meet(i, j, valid, sample, n, m, low, high, VALID), ds, 0.0)
        held += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    _put(dq + at * D, i, n, held * scale, D, DW)


@triton.autotune(configs=configurations(), key=["n", "m", "D", "E"])
@triton.jit
def _backward_columns(
    grad, q, k, v, valid, out, total, dk, dv, n, m, heads, k_heads, v_heads, scale, offset, divisor, low, high,
    D: tl.constexpr, E: tl.constexpr, DW: tl.constexpr, EW: tl.constexpr, ACT: tl.constexpr, L1: tl.constexpr,
    VALID: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1)
    sample, head = plane // heads, plane % heads
    first = tl.program_id(0) * COLUMNS
    j = first + tl.arange(0, COLUMNS)
    k += (sample * k_heads + head // (heads // k_heads)).to(tl.int64) * m * D
    v += (sample * v_heads + head // (heads // v_heads)).to(tl.int64) * m * E
    at = plane.to(tl.int64) * n
    keys, values = _tile(k, j, m, D, DW), _tile(v, j, m, E, EW)
    k_held = tl.zeros([COLUMNS, DW], tl.float32)
    v_held = tl.zeros([COLUMNS, EW], tl.float32)
    begin = tl.maximum(0, first - high) // ROWS * ROWS
    end = tl.minimum(n, first + COLUMNS - low)
    for start in range(begin, end, ROWS):
        i = start + tl.arange(0, ROWS)
        rows = _tile(q + at * D, i, n, D, DW)
        go, met = _upstream(grad + at * E, out + at * E, total + at, i, n, divisor, E, EW, L1, ROWS)
        go = go.to(rows.dtype)
        s = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * scale + offset
        meet = _meet(i, j, valid, sample, n, m, low, high, VALID)
        a = tl.where(meet, _phi(s, ACT), 0.0)
        ds = tl.where(meet, _adjoint(s, a, go, values, met, ACT, PRECISION), 0.0)
        v_held += tl.dot(tl.trans(a).to(go.dtype), go, input_precision=PRECISION)
        k_held += tl.dot(tl.trans(ds).to(rows.dtype), rows, input_precision=PRECISION)
    _put(dk + plane.to(tl.int64) * m * D, j, m, k_held * scale, D, DW)
    _put(dv + plane.to(tl.int64) * m * E, j, m, v_held, E, EW)


def _shared(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scale: float, act: str, offset: float, divisor: float,
    l1: bool, low: int, high: int,
) -> tuple[tuple[int, ...], dict[str, object]]:  # fmt: skip
    """Arguments that all kernels have: sizes, and settings by name."""
    d, e = q.shape[3], v.shape[3]
    # Every tile reaches at most to the ends of the other side.
    low, high = max(low, -q.shape[2] - k.shape[2]), min(high, q.shape[2] + k.shape[2])
    sizes = (q.shape[2], k.shape[2], q.shape[1], k.shape[1], v.shape[1])
    return sizes, dict(
        scale=scale, offset=offset, divisor=divisor, low=low, high=high, D=d, E=e, DW=width(d), EW=width(e), ACT=act,
        L1=l1, VALID=valid is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, *settings: object) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, Dv), and sums of rows (B, H, N) where they are divided by them."""
    batch, heads, n, _ = q.shape
    sizes, named = _shared(q, k, v, valid, *settings)  # type: ignore[arg-type]
    out = q.new_empty(batch, heads, n, v.shape[3])
    total = q.new_empty((batch, heads, n) if named["L1"] else (1,), dtype=torch.float32)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n, meta["ROWS"]), batch * heads

    _forward[grid](q, k, v, q if valid is None else valid, out, total, *sizes, **named)
    return out, total


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, out: Tensor, total: Tensor, *settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    (batch, heads, n, d), m, e = q.shape, k.shape[2], v.shape[3]
    sizes, named = _shared(q, k, v, valid, *settings)  # type: ignore[arg-type]
    dq = torch.empty_like(q)
    # One for each query head, in float32 where several are summed.
    dk = q.new_empty(batch, heads, m, d, dtype=k.dtype if k.shape[1] == heads else torch.float32)
    dv = q.new_empty(batch, heads, m, e, dtype=v.dtype if v.shape[1] == heads else torch.float32)
    given = (grad, q, k, v, q if valid is None else valid, out, total)

    def rows(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n, meta["ROWS"]), batch * heads

    def columns(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(m, meta["COLUMNS"]), batch * heads

    _backward_rows[rows](*given, dq, *sizes, **named)
    _backward_columns[columns](*given, dk, dv, *sizes, **named)
    dk, dv = (
        t if t.shape[1] == like.shape[1] else t.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
        for t, like in ((dk, k), (dv, v))
    )
    return dq, dk, dv
