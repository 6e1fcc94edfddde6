"""Engine A with shared windows: blocks of queries read the keys of their block and of a halo around it.

Vaswani et al., 2021, "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", arXiv 2103.12731. The map
is cut into blocks of ``b`` tokens a side; block ``i`` reads the ``w = b + 2 h`` keys a side from ``i b - h`` on. What
lies outside the map is not there (``border="mask"``), is keys and values of zeros (``"zeros"``), or the window moves
inside until all of it is there (``"clamp"``). Queries may be coarser or finer than keys: ``q_block`` queries a side
then read around ``k_block`` keys a side.

``h = 0`` is attention in windows, ``b = 1`` sliding windows, a block as large as the map everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import (
    check_choice,
    check_device,
    check_float,
    check_grid,
    check_int,
    check_rank,
    check_serves,
    check_type,
    check_valid,
    to_tuple,
)
from ..grids import block_windows, unblock_windows
from ..positions import AxisBias
from ._call import check_qkv
from ._dispatch import AUTO, Operator
from .attention import attention
from .partition import register_inner

BORDERS = ("mask", "zeros", "clamp")
PerAxis = int | Sequence[int]

#: Elements of copied keys and values beyond which blocks are taken in several rounds where no gradient is kept.
ROUND = 1 << 22


def halo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    block: PerAxis,
    halo: PerAxis,
    *,
    k_grid: Sequence[int] | None = None,
    k_block: PerAxis | None = None,
    border: str = "mask",
    bias: Tensor | None = None,
    axis_tables: Sequence[Tensor] | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention of blocks of queries to their block of keys and its halo.

    Args:
        q: (B, H, N, D) queries of ``grid``.
        k: (B, Hk, M, D) keys of ``k_grid``.
        v: (B, Hv, M, Dv) values of ``k_grid``.
        grid: the grid of queries, ``prod(grid) == N``, one to three axes.
        block: queries a side of a block; must divide ``grid``.
        halo: keys beyond the block on every side.
        k_grid: the grid of keys; ``grid`` by default.
        k_block: keys a side of a block, as many blocks as ``block`` makes; ``block`` by default.
        border: ``"mask"``, ``"zeros"`` or ``"clamp"``.
        bias: (Sq, Sk) or (H, Sq, Sk), added in every block of Sq queries and Sk keys, both row-major.
        axis_tables: one (B, H, N, L_a) per axis, L_a odd: what a query adds to keys at displacement ``key - query``, in
            keys, from ``-(L_a // 2)`` to ``L_a // 2``.
        valid: (B, M) boolean, which keys exist.
        scale: defaults to ``D ** -0.5``.
        dropout_p: dropout of weights.
        backend: ``"parts"``, by default where there are ``axis_tables``: parts of the map that fit the cache, whose
            scores gradients compute again; ``"blocks"``: all at once, or in rounds without gradients; a backend of
            :func:`attnlib.attention` for what runs inside the blocks; or ``"eager"``, one block after the other (the
            specification).

    Returns:
        (B, H, N, Dv).

    Raises:
        ValueError: blocks that do not divide the grids, a clamped window that is larger than the map, tables that are
            too short.

    >>> x = torch.randn(1, 2, 16, 8)
    >>> halo_attention(x, x, x, (4, 4), 2, 1).shape
    torch.Size([1, 2, 16, 8])
    """
    call = _prepare(
        q, k, v, grid, block, halo, k_grid=k_grid, k_block=k_block, border=border, bias=bias, axis_tables=axis_tables,
        valid=valid, scale=scale, dropout_p=dropout_p,
    )  # fmt: skip
    return _HALO.run(call, backend)


@dataclass(frozen=True)
class _Axis:
    """One axis: ``count`` blocks of ``q`` queries, each with ``w`` keys of ``length``, from ``starts`` on."""

    count: int
    q: int
    k: int
    halo: int
    length: int
    clamped: bool

    @property
    def w(self) -> int:
        return self.k + 2 * self.halo

    @property
    def starts(self) -> list[int]:
        starts = [i * self.k - self.halo for i in range(self.count)]
        return [max(0, min(s, self.length - self.w)) for s in starts] if self.clamped else starts

    def displacements(self, device: torch.device) -> Tensor:
        """(blocks or 1, q, w): key minus query, in keys; a query lies at the centre of its share of the block."""
        at = torch.arange(self.q, device=device) * self.k // self.q
        first = [s - i * self.k for i, s in enumerate(self.starts)] if self.clamped else [-self.halo]
        return torch.tensor(first, device=device)[:, None, None] + torch.arange(self.w, device=device) - at[:, None]


@dataclass(frozen=True)
class _Call:
    """A checked problem."""

    q: Tensor
    k: Tensor
    v: Tensor
    axes: tuple[_Axis, ...]
    zeros: bool
    bias: Tensor | None
    tables: tuple[Tensor, ...]
    valid: Tensor | None
    options: dict[str, Any]

    def inputs(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v, self.bias, *self.tables) if t is not None]

    @property
    def grid(self) -> list[int]:
        return [a.count * a.q for a in self.axes]

    @property
    def k_grid(self) -> list[int]:
        return [a.length for a in self.axes]


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], block: PerAxis, halo: PerAxis, *,
    k_grid: Sequence[int] | None = None, k_block: PerAxis | None = None, border: str = "mask",
    bias: Tensor | None = None, axis_tables: Sequence[Tensor] | None = None, valid: Tensor | None = None,
    scale: float | None = None, dropout_p: float = 0.0,
) -> _Call:  # fmt: skip
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_rank(name, t, 4, "(B, H, N, D)")
    check_qkv(q, k, v)
    check_choice("border", border, BORDERS)
    grid = check_grid("grid", grid)
    rank = len(grid)
    k_grid = grid if k_grid is None else check_grid("k_grid", k_grid, (rank,))
    sides = [check_int("block", b, least=1) for b in to_tuple("block", block, rank)]
    k_sides = (
        sides if k_block is None else [check_int("k_block", b, least=1) for b in to_tuple("k_block", k_block, rank)]
    )
    halos = [check_int("halo", h, least=0) for h in to_tuple("halo", halo, rank)]
    for name, given, t in (("grid", grid, q), ("k_grid", k_grid, k)):
        if math.prod(given) != t.shape[2]:
            who = "q" if t is q else "k"
            raise ValueError(f"{name}={tuple(given)} holds {math.prod(given)} tokens, but {who} has {t.shape[2]}")
    axes = []
    for n, m, b, c, h in zip(grid, k_grid, sides, k_sides, halos, strict=True):
        if n % b:
            raise ValueError(f"block={tuple(sides)} does not divide the grid {tuple(grid)}")
        if m != n // b * c:
            raise ValueError(
                f"grid={tuple(grid)} has {n // b} blocks of {b} on an axis where k_grid={tuple(k_grid)} does not have "
                f"as many of k_block={c}"
            )
        if border == "clamp" and c + 2 * h > m:
            raise ValueError(
                f"border='clamp' needs windows of {c + 2 * h} keys to fit the grid {tuple(k_grid)} of keys"
            )
        axes.append(_Axis(n // b, b, c, h, m, border == "clamp"))
    check_valid("valid", valid, (q.shape[0], k.shape[2]))
    check_device(q=q, k=k, v=v, valid=valid)
    if bias is not None:
        size = math.prod([a.q for a in axes]), math.prod([a.w for a in axes])
        check_float("bias", bias)
        check_device(q=q, bias=bias)
        if bias.dim() not in (2, 3) or tuple(bias.shape[-2:]) != size:
            raise ValueError(f"bias must be (Sq, Sk) or (H, Sq, Sk) with (Sq, Sk) = {size}, got {tuple(bias.shape)}")
        bias = bias if bias.dim() == 3 else bias[None]
        check_serves("bias", bias.shape[0], q.shape[1], "heads")
    tables: tuple[Tensor, ...] = ()
    if axis_tables is not None:
        check_type("axis_tables", axis_tables, (tuple, list), "one tensor per axis")
        if len(axis_tables) != rank:
            raise ValueError(f"axis_tables holds {len(axis_tables)} tables, but grid={tuple(grid)} has {rank} axes")
        for i, (t, a) in enumerate(zip(axis_tables, axes, strict=True)):
            name, need = f"axis_tables[{i}]", 2 * (a.w if a.clamped else a.k + a.halo) - 1
            check_float(name, t)
            check_device(q=q, **{name: t})
            if t.dim() != 4 or tuple(t.shape[:3]) != tuple(q.shape[:3]) or t.shape[3] < need or t.shape[3] % 2 == 0:
                raise ValueError(
                    f"{name} must be (B, H, N, L) = {(*q.shape[:3], 'L')} with L odd and at least {need}, "
                    f"got {tuple(t.shape)}"
                )
        tables = tuple(axis_tables)
    return _Call(q, k, v, tuple(axes), border == "zeros", bias, tables, valid, dict(scale=scale, dropout_p=dropout_p))


def _padded(t: Tensor, axes: Sequence[_Axis], fill: Any = 0) -> Tensor:
    """(B, *k_grid, C) with its halo around it; a clamped map has none."""
    pads = [] if axes[0].clamped else [p for a in reversed(axes) for p in (a.halo, a.halo)]
    return F.pad(t, [0, 0, *pads], value=fill) if any(pads) else t


def _windows(t: Tensor, axes: Sequence[_Axis]) -> Tensor:
    """(B, *padded k_grid, C) -> (B, blocks, Sk, C)."""
    rank = len(axes)
    for i, a in enumerate(axes):
        at = 1 + 2 * i
        if a.clamped:
            index = (torch.tensor(a.starts, device=t.device)[:, None] + torch.arange(a.w, device=t.device)).flatten()
            t = t.index_select(at, index).unflatten(at, (a.count, a.w))
        else:
            t = t.unfold(at, a.w, a.k).movedim(-1, at + 1)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    return t.permute(order).reshape(
        t.shape[0], math.prod([a.count for a in axes]), math.prod([a.w for a in axes]), t.shape[-1]
    )


def _heads(t: Tensor, grid: Sequence[int]) -> Tensor:
    """(B, H, N, D) -> (B, *grid, H * D)."""
    return t.transpose(1, 2).flatten(2).unflatten(1, tuple(grid))


def _rounds(call: _Call) -> int:
    """In how many rounds of rows of blocks the windows are copied: in one where a gradient keeps them anyway."""
    kept = torch.is_grad_enabled() and any(t.requires_grad for t in call.inputs())
    first = call.axes[0]
    if kept or first.clamped or torch.compiler.is_compiling():
        return 1
    width = sum(t.shape[0] * t.shape[1] * t.shape[3] for t in (call.k, call.v))
    return max(1, min(first.count, -(-math.prod([a.count * a.w for a in call.axes]) * width // ROUND)))


def _blocks(call: _Call, inner: str = AUTO) -> Tensor:
    axes, first = call.axes, call.axes[0]
    queries = [_heads(t, call.grid) for t in (call.q, *call.tables)]
    keys = [_padded(_heads(t, call.k_grid), axes) for t in (call.k, call.v)]
    exists = None
    outside = any(a.halo for a in axes) and not first.clamped and not call.zeros
    if call.valid is not None or outside:
        real = call.valid if call.valid is not None else torch.ones(1, call.k.shape[2], dtype=torch.bool,
                                                                    device=call.k.device)  # fmt: skip
        exists = _padded(real.unflatten(1, tuple(call.k_grid)).unsqueeze(-1), axes, call.zeros)
    rounds = _rounds(call)
    if rounds == 1:
        return _one_round(call, axes, queries, keys, exists, inner)
    per, out = -(-first.count // rounds), []
    for at in range(0, first.count, per):
        count = min(per, first.count - at)
        of_q, of_k = (
            slice(at * first.q, (at + count) * first.q),
            slice(at * first.k, (at + count) * first.k + 2 * first.halo),
        )
        some = None if exists is None else exists[:, of_k]
        part = (replace(first, count=count), *axes[1:])
        out.append(_one_round(call, part, [t[:, of_q] for t in queries], [t[:, of_k] for t in keys], some, inner))
    return torch.cat(out, 2)


def _one_round(
    call: _Call, axes: Sequence[_Axis], queries: list[Tensor], keys: list[Tensor], exists: Tensor | None, inner: str
) -> Tensor:
    """Blocks of some rows: their queries and tables (B, *grid, C), keys and values (B, *padded k_grid, C)."""
    batch, heads = call.q.shape[:2]
    sides, counts = [a.q for a in axes], [a.count for a in axes]
    groups = math.prod(counts)
    k, v = (
        _windows(t, axes).unflatten(-1, (like.shape[1], like.shape[3])).flatten(0, 1).transpose(1, 2)
        for t, like in zip(keys, (call.k, call.v), strict=True)
    )
    q, *tables = (
        block_windows(t, sides).reshape(batch * groups, math.prod(sides), heads, like.shape[3]).transpose(1, 2)
        for t, like in zip(queries, (call.q, *call.tables), strict=True)
    )
    valid = None if exists is None else _windows(exists, axes)[..., 0].expand(batch, -1, -1).flatten(0, 1)
    bias: Any = call.bias
    if tables:
        bias = AxisBias([_factor(t, i, axes, groups) for i, t in enumerate(tables)])
        if call.bias is not None:
            bias = bias.dense() + call.bias
    out = attention(q, k, v, valid=valid, bias=bias, backend=inner, **call.options)
    out = out.transpose(1, 2).reshape(batch, *counts, *sides, heads * out.shape[-1])
    return unblock_windows(out).reshape(batch, groups * math.prod(sides), heads, call.v.shape[3]).transpose(1, 2)


def _factor(table: Tensor, axis: int, axes: Sequence[_Axis], groups: int) -> Tensor:
    """(B * groups, H, Sq, L) -> (B * groups, H, Sq, w): what each query adds to the keys of its window, on one axis."""
    a = axes[axis]
    at = a.displacements(table.device) + table.shape[-1] // 2  # (blocks or 1, q, w)
    shape = [1] * len(axes)
    counts, sides = list(shape), list(shape)
    counts[axis], sides[axis] = at.shape[0], a.q
    at = at.reshape(*counts, *sides, a.w)
    if at.shape[axis] > 1:
        at = at.expand(*(x.count for x in axes), *(x.q for x in axes), a.w).reshape(1, groups, 1, -1, a.w)
    else:
        at = at.expand(*shape, *(x.q for x in axes), a.w).reshape(1, 1, 1, -1, a.w)
    split = table.unflatten(0, (-1, groups))
    return split.gather(-1, at.expand(*split.shape[:-1], a.w)).flatten(0, 1)


def _eager(call: _Call) -> Tensor:
    """One block after the other, every key looked up by its place."""
    batch, heads, n, _ = call.q.shape
    device = call.q.device
    places = torch.arange(n, device=device).view(*call.grid)
    k_places = torch.arange(call.k.shape[2], device=device).view(*call.k_grid)
    out: list[Tensor] = []
    rows: list[Tensor] = []
    for number in range(math.prod([a.count for a in call.axes])):
        spans: list[slice] = []
        k_at: list[Tensor] = []
        inside: list[Tensor] = []
        for a in reversed(call.axes):
            number, i = divmod(number, a.count)
            spans.insert(0, slice(i * a.q, (i + 1) * a.q))
            k_at.insert(0, torch.arange(a.starts[i], a.starts[i] + a.w, device=device))
            inside.insert(0, (k_at[0] >= 0) & (k_at[0] < a.length))
        here = places[tuple(spans)]
        mesh = torch.meshgrid(*k_at, indexing="ij")
        real = torch.stack(torch.meshgrid(*inside, indexing="ij")).all(0).flatten()
        clipped = [m.clamp(0, a.length - 1) for m, a in zip(mesh, call.axes, strict=True)]
        index = k_places[tuple(clipped)].flatten()
        k, v = (t[:, :, index].masked_fill(~real[:, None], 0.0) for t in (call.k, call.v))
        exists = torch.ones_like(real) if call.zeros else real
        keys = exists.expand(batch, -1)
        if call.valid is not None:
            keys = keys & (call.valid[:, index] | ~real)
        bias = call.q.new_zeros(1, 1, here.numel(), index.numel()) if call.bias is None else call.bias[None]
        for axis, (table, a) in enumerate(zip(call.tables, call.axes, strict=True) if call.tables else ()):
            at = torch.arange(here.shape[axis], device=device) * a.k // a.q + spans[axis].start // a.q * a.k
            shape = [-1 if i == axis else 1 for i in range(len(call.axes))]
            at = at.view(shape).expand(here.shape).flatten()
            gap = mesh[axis].flatten() - at[:, None] + table.shape[-1] // 2
            bias = bias + table[:, :, here.flatten()].gather(-1, gap.expand(batch, heads, -1, -1))
        out.append(
            attention(call.q[:, :, here.flatten()], k, v, valid=keys, bias=bias, backend="eager", **call.options)
        )
        rows.append(here.flatten())
    return torch.cat(out, 2)[:, :, torch.cat(rows).argsort()]


#: Scores of one part of a map in :func:`_joined`: they stay in the caches of a processor.
PART = 1 << 19


def _joinable(call: _Call) -> str | None:
    if not call.tables or call.bias is not None:
        return "it adds vectors of axes to scores, so it needs axis_tables and no bias"
    if call.axes[0].clamped:
        return "windows that are moved inside the map have displacements of their own"
    if call.options["dropout_p"]:
        return "it has no dropout"
    if not call.q.shape[1] == call.k.shape[1] == call.v.shape[1]:
        return "it has one head of keys and values for every head of queries"
    if not {t.dtype for t in call.inputs()} <= {torch.float32} and not {t.dtype for t in call.inputs()} <= {
        torch.float64
    }:
        return "scores are kept in the inputs' dtype: float32 or float64, one for all"
    return None


def _join_pays(call: _Call) -> str | None:
    if torch.compiler.is_compiling():
        return "its parts would be steps of the graph"
    device = call.q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return "products would be rounded to the dtype of autocast"
    return None


@dataclass(frozen=True)
class _Parts:
    """How maps (n, *grid, C) are cut: along n, then along rows of blocks."""

    axes: tuple[_Axis, ...]
    scale: float
    n: int

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """First and number along n, first and number of rows of blocks."""
        first = self.axes[0]
        per_row = math.prod([a.count * a.q * a.w for a in self.axes]) // first.count
        rows = max(1, min(first.count, PART // max(1, per_row)))
        some = max(1, PART // max(1, per_row * rows)) if rows == first.count else 1
        for i in range(0, self.n, some):
            for at in range(0, first.count, rows):
                yield i, min(some, self.n - i), at, min(rows, first.count - at)

    def cut(self, part: tuple[int, int, int, int], maps: Sequence[Tensor]) -> list[Tensor]:
        """The part of queries, padded keys and values, and tables."""
        i, some, at, rows = part
        first = self.axes[0]
        of_q = slice(at * first.q, (at + rows) * first.q)
        of_k = slice(at * first.k, (at + rows) * first.k + 2 * first.halo)
        return [t[i : i + some, of_k if number in (1, 2) else of_q] for number, t in enumerate(maps)]

    def run(self, part: tuple[int, int, int, int], maps: Sequence[Tensor], borders: Sequence[Tensor] | None,
            exists: Tensor | None) -> Tensor:  # fmt: skip
        """Of the part's maps: (some, *grid, Dv)."""
        i, some, at, rows = part
        axes = (replace(self.axes[0], count=rows), *self.axes[1:])
        sides, counts = [a.q for a in axes], [a.count for a in axes]
        q, *tables = (
            block_windows(t, sides).reshape(some, *counts, math.prod(sides), t.shape[-1])
            for t in (maps[0], *maps[3:])
        )  # fmt: skip
        k, v = (_windows(t, axes).flatten(0, 1) for t in maps[1:3])
        factors, units = [], []
        for axis, (table, a) in enumerate(zip(tables, axes, strict=True)):
            gap = a.displacements(table.device)[0] + table.shape[-1] // 2
            shape = [a.q if j == axis else 1 for j in range(len(axes))]
            gap = gap.view(*shape, a.w).expand(*sides, a.w).reshape(-1, a.w)
            factor = table.gather(-1, gap.expand(*table.shape[:-1], a.w))
            if borders is not None:
                border = borders[axis][at : at + rows] if axis == 0 else borders[axis]
                factor = factor + border.view([1, *(a.count if j == axis else 1 for j in range(len(axes))), 1, a.w])
            factors.append(factor)
            shape = [a.w, *(a.w if j == axis else 1 for j in range(len(axes)))]
            unit = torch.eye(a.w, dtype=q.dtype, device=q.device).view(shape)
            units.append(unit.expand(a.w, *(b.w for b in axes)).reshape(a.w, -1))
        # what the axes add to every pair is a product with the unit vectors of its coordinates
        q = q.flatten(0, -3)
        scores = (torch.cat(factors, -1).flatten(0, -2) @ torch.cat(units)).view(q.shape[0], q.shape[1], -1)
        hidden = None
        if exists is not None:
            first = self.axes[0]
            real = exists[i : i + some, at * first.k : (at + rows) * first.k + 2 * first.halo]
            hidden = ~_windows(real, axes).flatten(0, 1).transpose(1, 2)
        if not torch.is_grad_enabled() and q.shape[-1] == v.shape[-1]:
            bias = (scores if hidden is None else scores.masked_fill_(hidden, FAR)).unsqueeze(0)
            out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=bias, scale=self.scale)
        else:
            scores = torch.baddbmm(scores, q * self.scale, k.transpose(1, 2))
            out = torch.bmm((scores if hidden is None else scores.masked_fill(hidden, FAR)).softmax(-1), v)
        return unblock_windows(out.view(some, *counts, *sides, -1))


#: Added to the score of a key that does not exist. Where none does, values are zeros, and weights do not matter.
FAR = -1e30


class _Recomputed(torch.autograd.Function):
    """The parts one after another; the backward pass computes each part's scores again."""

    @staticmethod
    def forward(ctx: Any, parts: _Parts, borders: Any, exists: Tensor | None, *maps: Tensor) -> Tensor:  # type: ignore[override]
        ctx.parts, ctx.borders, ctx.exists = parts, borders, exists
        ctx.save_for_backward(*maps)
        out = maps[0].new_empty(*maps[0].shape[:-1], maps[2].shape[-1])
        for part in parts:
            parts.cut(part, [out])[0].copy_(parts.run(part, parts.cut(part, maps), borders, exists))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        maps, (g,) = ctx.saved_tensors, grads
        again = torch.is_grad_enabled()  # somebody wants to differentiate this, too
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        out = [torch.zeros_like(maps[i]) for i in wanted]
        for part in ctx.parts:
            pieces = ctx.parts.cut(part, maps)
            with torch.enable_grad():
                if not again:
                    pieces = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(pieces)]
                y = ctx.parts.run(part, pieces, ctx.borders, ctx.exists)
                made = torch.autograd.grad(
                    y, [pieces[i] for i in wanted], ctx.parts.cut(part, [g])[0], create_graph=again
                )  # fmt: skip
            for i, total, one in zip(wanted, out, made, strict=True):
                where = [total if j == i else t for j, t in enumerate(maps)]
                ctx.parts.cut(part, where)[i].add_(one)
        found = dict(zip(wanted, out, strict=True))
        return None, None, None, *(found.get(i) for i in range(len(maps)))


def _joined(call: _Call) -> Tensor:
    """Parts that fit the cache: axes enter by one product, gradients compute the scores again."""
    batch, heads, _, width = call.q.shape
    axes, k, v, exists, borders = call.axes, call.k, call.v, None, None
    if call.valid is not None:
        k, v = (t.masked_fill(~call.valid[:, None, :, None], 0.0) for t in (k, v))
        real = call.valid.unsqueeze(1).expand(-1, heads, -1).reshape(batch * heads, *call.k_grid, 1)
        exists = _padded(real, axes, True)  # keys beyond the border are none, or zeros, by their coordinates
    if not call.zeros and any(a.halo for a in axes):
        borders = []
        for a in axes:
            at = torch.arange(a.count, device=k.device)[:, None] * a.k - a.halo + torch.arange(a.w, device=k.device)
            borders.append(torch.where((at < 0) | (at >= a.length), FAR, 0.0).to(call.q.dtype))
    maps = [t.flatten(0, 1).unflatten(1, tuple(call.grid)) for t in (call.q, *call.tables)]
    keys = [_padded(t.flatten(0, 1).unflatten(1, tuple(call.k_grid)), axes) for t in (k, v)]
    scale = width**-0.5 if call.options["scale"] is None else call.options["scale"]
    parts = _Parts(axes, scale, batch * heads)
    out = _Recomputed.apply(parts, borders, exists, maps[0], *keys, *maps[1:])
    return out.reshape(batch, heads, call.q.shape[2], out.shape[-1])


_HALO = Operator("halo_attention", _prepare)
_HALO.register(
    "parts", _joined, supports=_joinable, prefers=_join_pays,
    transforms="its backward computes parts again",
)  # fmt: skip
_HALO.register("blocks", _blocks)
register_inner(_HALO, _blocks)
_HALO.register("eager", _eager)
