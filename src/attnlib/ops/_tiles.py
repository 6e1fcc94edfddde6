"""Which keys each tile of queries has to look at: masks lowered to lists of tiles.

A mask first bounds whole tiles (:meth:`attnlib.masks.Mask.tile`); only what it leaves undecided is looked at pair by
pair. Every tile of queries then holds either one contiguous range of keys, which an engine slices without copying, or
the numbers of the keys it wants, and the few column ranges in which some pairs are forbidden.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..masks import Mask
from .lowered import Lowered

#: Keys are admitted in runs of whole multiples of this many.
K_TILE = 64
#: Runs of keys are joined into one range while at least this share of the range is admitted.
DENSE_ENOUGH = 0.75
#: Masks of undecided columns are kept up to this many pairs, beyond which they are computed again when needed.
KEEP_PAIRS = 1 << 26


@dataclass(frozen=True)
class Tile:
    """Queries ``rows[0]..rows[1]-1`` and the keys they look at.

    Args:
        rows: range of queries.
        cols: the keys: a range as a slice, or their numbers.
        width: how many they are.
        forbidden: ``(from, to, pairs)`` in columns of the tile; ``pairs`` (b, h, rows, to - from) is True where a pair
            may not meet, or ``None`` where it was too large to keep.
        empty: some row may look at nothing.
        runs: the keys as ranges.
    """

    rows: tuple[int, int]
    cols: slice | Tensor
    width: int
    forbidden: tuple[tuple[int, int, Tensor | None], ...] = ()
    empty: bool = False
    runs: tuple[tuple[int, int], ...] = ()

    def columns(self, start: int, stop: int) -> Tile:
        """The tile with only its columns ``start..stop-1``; ``forbidden`` is left to the caller."""
        if isinstance(self.cols, slice):
            return replace(self, cols=slice(self.cols.start + start, self.cols.start + stop), width=stop - start)
        runs, at = [], 0
        for a, z in self.runs:
            lo, hi = max(a, a + start - at), min(z, a + stop - at)
            if lo < hi:
                runs.append((lo, hi))
            at += z - a
        return replace(self, cols=self.cols[start:stop], width=stop - start, runs=tuple(runs))


@dataclass(frozen=True)
class Pairs:
    """What decides which pairs may meet: mask, validity of keys and positions, for one problem of (n, m).

    Args:
        mask: pairwise mask or ``None``.
        valid: (B, M) which keys exist.
        q_pos: (N,), (B, 1, N) or (B, H, N) positions of queries, ``None`` for ``0..N-1``.
        k_pos: the same for keys.
    """

    n: int
    m: int
    device: torch.device
    mask: Mask | None = None
    valid: Tensor | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None

    def planes(self) -> tuple[int, int]:
        """How many samples and heads it tells apart."""
        batch = [1 if self.mask is None else self.mask.batch(), 1 if self.valid is None else self.valid.shape[0]]
        heads = [1 if self.mask is None else self.mask.heads()]
        for pos in (self.q_pos, self.k_pos):
            if pos is not None and pos.dim() == 3:
                batch.append(pos.shape[0])
                heads.append(pos.shape[1])
        return max(batch), max(heads)

    def plane(self, b: int, h: int) -> Pairs:
        """The pairs of one sample and head."""

        def pick(x: Tensor | None) -> Tensor | None:
            if x is None or x.dim() == 1:
                return x
            return x[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]

        valid = None if self.valid is None else self.valid[b if self.valid.shape[0] > 1 else 0][None]
        mask = None if self.mask is None else self.mask.plane(b, h)
        return Pairs(self.n, self.m, self.device, mask, valid, pick(self.q_pos), pick(self.k_pos))

    def allowed(self, rows: tuple[int, int], cols: tuple[int, int] | Tensor) -> Tensor:
        """(b, h, rows, cols) boolean, with size 1 for what is not told apart."""
        out: Tensor | None = None
        picked = cols if isinstance(cols, Tensor) else slice(*cols)
        if self.mask is not None:
            if self.q_pos is None and self.k_pos is None and not isinstance(cols, Tensor):
                out = self.mask.block(rows, cols, self.device)
            else:
                q = torch.arange(*rows, device=self.device) if self.q_pos is None else self.q_pos[..., slice(*rows)]
                k = torch.arange(self.m, device=self.device) if self.k_pos is None else self.k_pos
                out = self.mask.at(q, k[..., picked])
            out = out.reshape((1,) * (4 - out.dim()) + tuple(out.shape))
        if self.valid is not None:
            valid = self.valid[:, None, None, picked]
            out = valid.expand(-1, -1, rows[1] - rows[0], -1) if out is None else out & valid
        assert out is not None
        return out

    def classes(self, tq: int, tk: int) -> tuple[Tensor, Tensor]:
        """``(some, every)`` (nq, nk) of the tiles of ``tq`` queries by ``tk`` keys, over all planes; cautious."""
        nq, nk = math.ceil(self.n / tq), math.ceil(self.m / tk)
        some = torch.ones(nq, nk, dtype=torch.bool, device=self.device)
        every = some
        if self.mask is not None:
            q_lo, q_hi = _bounds(self.q_pos, self.n, tq, self.device)
            k_lo, k_hi = _bounds(self.k_pos, self.m, tk, self.device)
            some, every = self.mask.tile(q_lo[:, None], q_hi[:, None], k_lo[None], k_hi[None])
            some, every = some.expand(nq, nk), every.expand(nq, nk)
        if self.valid is not None:
            pad = (0, nk * tk - self.m)
            exist = torch.nn.functional.pad(self.valid, pad, value=False).view(-1, nk, tk).any(-1).any(0)
            whole = torch.nn.functional.pad(self.valid, pad, value=True).view(-1, nk, tk).all(-1).all(0)
            some, every = some & exist, every & whole
        return some, every


def _bounds(pos: Tensor | None, n: int, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Smallest and largest position of every tile, over all planes."""
    if pos is None:
        start = torch.arange(0, n, tile, device=device)
        return start, (start + tile - 1).clamp(max=n - 1)
    flat = pos.reshape(-1, n)
    flat = torch.cat([flat, flat[:, -1:].expand(-1, -n % tile)], 1).reshape(flat.shape[0], -1, tile)
    return flat.amin(-1).amin(0), flat.amax(-1).amax(0)


@dataclass(frozen=True)
class TileList:
    """Every tile of queries of a problem, in order.

    Args:
        tiles: the tiles.
        width: of the widest.
        pairs: what decides pairs again, where some were too many to keep.
        kept: number of pairs kept in masks.
    """

    tiles: tuple[Tile, ...]
    width: int
    pairs: Pairs | None = None
    kept: int = 0

    def forbidden(self, tile: Tile) -> list[tuple[int, int, Tensor]]:
        """The undecided columns of a tile with their pairs."""
        out = []
        for start, stop, kept in tile.forbidden:
            if kept is None:
                cols = tile.cols
                part = cols[start:stop] if isinstance(cols, Tensor) else (cols.start + start, cols.start + stop)
                assert self.pairs is not None
                kept = ~self.pairs.allowed(tile.rows, part)
            out.append((start, stop, kept))
        return out

    def area(self) -> int:
        """Number of pairs that are computed."""
        return sum((t.rows[1] - t.rows[0]) * t.width for t in self.tiles)


def build(pairs: Pairs, tq: int, tk: int = K_TILE) -> TileList:
    """The tiles of one problem."""
    n, m = pairs.n, pairs.m
    rows = [(i, min(i + tq, n)) for i in range(0, n, tq)]
    if pairs.mask is None and pairs.valid is None:
        return TileList(tuple(Tile(r, slice(0, m), m, empty=m == 0) for r in rows), m)
    if m == 0:
        return TileList(tuple(Tile(r, slice(0, 0), 0, empty=True) for r in rows), 0)
    some, every = (c.cpu().tolist() for c in pairs.classes(tq, tk))
    kept = 0
    same: dict[Any, Tensor] = {}
    tiles = []
    for i, r in enumerate(rows):
        tile = _tile(pairs, r, some[i], every[i], tk)
        forbidden: list[tuple[int, int, Tensor | None]] = []
        for start, stop, bad in tile.forbidden:
            assert bad is not None
            key = (tuple(bad.shape), bad.cpu().numpy().tobytes()) if bad.numel() <= 1 << 16 else None
            if key is not None and key in same:
                forbidden.append((start, stop, same[key]))
            elif kept + bad.numel() <= KEEP_PAIRS:
                kept += bad.numel()
                forbidden.append((start, stop, bad))
                if key is not None:
                    same[key] = bad
            else:
                forbidden.append((start, stop, None))
        tiles.append(replace(tile, forbidden=tuple(forbidden)))
    again = any(bad is None for t in tiles for _, _, bad in t.forbidden)
    return TileList(tuple(tiles), max([t.width for t in tiles], default=0), pairs if again else None, kept)


def _tile(pairs: Pairs, rows: tuple[int, int], some: list[bool], every: list[bool], tk: int) -> Tile:
    """One tile of queries: look at undecided tiles of keys, then arrange what is admitted."""
    m, device = pairs.m, pairs.device
    open_ = [j for j, (s, e) in enumerate(zip(some, every, strict=True)) if s and not e]
    full = [e and s for s, e in zip(some, every, strict=True)]
    part: dict[int, tuple[int, int]] = {}  # undecided tiles that stay: first and last admitted column
    base = 0
    bad: Tensor | None = None
    if open_:
        base, end = open_[0] * tk, min(m, (open_[-1] + 1) * tk)
        allowed = pairs.allowed(rows, (base, end))
        bad = ~allowed
        seen, whole = allowed.flatten(0, 2).any(0).cpu(), allowed.flatten(0, 2).all(0).cpu()
        for j in open_:
            a, z = j * tk - base, min((j + 1) * tk, m) - base
            here = seen[a:z].nonzero()
            if here.numel():
                if bool(whole[a:z].all()):
                    full[j] = True
                else:
                    part[j] = (base + a + int(here[0]), base + a + int(here[-1]) + 1)
    runs: list[list[int]] = []  # [start, stop] in columns
    for j in range(len(some)):
        if not (full[j] or j in part):
            continue
        start, stop = part.get(j, (j * tk, min((j + 1) * tk, m)))
        # An undecided tile inside a run keeps all its columns, so that the run stays contiguous.
        if runs and j > 0 and (full[j - 1] or j - 1 in part):
            runs[-1][1] = stop
        else:
            runs.append([start, stop])
    if not runs:
        return Tile(rows, slice(0, 0), 0, empty=True)
    total, hull = sum(z - a for a, z in runs), runs[-1][1] - runs[0][0]
    if total >= DENSE_ENOUGH * hull:
        runs = [[runs[0][0], runs[-1][1]]]
        total = hull
    forbidden: list[tuple[int, int, Tensor]] = []
    at = 0
    for a, z in runs:
        pieces: list[tuple[int, int]] = []  # columns of the key axis that are not wholly admitted
        for j in range(a // tk, math.ceil(z / tk)):
            if not full[j]:
                lo, hi = max(a, j * tk), min(z, (j + 1) * tk)
                if pieces and pieces[-1][1] == lo:
                    pieces[-1] = (pieces[-1][0], hi)
                else:
                    pieces.append((lo, hi))
        for lo, hi in pieces:
            if bad is None or lo < base or hi > base + bad.shape[-1]:
                # Tiles that the bounds alone ruled out, joined because the range is dense enough.
                closed = torch.ones(1, 1, rows[1] - rows[0], hi - lo, dtype=torch.bool, device=device)
                if bad is not None and lo < base + bad.shape[-1] and hi > base:
                    a2, z2 = max(lo, base), min(hi, base + bad.shape[-1])
                    closed = closed.expand(*bad.shape[:2], -1, -1).clone()
                    closed[..., a2 - lo : z2 - lo] = bad[..., a2 - base : z2 - base]
                forbidden.append((at + lo - a, at + hi - a, closed))
            else:
                forbidden.append((at + lo - a, at + hi - a, bad[..., lo - base : hi - base].clone()))
        at += z - a
    empty = False
    if not any(full):
        assert bad is not None
        empty = not bool((~bad).any(-1).all())
    if len(runs) == 1:
        cols: slice | Tensor = slice(*runs[0])
    else:
        cols = torch.cat([torch.arange(a, z, device=device) for a, z in runs])
    return Tile(rows, cols, total, tuple(forbidden), empty, tuple((a, z) for a, z in runs))


# --------------------------------------------------------------------------------------------------------------------
# Lowering once, not once per call

_Entry = tuple[list[Any], TileList]
_cache: OrderedDict[Any, _Entry] = OrderedDict()
_lock = threading.RLock()  # backward passes may run in threads of their own
#: Lists remembered, and pairs that their masks may hold together.
CACHE_LISTS, CACHE_PAIRS = 64, 1 << 28


def tile_list(
    low: Lowered, n: int, m: int, tq: int, device: torch.device, plane: tuple[int, int] | None = None
) -> TileList:
    """:func:`build` for a lowered problem, remembered while its tensors live and stay unchanged."""
    sources = low.pair_tensors
    places = (len(low.mask_tensors), low.valid is not None, low.q_pos is not None, low.k_pos is not None)
    key: Any = None
    if not any(t.is_inference() for t in sources):
        key = (low.mask, n, m, tq, str(device), places, plane, tuple((id(t), t._version) for t in sources))
        with _lock:
            found = _cache.get(key)
            if found is not None and all(ref() is t for ref, t in zip(found[0], sources, strict=True)):
                _cache.move_to_end(key)
                return found[1]
    pairs = _pairs(low, n, m, device)
    tiles = build(pairs if plane is None else pairs.plane(*plane), tq)
    if key is not None:
        with _lock:
            # An id means a tensor only while it lives.
            _cache[key] = ([weakref.ref(t, functools.partial(_forget, key)) for t in sources], tiles)
            while len(_cache) > CACHE_LISTS or sum(held.kept for _, held in _cache.values()) > CACHE_PAIRS:
                _cache.popitem(last=False)
    return tiles


def _forget(key: Any, _: Any) -> None:
    with _lock:
        _cache.pop(key, None)


def lift(pos: Tensor | None) -> Tensor | None:
    """Positions (B, N) as (B, 1, N)."""
    return pos[:, None] if pos is not None and pos.dim() == 2 else pos


def _pairs(low: Lowered, n: int, m: int, device: torch.device) -> Pairs:
    return Pairs(n, m, device, low.raise_mask(), low.valid, lift(low.q_pos), lift(low.k_pos))


def planes(low: Lowered) -> tuple[int, int]:
    """How many samples and heads a problem tells apart."""
    return _pairs(low, 0, 0, torch.device("cpu")).planes()


def grain(low: Lowered) -> int | None:
    """Rows of queries that the mask treats alike."""
    mask = low.raise_mask()
    return None if mask is None else mask.q_tile()
