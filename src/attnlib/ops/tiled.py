"""Attention by tiles of queries, each against only the keys that the mask admits; memory grows with N, not N * M.

For one tile of queries the scores of all admitted keys sit in one reused buffer, so that any normalizer, of one pass or
two, is simply applied to whole rows. The backward pass computes the scores again. Everything is ``torch.bmm`` on slices
of keys and values: no key or value is copied for grouped queries or for masks that admit a contiguous range.

It stands behind one custom operator that takes tensors, numbers and strings only: masks, biases and normalizers travel
in their text form. That is what lets ``torch.compile(fullgraph=True)``, ``torch.export`` with dynamic N and FLOP
counting see it as one node.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..masks import raise_mask
from ..normalizers import Normalizer, Softmax, drop_negligible_, peaked
from ..positions import Bias
from ..types import Partial, exactly, stats_dtype
from . import _tiles, eager
from ._call import AttentionCall
from ._dispatch import Operator, twice
from .lowered import SCHEMA, Lowered, lower

#: Rows of queries in one tile. Tall tiles make the products efficient, short ones compute less beyond a mask's rim: the
#: cost of a pair is taken as ``1 + ROW_COST / rows``. Masks that hold tensors are lowered anew for new tensors, so no
#: search is made for theirs.
Q_TILES, UNKNOWN, ROW_COST = (64, 128, 256), 128, 12
#: Bytes that the scores of one batched product should not exceed, on the CPU per thread (they stay in its cache) and
#: elsewhere.
CPU_BUFFER, OTHER_BUFFER = 4 << 20, 128 << 20
#: Normalizers without statistics of the row need no whole rows: tiles of theirs may be taller and are cut into squarer
#: pieces of about this many bytes per head.
TALL, PIECE, PIECE_WIDTH = 1024, 1 << 20, 256
#: From this many rows on it pays to look at the lengths of queries and keys first.
MANY_ROWS = 16
#: From this many pairs per map on, samples and heads with masks of their own get tile lists of their own.
PLANE_PAIRS = 1 << 18
#: Gradients of gathered keys are added run by run while runs are at least this long on average.
LONG_RUN = 64
#: Into a slice of keys torch adds one map's product after the other. Where so many rows are summed, the products of all
#: maps are written at once, each on a thread of its own, and added afterwards.
DEEP = 256


def register(operator: Operator) -> None:
    operator.register(
        "tiled", run, supports=supports, prefers=prefers, second="the specification",
        transforms="its backward is written by hand",
    )  # fmt: skip


def supports(call: AttentionCall) -> str | None:
    """Why this backend cannot serve the call; ``None`` when it can."""
    if call.dropout_p:
        return "it has no dropout"
    if call.want == "weights":
        return "it never holds the whole map of weights, so it cannot return them"
    return None


def prefers(call: AttentionCall) -> str | None:
    """Why the automatic choice passes over this backend; ``None`` when it is the right one."""
    return call.smaller_than(1 << 16)


def run(call: AttentionCall) -> Tensor | Partial:
    """Output (B, H, N, Dv), or a :class:`Partial` with gradients through its logarithmic scale."""
    partial = call.want == "partial"
    out, lse = torch.ops.attnlib.tiled_attention(call.q, call.k, call.v, *lower(call), partial)

    def spec(*inputs: Tensor) -> tuple[Tensor, ...]:
        return eager.outputs(call.replaced(inputs))

    if not partial:
        return twice((out,), call.inputs(), spec)[0]
    out, lse = twice((out, lse), call.inputs(), spec)
    return Partial(lse, (~torch.isinf(lse)).to(lse.dtype).detach(), out)


# --------------------------------------------------------------------------------------------------------------------
# The loop over tiles, shared by forward and backward


@dataclass(frozen=True)
class _Chunk:
    """A slice of samples and heads that one batched product handles: whole groups, or heads of one group."""

    b: slice
    h: slice
    k: slice  # rows of the keys flattened to (B * Hk, M, D)
    v: slice

    @property
    def size(self) -> int:
        return (self.b.stop - self.b.start) * (self.h.stop - self.h.start)


_Forbidden = list[tuple[int, int, Tensor]]


def _largest(x: Tensor) -> float:
    """The absolute value of the largest entry; not finite where one is not."""
    if not x.numel():
        return 0.0
    low, high = x.aminmax()
    return float(torch.maximum(-low, high))


def _longest(x: Tensor) -> float:
    """The length of the longest row."""
    return _largest(torch.linalg.vector_norm(x, dim=-1, dtype=stats_dtype(x.dtype)))


class _Problem:
    """One problem brought to the statistics dtype, with its tiles."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, low: Lowered, partial: bool):
        self.dtype = stats_dtype(q.dtype)
        self.batch, self.heads, self.n, self.dim = q.shape
        self.k_heads, self.m, self.v_heads, self.v_dim = k.shape[1], k.shape[2], v.shape[1], v.shape[3]
        self.q, self.scale, self.device, self.low = q, low.scale, q.device, low
        self.k = k.to(self.dtype).reshape(self.batch * self.k_heads, self.m, self.dim)
        self.v = v.to(self.dtype).reshape(self.batch * self.v_heads, self.m, self.v_dim)
        self.normalizer = low.raise_normalizer()
        self.bias = low.raise_bias()
        added = sum(_largest(t) for t in low.bias_tensors if t.is_floating_point())
        # A bias may hold -inf, so that rows which the mask leaves open see nothing after all.
        self.careful = not math.isfinite(added)
        self.peaked = (
            self.device.type == "cpu"
            and type(self.normalizer) is Softmax
            and self.n >= MANY_ROWS
            and peaked(abs(self.scale) * _longest(q) * _longest(k) + added)
        )
        self.threads = min(torch.get_num_threads(), 16) if self.device.type == "cpu" else 1
        self.buffer_bytes = CPU_BUFFER * self.threads if self.device.type == "cpu" else OTHER_BUFFER
        self.deferred = self.normalizer.deferred and not partial
        self.piecewise = _piecewise(self.normalizer, partial)
        self.q_tile = q_tile_of(low, self.n, self.m, self.piecewise)
        self._limits: dict[int, tuple[Tensor, Tensor]] = {}

    # ---- tiles

    def tile_list(self, q_tile: int, plane: tuple[int, int] | None = None) -> _tiles.TileList:
        return _tiles.tile_list(self.low, self.n, self.m, q_tile, self.device, plane)

    def planes(self) -> Iterator[tuple[_tiles.TileList, list[_Chunk]]]:
        """Tile lists, each with the samples and heads it holds for."""
        planes = _tiles.planes(self.low)
        if planes == (1, 1) or self.n * self.m < PLANE_PAIRS:
            tiles = self.tile_list(self.q_tile)
            yield tiles, self._chunks(range(self.batch), None, tiles.width)
            return
        for b in range(self.batch) if planes[0] > 1 else [None]:
            for h in range(self.heads) if planes[1] > 1 else [None]:
                tiles = self.tile_list(self.q_tile, (b or 0, h or 0))
                yield tiles, self._chunks(range(self.batch) if b is None else [b], h, tiles.width)

    def _chunks(self, samples: range | list[int], head: int | None, width: int) -> list[_Chunk]:
        """Cut samples and heads so that the scores of one chunk fit the buffer."""
        gk, gv = self.heads // self.k_heads, self.heads // self.v_heads
        one, limit = self.q_tile * width * self.dtype.itemsize, self.buffer_bytes
        if self.piecewise and self.device.type == "cpu":
            one, limit = min(one, PIECE), PIECE * self.threads  # each thread keeps one piece in its cache
        fit = max(self.threads, limit // max(1, one))  # a product of fewer maps than threads leaves some idle
        if not samples:
            return []
        if head is not None:
            return [self._chunk(b, b + 1, head, head + 1) for b in samples]
        if fit >= 2 * self.heads:
            step = fit // self.heads
            return [
                self._chunk(b, min(b + step, samples[-1] + 1), 0, self.heads)
                for b in range(samples[0], samples[-1] + 1, step)
            ]
        # Heads of a chunk fill whole groups of keys and of values, or lie inside one.
        legal = [
            c for c in range(1, self.heads + 1)
            if self.heads % c == 0 and all(c % g == 0 or g % c == 0 for g in (gk, gv))
        ]  # fmt: skip
        step = max(c for c in legal if c <= fit)
        return [self._chunk(b, b + 1, h, h + step) for b in samples for h in range(0, self.heads, step)]

    def _chunk(self, b0: int, b1: int, h0: int, h1: int) -> _Chunk:
        def span(heads: int) -> slice:
            group = self.heads // heads
            return slice(b0 * heads + h0 // group, (b1 - 1) * heads + max(h0 // group + 1, h1 // group))

        return _Chunk(slice(b0, b1), slice(h0, h1), span(self.k_heads), span(self.v_heads))

    def pieces(self, tiles: _tiles.TileList, tile: _tiles.Tile) -> list[tuple[_tiles.Tile, _Forbidden]]:
        """The tile with its forbidden pairs: whole, or cut along the keys where the normalizer allows it."""
        bad = tiles.forbidden(tile)
        width = tile.width
        if self.piecewise and self.device.type == "cpu":
            width = max(PIECE_WIDTH, PIECE // (self.dtype.itemsize * (tile.rows[1] - tile.rows[0])))
        if tile.width <= width:
            return [(tile, bad)]
        out = []
        for start in range(0, tile.width, width):
            stop = min(start + width, tile.width)
            inside = [
                (max(a, start) - start, min(z, stop) - start, pairs[..., max(a, start) - a : min(z, stop) - a])
                for a, z, pairs in bad
                if a < stop and z > start
            ]
            out.append((tile.columns(start, stop), inside))
        return out

    # ---- scores

    def buffer(self) -> _Buffer:
        return _Buffer(self.dtype, self.device)

    def rows(self, x: Tensor, chunk: _Chunk, tile: _tiles.Tile, groups: slice, scale: float | None = None) -> Tensor:
        """(groups, heads of a group * rows, D): the tile's rows of ``x`` (B, H, N, D), contiguous."""
        part = x[chunk.b, chunk.h, slice(*tile.rows)]
        part = part.to(self.dtype) if scale is None else part.to(self.dtype) * scale
        count = groups.stop - groups.start
        return part.reshape(count, part.shape[:3].numel() // count, x.shape[3])

    def keys(self, x: Tensor, groups: slice, tile: _tiles.Tile) -> Tensor:
        """(groups, width, D): the tile's keys or values."""
        part = x[groups]
        return part[:, tile.cols] if isinstance(tile.cols, slice) else part.index_select(1, tile.cols)

    def scores(self, buffer: Tensor, chunk: _Chunk, tile: _tiles.Tile, q: Tensor, k: Tensor, bad: _Forbidden) -> Tensor:
        """(b, h, rows, width) in ``buffer``: scaled, biased, ``-inf`` where a pair may not meet."""
        torch.bmm(q, k.transpose(1, 2), out=buffer.view(q.shape[0], q.shape[1], tile.width))
        s = buffer.view(chunk.b.stop - chunk.b.start, -1, tile.rows[1] - tile.rows[0], tile.width)
        if self.bias is not None:
            s += self.bias.part(chunk.b, chunk.h).block(slice(*tile.rows), tile.cols)
        for start, stop, pairs in bad:
            b = chunk.b if pairs.shape[0] > 1 else slice(None)
            h = chunk.h if pairs.shape[1] > 1 else slice(None)
            part = s[..., start:stop]
            if self.careful:  # a minimum would let NaN in the bias through
                part.masked_fill_(pairs[b, h], float("-inf"))
            else:
                torch.minimum(part, self._limit(pairs)[b, h], out=part)
        return s

    def _limit(self, forbidden: Tensor) -> Tensor:
        """``-inf`` where a pair may not meet, ``inf`` elsewhere. A minimum is many times faster than masked_fill."""
        found = self._limits.get(id(forbidden))
        if found is not None:
            return found[1]
        limit = torch.full(forbidden.shape, float("inf"), dtype=self.dtype, device=self.device)
        limit.masked_fill_(forbidden, float("-inf"))
        if len(self._limits) >= 4:
            self._limits.clear()
        self._limits[id(forbidden)] = (forbidden, limit)  # holding the key keeps its id from being used again
        return limit


class _Buffer:
    """Memory that is used again for every tile."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self.memory = torch.empty(0, dtype=dtype, device=device)

    def __call__(self, *shape: int) -> Tensor:
        size = math.prod(shape)
        if self.memory.numel() < size:
            self.memory = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.memory[:size].view(shape)


def _piecewise(normalizer: Normalizer, partial: bool) -> bool:
    """Whether a tile may be cut along the keys: no statistic of the row is needed before values are mixed."""
    return not partial and (not normalizer.stats or normalizer.deferred)


def q_tile_of(low: Lowered, n: int, m: int, piecewise: bool) -> int:
    """Rows of queries in one tile: the grain of the mask where it has one, fewer where a row of scores is long."""
    grain = _tiles.grain(low)
    if grain is not None:
        tile = max(32, min(Q_TILES[-1], grain))
    elif not low.mask and low.valid is None:
        return TALL if piecewise else _tall(m)
    elif low.pair_tensors:
        tile = UNKNOWN
    else:
        tile = _best_q_tile(low.mask, n, m)
    return tile if piecewise else min(tile, _tall(m))


def _tall(m: int) -> int:
    """Rows of a tile whose rows are ``m`` long: fewer for longer rows, so that the buffer does not grow without end."""
    tile = Q_TILES[-1]
    while tile > 32 and tile * m > 1 << 22:
        tile //= 2
    return tile


@functools.lru_cache(maxsize=256)
def _best_q_tile(mask: str, n: int, m: int) -> int:
    """The cheapest of :data:`Q_TILES` for a mask without tensors, by its bounds of tiles alone."""
    pairs = _tiles.Pairs(n, m, torch.device("cpu"), raise_mask(mask))

    def cost(tile: int) -> float:
        some, _ = pairs.classes(tile, _tiles.K_TILE // 2)  # finer than the tiles of keys, since ranges get trimmed
        return float(some.sum()) * tile * (1 + ROW_COST / tile)

    return min(Q_TILES, key=cost)


# --------------------------------------------------------------------------------------------------------------------
# The operators

_ARGUMENTS = f"Tensor q, Tensor k, Tensor v, {SCHEMA}, bool partial"


def _unpack(arguments: Sequence[Any]) -> tuple[Lowered, bool]:
    """What stands behind ``q, k, v`` in the operators."""
    *fields, partial = arguments
    return Lowered(*fields), partial


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Output (B, H, N, Dv) and a statistic of rows (B, H, N).

    For ``partial`` that is the logarithm of the sum of weights, for a deferred normalizer the sum itself (1 in an empty
    row), otherwise nothing.
    """
    low, partial = _unpack(arguments)
    out, lse = _empty_outputs(q, v, low, partial)
    with torch.no_grad(), exactly(q):
        p = _Problem(q, k, v, low, partial)
        score_buffer, out_buffer = p.buffer(), p.buffer()
        for tiles, chunks in p.planes():
            for tile in tiles.tiles:
                rows = slice(*tile.rows)
                pieces = p.pieces(tiles, tile)
                for chunk in chunks:
                    if tile.width == 0:
                        out[chunk.b, chunk.h, rows] = 0
                        if partial:
                            lse[chunk.b, chunk.h, rows] = float("-inf")
                        elif p.deferred:
                            lse[chunk.b, chunk.h, rows] = 1
                        continue
                    qs = p.rows(q, chunk, tile, chunk.k, p.scale)
                    groups = chunk.v.stop - chunk.v.start
                    o = out_buffer(groups, qs.shape[0] * qs.shape[1] // groups, p.v_dim)
                    for i, (piece, bad) in enumerate(pieces):
                        memory = score_buffer(qs.shape[0] * qs.shape[1] * piece.width)
                        s = p.scores(memory, chunk, piece, qs, p.keys(p.k, chunk.k, piece), bad)
                        if partial:
                            lse[chunk.b, chunk.h, rows] = torch.logsumexp(s, -1)
                        if p.peaked:
                            drop_negligible_(s)
                        if p.deferred:
                            weights = p.normalizer.raw_(s)
                            lse[chunk.b, chunk.h, rows] += weights.sum(-1)
                        elif tile.empty or p.careful:
                            weights = p.normalizer.weights(s)
                        else:
                            weights = p.normalizer.weights_(s)
                        weights = weights.reshape(groups, -1, piece.width)
                        vs = p.keys(p.v, chunk.v, piece)
                        torch.bmm(weights, vs, out=o) if i == 0 else o.baddbmm_(weights, vs)
                    mixed = o.view(*s.shape[:3], p.v_dim)
                    if p.deferred:
                        total = lse[chunk.b, chunk.h, rows]
                        mixed.div_(total.masked_fill_(total == 0, 1).unsqueeze(-1))
                    out[chunk.b, chunk.h, rows] = mixed
    return out, lse


def _empty_outputs(q: Tensor, v: Tensor, low: Lowered, partial: bool) -> tuple[Tensor, Tensor]:
    high = stats_dtype(q.dtype)
    batch, heads, n = q.shape[:3]
    # Heads next to channels in memory: merging them afterwards copies nothing.
    out = q.new_empty((batch, n, heads, v.shape[3]), dtype=high if partial else q.dtype).transpose(1, 2)
    if partial:
        return out, q.new_empty((batch, heads, n), dtype=high)
    deferred = low.raise_normalizer().deferred
    return out, q.new_zeros((batch, heads, n) if deferred else (0,), dtype=high)


def _backward(
    grad: Tensor, lse_grad: Tensor | None, out: Tensor | None, total: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k and v, then one per bias tensor (empty where ``wanted`` says so)."""
    low, partial = _unpack(arguments[:-1])
    bias_tensors, wanted = low.bias_tensors, arguments[-1]
    with torch.no_grad(), exactly(q):
        p = _Problem(q, k, v, low, partial)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        # Tokens last: the products that fill them then read the scores as they lie.
        dk, dv = (p.k.new_zeros(x.shape[0], x.shape[2], p.m) for x in (p.k, p.v))
        bias_grads = [
            torch.zeros_like(t, dtype=p.dtype) if w else None for t, w in zip(bias_tensors, wanted, strict=True)
        ]
        score_buffer, grad_buffer, row_buffer, room_buffer = p.buffer(), p.buffer(), p.buffer(), p.buffer()
        for tiles, chunks in p.planes():
            for tile in tiles.tiles:
                rows = slice(*tile.rows)
                pieces = p.pieces(tiles, tile)
                for chunk in chunks:
                    if tile.width == 0:
                        dq[chunk.b, chunk.h, rows] = 0
                        continue
                    qs, go = p.rows(q, chunk, tile, chunk.k, p.scale), p.rows(grad, chunk, tile, chunk.v)
                    row = row_buffer(*qs.shape)
                    if p.deferred:
                        # Rows of width D are divided by the sum, once, and no row of scores is.
                        assert out is not None and total is not None
                        go = go / total[chunk.b, chunk.h, rows].reshape(go.shape[0], -1, 1)
                        met = (go * p.rows(out, chunk, tile, chunk.v)).sum(-1)
                    for i, (piece, bad) in enumerate(pieces):
                        ks, vs = p.keys(p.k, chunk.k, piece), p.keys(p.v, chunk.v, piece)
                        memory = score_buffer(qs.shape[0] * qs.shape[1] * piece.width)
                        s = p.scores(memory, chunk, piece, qs, ks, bad)
                        dw = grad_buffer(go.shape[0], go.shape[1], piece.width)
                        torch.bmm(go, vs.transpose(1, 2), out=dw)
                        if p.peaked:
                            drop_negligible_(s)
                        if p.deferred:
                            weights, ds = p.normalizer.raw_adjoint_(
                                s, dw.view(s.shape), met.view(*s.shape[:3], 1), room_buffer(*s.shape)
                            )
                        elif tile.empty or p.careful:
                            weights = p.normalizer.weights(s)
                            ds = p.normalizer.backward(s, weights, dw.view(s.shape))
                        else:
                            weights, ds = p.normalizer.adjoint_(s, dw.view(s.shape))
                        if lse_grad is not None:
                            ds.addcmul_(weights, lse_grad[chunk.b, chunk.h, rows].unsqueeze(-1))
                        _add_keys(dv, chunk.v, piece, weights.view(go.shape[0], -1, piece.width), go)
                        if p.bias is not None and any(wanted):
                            parts = _grad_parts(p.bias, bias_grads, chunk)
                            p.bias.part(chunk.b, chunk.h).add_grad(parts, rows, piece.cols, ds)
                        ds = ds.view(qs.shape[0], -1, piece.width)
                        _add_keys(dk, chunk.k, piece, ds, qs)
                        torch.bmm(ds, ks, out=row) if i == 0 else row.baddbmm_(ds, ks)
                    torch.mul(row.view(*s.shape[:3], p.dim), p.scale, out=dq[chunk.b, chunk.h, rows])
        return [
            dq, _tokens_first(dk, k), _tokens_first(dv, v),
            *(t.new_empty(0) if g is None else g.to(t.dtype) for t, g in zip(bias_tensors, bias_grads, strict=True)),
        ]  # fmt: skip


def _add_keys(into: Tensor, groups: slice, tile: _tiles.Tile, weights: Tensor, rows: Tensor) -> None:
    """``into[groups, :, keys of the tile] += rows^T weights``."""
    if isinstance(tile.cols, slice):
        part = into[groups, :, tile.cols]
        if part.is_contiguous() or rows.shape[1] < DEEP or part.shape[0] == 1:
            part.baddbmm_(rows.transpose(1, 2), weights)
        else:
            part.add_(torch.bmm(rows.transpose(1, 2), weights))
    elif tile.width >= LONG_RUN * len(tile.runs):
        at = 0
        for start, stop in tile.runs:
            into[groups, :, start:stop].baddbmm_(rows.transpose(1, 2), weights[:, :, at : at + stop - start])
            at += stop - start
    else:
        into[groups].index_add_(2, tile.cols, torch.bmm(rows.transpose(1, 2), weights))


def _tokens_first(grad: Tensor, like: Tensor) -> Tensor:
    batch, heads, m, d = like.shape
    return grad.view(batch, heads, d, m).transpose(2, 3).to(like.dtype).contiguous()


def _grad_parts(bias: Bias, grads: list[Tensor | None], chunk: _Chunk) -> list[Tensor | None]:
    """Accumulators of a part of a bias: views of the whole ones, cut as the bias itself is."""
    floats = [t if g is None else g for t, g in zip(bias.tensors(), grads, strict=True)]
    views = type(bias).rebuild(floats, bias.settings()).part(chunk.b, chunk.h).tensors()
    return [None if g is None else view for g, view in zip(grads, views, strict=True)]


tiled_attention = torch.library.custom_op(
    "attnlib::tiled_attention", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
tiled_attention_backward = torch.library.custom_op(
    "attnlib::tiled_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? lse_grad, Tensor? out, Tensor? total, {_ARGUMENTS}, bool[] wanted) -> Tensor[]",
)


@tiled_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v, *_unpack(rest))


@tiled_attention_backward.register_fake
def _(
    grad: Tensor, lse_grad: Tensor | None, out: Tensor | None, total: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    bias_tensors, wanted = _unpack(rest[:-1])[0].bias_tensors, rest[-1]
    return [
        *(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)),
        *(torch.empty_like(t) if w else t.new_empty(0) for t, w in zip(bias_tensors, wanted, strict=True)),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, *arguments = inputs
    low, ctx.partial = _unpack(arguments)
    ctx.set_materialize_grads(False)
    deferred = not ctx.partial and low.raise_normalizer().deferred
    ctx.save_for_backward(*(output if deferred else (None, None)), q, k, v, *low.saved)
    ctx.low, ctx.wanted = low.bare(), [t.requires_grad for t in low.bias_tensors]


def _autograd(ctx: Any, grad: Tensor | None, lse_grad: Tensor | None) -> tuple[Any, ...]:
    out, total, q, k, v, *saved = ctx.saved_tensors
    low = ctx.low.restored(saved)
    nothing = [None] * len(low.mask_tensors), [None] * len(low.bias_tensors)
    if grad is None and lse_grad is None:
        return (None,) * 6 + nothing + (None,) * 5
    if grad is None:
        grad = q.new_zeros((*q.shape[:3], v.shape[3]))
    dq, dk, dv, *dbias = torch.ops.attnlib.tiled_attention_backward(
        grad, lse_grad if ctx.partial else None, out, total, q, k, v, *low, ctx.partial, ctx.wanted
    )  # fmt: skip
    dbias = [g if w else None for g, w in zip(dbias, ctx.wanted, strict=True)]
    return dq, dk, dv, None, None, None, [None] * len(low.mask_tensors), dbias, None, None, None, None, None


tiled_attention.register_autograd(_autograd, setup_context=_setup_context)


# --------------------------------------------------------------------------------------------------------------------
# Counting


def _area(q: Any, k: Any, *arguments: Any) -> int:
    """Pairs computed over all samples and heads; all of them where a mask's contents are not known."""
    batch, heads, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    low, partial = _unpack(arguments)
    known = low.pair_tensors
    if (not low.mask and not known) or any(type(t) is not Tensor or t.device.type == "meta" for t in known):
        return batch * heads * n * m
    device = known[0].device if known else torch.device("cpu")
    tile = q_tile_of(low, n, m, _piecewise(low.raise_normalizer(), partial))
    planes = _tiles.planes(low)
    if planes == (1, 1) or n * m < PLANE_PAIRS:
        return batch * heads * _tiles.tile_list(low, n, m, tile, device).area()
    total = sum(
        _tiles.tile_list(low, n, m, tile, device, (b, h)).area() for b in range(planes[0]) for h in range(planes[1])
    )
    return total * (batch // planes[0]) * (heads // planes[1])


@register_flop_formula(torch.ops.attnlib.tiled_attention, get_raw=True)
def _forward_flops(q: Any, k: Any, v: Any, *arguments: Any, **kwargs: Any) -> int:
    with torch.utils._python_dispatch._disable_current_modes():
        area = _area(q, k, *arguments)
    return 2 * area * (q.shape[3] + v.shape[3])


@register_flop_formula(torch.ops.attnlib.tiled_attention_backward, get_raw=True)
def _backward_flops(
    grad: Any, lse_grad: Any, out: Any, total: Any, q: Any, k: Any, v: Any, *arguments: Any, **kwargs: Any
) -> int:
    with torch.utils._python_dispatch._disable_current_modes():
        area = _area(q, k, *arguments[:-1])
    return 2 * area * (3 * q.shape[3] + 2 * v.shape[3])
