"""Triton kernels of :mod:`attnlib.ops.kernels.decoding`; importing this imports Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuning import interpreted, width

#: Columns, warps and stages of tiles of keys.
TILES = ((64, 4, 2), (128, 4, 2), (128, 8, 3))


def _configurations() -> list[triton.Config]:
    tiles = TILES[:1] if interpreted() else TILES
    return [triton.Config(dict(COLUMNS=c), num_warps=w, num_stages=s) for c, w, s in tiles]


@triton.autotune(configs=_configurations(), key=["m", "R", "D", "E"])
@triton.jit
def _split(
    q, k, v, lengths, tops, sums, mixed, m, k_heads, queries, splits, scale, R: tl.constexpr, RW: tl.constexpr,
    D: tl.constexpr, E: tl.constexpr, DW: tl.constexpr, EW: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    split, plane = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + plane // k_heads)
    span = tl.cdiv(length, splits)
    begin, end = split * span, tl.minimum(length, (split + 1) * span)
    i, d, e = tl.arange(0, RW), tl.arange(0, DW), tl.arange(0, EW)
    at = plane.to(tl.int64)
    rows = tl.load(q + at * R * D + i[:, None] * D + d[None, :], mask=(i[:, None] < R) & (d[None, :] < D), other=0.0)
    last = length - queries + i % queries  # key of each query, which are the last tokens
    top = tl.full([RW], float("-inf"), tl.float32)
    total = tl.zeros([RW], tl.float32)
    out = tl.zeros([RW, EW], tl.float32)
    for start in range(begin, end, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        place = j[:, None].to(tl.int64)
        keys = tl.load(k + at * m * D + place * D + d[None, :], mask=(j[:, None] < end) & (d[None, :] < D), other=0.0)
        values = tl.load(v + at * m * E + place * E + e[None, :], mask=(j[:, None] < end) & (e[None, :] < E), other=0.0)
        s = tl.dot(rows, tl.trans(keys), input_precision=PRECISION) * scale
        meet = (j[None, :] < end) & (i[:, None] < R)
        if CAUSAL:
            meet = meet & (j[None, :] <= last[:, None])
        s = tl.where(meet, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # Where nothing was seen yet, nothing is to shrink; -inf - -inf must not appear.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp(top - safe)
        a = tl.exp(s - safe[:, None])
        total = total * shrink + tl.sum(a, 1)
        out = out * shrink[:, None] + tl.dot(a.to(values.dtype), values, input_precision=PRECISION)
        top = higher
    part = at * splits + split
    tl.store(tops + part * R + i, top, mask=i < R)
    tl.store(sums + part * R + i, total, mask=i < R)
    tl.store(mixed + part * R * E + i[:, None] * E + e[None, :], out, mask=(i[:, None] < R) & (e[None, :] < E))


@triton.jit
def _merge(
    tops, sums, mixed, top_out, sum_out, mixed_out, splits, R: tl.constexpr, RW: tl.constexpr, E: tl.constexpr,
    EW: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    i, e = tl.arange(0, RW), tl.arange(0, EW)
    inside = (i[:, None] < R) & (e[None, :] < E)
    top = tl.full([RW], float("-inf"), tl.float32)
    total = tl.zeros([RW], tl.float32)
    out = tl.zeros([RW, EW], tl.float32)
    for split in range(0, splits):
        part = at * splits + split
        here = tl.load(tops + part * R + i, mask=i < R, other=float("-inf"))
        higher = tl.maximum(top, here)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        ours, theirs = tl.exp(top - safe), tl.exp(here - safe)
        total = total * ours + tl.load(sums + part * R + i, mask=i < R, other=0.0) * theirs
        more = tl.load(mixed + part * R * E + i[:, None] * E + e[None, :], mask=inside, other=0.0)
        out = out * ours[:, None] + more * theirs[:, None]
        top = higher
    tl.store(top_out + at * R + i, top, mask=i < R)
    tl.store(sum_out + at * R + i, total, mask=i < R)
    tl.store(mixed_out + at * R * E + i[:, None] * E + e[None, :], out, mask=inside)


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, queries: int, scale: float, causal: bool, splits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest score, sum and mixed values of rows: (B, Hk, R), (B, Hk, R) and (B, Hk, R, Dv) in float32.

    Args:
        q: (B, Hk, R, D) rows of a key head: its query heads, and in each the ``queries``.
        k: (B, Hk, M, D).
        v: (B, Hk, M, Dv).
        lengths: (B,) keys of each sample.
    """
    (batch, heads, rows, d), m, e = q.shape, k.shape[2], v.shape[3]
    lead, planes = (batch, heads), batch * heads

    def room(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    sizes = dict(R=rows, RW=width(rows), E=e, EW=width(e))
    parts = room(planes, splits, rows), room(planes, splits, rows), room(planes, splits, rows, e)
    _split[(splits, planes)](
        q, k, v, lengths, *parts, m, heads, queries, splits, scale, D=d, DW=width(d), CAUSAL=causal,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **sizes,
    )  # fmt: skip
    whole = room(*lead, rows), room(*lead, rows), room(*lead, rows, e)
    _merge[(planes,)](*parts, *whole, splits, **sizes)
    return whole
