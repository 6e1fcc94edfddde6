"""Attention for few queries over many keys, its work dealt evenly: Lean Attention's stream-K schedule.

While decoding there is one query per head, and the only parallelism left is along the keys. An *output* (the queries of
one sample and key head; with many queries, of one block of them) reads ``n_o = ceil(N_o / tile)`` tiles of keys, where
samples may be of any length. A schedule deals tiles to workers:

* fixed split (FlashDecoding): every output is cut into the same number of pieces, which are dealt one by one. Workers
  stand idle when pieces do not come out even.
* stream-K (Lean Attention): the tiles of all outputs form one line, cut into one piece per worker. With ``total``
  tiles and ``W`` workers ``high = total - (t - 1) W`` of them get ``t = ceil(total / W)`` tiles and the others
  ``t - 1``: never more than one tile of difference, whatever the lengths. A worker may end one output and begin the
  next.

A piece gives a :class:`~attnlib.types.Partial` ``(m, l, o)``. Who holds the first tile of an output is its host: it
merges what the following workers wrote, at most one part each, and divides.

    ``m = max(m1, m2)``,  ``l = l1 e^(m1 - m) + l2 e^(m2 - m)``,  ``o = o1 e^(m1 - m) + o2 e^(m2 - m)``

Here workers take turns, and hosts merge after all of them; nobody waits. Results are exact for every schedule.

Reference: Sanovar et al., 2024, arXiv 2405.10480, section IV; the launch arithmetic is that of AMD's Triton port.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_int, check_ints, check_rank, check_whole
from ..masks import explicit
from ..types import Partial, exactly, stats_dtype
from ._call import AttentionCall, expand_heads, prepare
from ._dispatch import Operator, device_kind
from ._guard import guarded
from .kernels import decoding

#: Keys of a tile by head dimension, as the paper uses them on an A100.
TILE = {64: 256, 128: 128}

SCHEDULES = ("stream-k", "fixed")


# --------------------------------------------------------------------------------------------------------------------
# Schedules


class Piece(NamedTuple):
    """Tiles ``first`` to ``last`` (exclusive) of one output, in one worker."""

    output: int
    first: int
    last: int

    @property
    def tiles(self) -> int:
        return self.last - self.first


@dataclass(frozen=True)
class Schedule:
    """Who computes which tiles.

    Args:
        tiles: tiles of each output.
        work: pieces of each worker, in order.

    >>> s = stream_k([5, 1, 3], workers=2)
    >>> s.loads, s.work[1]
    ((5, 4), (Piece(output=1, first=0, last=1), Piece(output=2, first=0, last=3)))
    """

    tiles: tuple[int, ...]
    work: tuple[tuple[Piece, ...], ...]

    @property
    def workers(self) -> int:
        return len(self.work)

    @property
    def total(self) -> int:
        """Tiles in all."""
        return sum(self.tiles)

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """Tiles of each worker."""
        return tuple(sum(p.tiles for p in pieces) for pieces in self.work)

    @property
    def makespan(self) -> int:
        """Tiles of the busiest worker: how long it takes in units of a tile."""
        return max(self.loads, default=0)

    @property
    def efficiency(self) -> float:
        """Share of the workers' time that is work."""
        return self.total / (self.workers * self.makespan) if self.makespan else 1.0

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """Pieces of each output."""
        counts = [0] * len(self.tiles)
        for pieces in self.work:
            for p in pieces:
                counts[p.output] += 1
        return tuple(counts)

    @property
    def partials(self) -> int:
        """Parts that are written for another worker to merge: all pieces but the hosts'."""
        return sum(1 for pieces in self.work for p in pieces if p.first > 0)

    def __repr__(self) -> str:
        return (
            f"Schedule({len(self.tiles)} outputs, {self.total} tiles, {self.workers} workers, "
            f"makespan {self.makespan}, {self.partials} partials)"
        )


def _check_workers(workers: int) -> None:
    check_int("workers", workers, least=1)


def _check_tiles(tiles: Sequence[int]) -> tuple[int, ...]:
    return check_ints("tiles", tiles, least=0)


def stream_k(tiles: Sequence[int], workers: int) -> Schedule:
    """All tiles in one line, cut evenly: loads differ by one tile at most.

    Args:
        tiles: tiles of each output.
        workers: W.

    Returns:
        The :class:`Schedule`; it writes at most ``W - 1`` partials.

    Raises:
        ValueError: no worker, or a negative number of tiles.

    >>> stream_k([4, 4, 4], workers=5).loads
    (3, 3, 2, 2, 2)
    """
    _check_workers(workers)
    tiles = _check_tiles(tiles)
    total = sum(tiles)
    most = -(-total // workers)
    high = total - (most - 1) * workers if total else 0
    work: list[tuple[Piece, ...]] = []
    output = first = 0
    for w in range(workers):
        left = 0 if not total else most if w < high else most - 1
        pieces = []
        while left:
            while tiles[output] == first:
                output, first = output + 1, 0
            last = min(tiles[output], first + left)
            pieces.append(Piece(output, first, last))
            left -= last - first
            first = last
        work.append(tuple(pieces))
    return Schedule(tiles, tuple(work))


def fixed_split(tiles: Sequence[int], workers: int, splits: int | None = None) -> Schedule:
    """Every output in ``splits`` equal pieces, each to the worker that is free first: FlashDecoding's schedule.

    Args:
        tiles: tiles of each output.
        workers: W.
        splits: pieces per output; by default as :func:`flash_decoding_splits` chooses for the longest output.

    Returns:
        The :class:`Schedule`. For outputs of one length its makespan is
        ``ceil(outputs * splits / W) * ceil(tiles / splits)``.

    Raises:
        ValueError: no worker, or less than one split.

    >>> fixed_split([4, 4, 4], workers=5, splits=2).loads
    (4, 2, 2, 2, 2)
    """
    _check_workers(workers)
    tiles = _check_tiles(tiles)
    if splits is None:
        splits = flash_decoding_splits(len(tiles), workers, max(tiles, default=0))
    check_int("splits", splits, least=1)
    work: list[list[Piece]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for output, n in enumerate(tiles):
        size = -(-n // splits)
        for first in range(0, n, size) if size else ():
            w = loads.index(min(loads))
            work[w].append(Piece(output, first, min(n, first + size)))
            loads[w] += work[w][-1].tiles
    return Schedule(tiles, tuple(map(tuple, work)))


def flash_decoding_splits(outputs: int, workers: int, tiles: int, most: int = 128) -> int:
    """Pieces per output as FlashAttention chooses: the fewest that reach 85 % of the best occupancy of whole waves.

    Reference: Dao et al., flash-attention, ``num_splits_heuristic``.

    >>> flash_decoding_splits(48, 108, 64)
    2
    """
    for name, value, least in (
        ("outputs", outputs, 0),
        ("workers", workers, 1),
        ("tiles", tiles, 0),
        ("most", most, 1),
    ):
        check_int(name, value, least=least)
    if outputs >= 0.8 * workers:
        return 1
    efficiency = {}
    for splits in range(1, min(most, workers, tiles) + 1):
        if splits == 1 or -(-tiles // splits) != -(-tiles // (splits - 1)):
            waves = outputs * splits / workers
            efficiency[splits] = waves / -(-outputs * splits // workers) if outputs else 0.0
    best = max(efficiency.values(), default=0.0)
    return next((splits for splits, e in efficiency.items() if e >= 0.85 * best), 1)


class Launch(NamedTuple):
    """What a persistent kernel is launched with.

    ``high``: programs with ``most`` tiles (the others have one less); ``most``: tiles of the busiest program;
    ``programs``: how many are launched; ``splits``: bound on the pieces of one output; ``even``: all have the same.
    """

    high: int
    most: int
    programs: int
    splits: int
    even: bool


def lean_launch(outputs: int, tiles: int, processors: int) -> Launch:
    """Launch arithmetic of AMD's Triton port for outputs of one length.

    Where there are no more tiles than processors, half as many programs as tiles are launched, so that each has two.

    Args:
        outputs: (sample, head, block of queries) triples.
        tiles: tiles of each.
        processors: programs that run at once.

    Returns:
        The :class:`Launch`.

    Raises:
        ValueError: an argument below 1.

    Reference: ROCm/aiter, ``get_num_splits_and_buffer_sizes``.

    >>> lean_launch(outputs=56, tiles=64, processors=108)
    Launch(high=20, most=34, programs=108, splits=3, even=False)
    """
    for name, value in (("outputs", outputs), ("tiles", tiles), ("processors", processors)):
        check_int(name, value, least=1)
    total = outputs * tiles
    programs = processors
    if total <= processors:
        programs = min((total + 1) // 2, -(-32 * total // tiles))
    most = -(-total // programs)
    even = total % programs == 0
    return Launch(total - (most - 1) * programs, most, programs, max_splits(tiles, most, even), even)


def max_splits(tiles: int, most: int, even: bool) -> int:
    """Bound on the pieces of an output of ``tiles`` tiles, when workers have ``most``, some one less unless ``even``.

    >>> max_splits(64, 34, even=False)
    3
    """
    least = most if even else most - 1
    return tiles if least == 0 else 1 + (tiles - 2 + least) // least


# --------------------------------------------------------------------------------------------------------------------
# Execution


class Problem(NamedTuple):
    """Outputs of a call: queries ``rows`` of a sample and key head, over keys ``start`` to ``stop``."""

    sample: int
    head: int
    rows: slice
    start: int
    stop: int


def split_problems(
    batch: int, heads: int, n: int, ranges: Sequence[tuple[int, int]], causal: bool, q_tile: int | None
) -> list[Problem]:
    """Outputs in order of sample, block of queries and key head; causal blocks end at their last query's key."""
    step = q_tile or max(n, 1)
    out = []
    for b in range(batch):
        start, stop = ranges[b]
        for first in range(0, n, step):
            rows = slice(first, min(n, first + step))
            end = max(start, stop - (n - rows.stop)) if causal else stop
            out += [Problem(b, h, rows, start, end) for h in range(heads)]
    return out


def _piece(q: Tensor, k: Tensor, v: Tensor, scale: float, diagonal: Tensor | None) -> Partial:
    """Attention over the keys of a piece, for several outputs that read the same ones of their heads.

    ``q`` (h, r, D), ``k`` (h, m, D), ``v`` (h, m, Dv); ``diagonal`` (r,): last of the keys that each query may read,
    where that matters.
    """
    dtype = stats_dtype(q.dtype)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    fused = q.device.type == "cpu" and q.dtype == dtype and v.shape[-1] == q.shape[-1] and diagonal is None
    if fused and not differentiable and q.numel() and not torch.compiler.is_compiling():
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], scale=scale)
        return Partial(lse[0], torch.ones_like(lse[0]), out[0])
    with exactly(q):
        scores = (q.to(dtype) * scale) @ k.to(dtype).transpose(-2, -1)
        if diagonal is not None:
            beyond = torch.arange(k.shape[1], device=q.device) > diagonal.unsqueeze(-1)
            scores = scores.masked_fill(beyond, float("-inf"))
        top = scores.detach().amax(-1)
        # A query none of whose keys stand here must not make -inf - -inf.
        reference = torch.where(torch.isinf(top), torch.zeros_like(top), top) if diagonal is not None else top
        e = torch.exp(scores - reference.unsqueeze(-1))
        return Partial(top, e.sum(-1), e @ v.to(dtype))


def _together(pieces: Sequence[Piece], problems: Sequence[Problem]) -> Iterator[list[Piece]]:
    """Runs of a worker's pieces that read the same keys for the same queries in neighbouring heads."""
    run: list[Piece] = []
    for piece in pieces:
        p = problems[piece.output]
        if run:
            before = problems[run[-1].output]
            same = p.sample == before.sample and p.rows == before.rows and p.head == before.head + 1
            if not (same and piece[1:] == run[-1][1:]):
                yield run
                run = []
        run.append(piece)
    if run:
        yield run


def split_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    tile: int | None = None,
    q_tile: int | None = None,
    workers: int | None = None,
    schedule: str = "stream-k",
    splits: int | None = None,
    backend: str | None = None,
) -> Partial:
    """Attention by a schedule, as a mergeable part; arguments as in :func:`split_decoding`.

    >>> q, k, v = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    >>> split_partial(q, k, v, tile=2, workers=3).den.shape
    torch.Size([1, 2, 1])
    """
    call = _prepare(
        q, k, v, lengths=lengths, causal=causal, scale=scale, tile=tile, q_tile=q_tile, workers=workers,
        schedule=schedule, splits=splits, partial=True,
    )  # fmt: skip
    result = OPERATOR.run(call, backend)
    assert isinstance(result, Partial)
    return result


@dataclass(frozen=True)
class _Call:
    """A checked problem with its schedule."""

    call: AttentionCall
    lengths: tuple[int, ...]
    causal: bool
    settings: tuple[Any, ...]

    def inputs(self) -> list[Tensor]:
        return self.call.inputs()

    @cached_property
    def dense(self) -> AttentionCall:
        """The same problem with the keys of each sample, and causality, as ``valid`` and a mask."""
        q, k = self.call.q, self.call.k
        length = torch.tensor(self.lengths, device=q.device)[:, None]
        key = torch.arange(k.shape[2], device=q.device)
        mask = None
        if self.causal:
            last = length - q.shape[2] + torch.arange(q.shape[2], device=q.device)
            mask = explicit((key <= last.unsqueeze(-1))[:, None])
        return replace(self.call, mask=mask, valid=key < length)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | Sequence[int] | None = None, causal: bool = False,
    scale: float | None = None, tile: int | None = None, q_tile: int | None = None, workers: int | None = None,
    schedule: str = "stream-k", splits: int | None = None, partial: bool = False,
) -> _Call:  # fmt: skip
    call = prepare(q, k, v, scale=scale, want="partial" if partial else "out")
    check_choice("schedule", schedule, SCHEDULES)
    batch, m = call.q.shape[0], call.k.shape[2]
    if lengths is None:
        numbers = [m] * batch
    elif isinstance(lengths, Tensor):
        check_whole("lengths", lengths)
        check_rank("lengths", lengths, 1, f"({batch},)")
        if lengths.is_meta:
            raise ValueError("lengths lies on meta, which holds no numbers; the schedule reads them")
        numbers = lengths.tolist()
    else:
        numbers = list(check_ints("lengths", lengths, least=0))
    check_flag("causal", causal)
    for name, value in (("tile", tile), ("q_tile", q_tile), ("workers", workers), ("splits", splits)):
        if value is not None:
            check_int(name, value, least=1)
    if len(numbers) != batch or any(not 0 <= n <= m for n in numbers):
        raise ValueError(f"lengths must name {batch} numbers of keys between 0 and {m}, got {numbers}")
    return _Call(call, tuple(numbers), causal, (tile, q_tile, workers, schedule, splits))


def _run(
    call: AttentionCall,
    ranges: Sequence[tuple[int, int]],
    causal: bool = False,
    tile: int | None = None,
    q_tile: int | None = None,
    workers: int | None = None,
    schedule: str = "stream-k",
    splits: int | None = None,
) -> Partial:
    check_choice("schedule", schedule, SCHEDULES)
    # The kernel of a piece takes it for granted that channels stand side by side.
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (call.q, call.k, call.v))
    if k.shape[1] != v.shape[1]:
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
    tile = TILE.get(q.shape[3], 128) if tile is None else tile
    workers = torch.get_num_threads() if workers is None else workers
    batch, heads, n, dim = q.shape
    groups = heads // k.shape[1]
    problems = split_problems(batch, k.shape[1], n, ranges, causal, q_tile)
    tiles = [-(-(p.stop - p.start) // tile) for p in problems]
    plan = stream_k(tiles, workers) if schedule == "stream-k" else fixed_split(tiles, workers, splits)

    grouped = q.reshape(batch, k.shape[1], groups, n, dim)
    parts: list[list[Partial]] = [[] for _ in problems]
    for pieces in plan.work:
        for run in _together(pieces, problems):
            p = problems[run[0].output]
            low, high = p.start + run[0].first * tile, min(p.stop, p.start + run[0].last * tile)
            some = slice(p.head, p.head + len(run))
            diagonal = None
            last = ranges[p.sample][1] - n  # of the first query
            if causal and last + p.rows.start < high - 1:
                diagonal = (torch.arange(p.rows.start, p.rows.stop, device=q.device) + last - low).repeat(groups)
            part = _piece(
                grouped[p.sample, some, :, p.rows].flatten(1, 2), k[p.sample, some, low:high],
                v[p.sample, some, low:high], call.scale, diagonal,
            )  # fmt: skip
            for piece, *fields in zip(run, *part, strict=True):
                parts[piece.output].append(Partial(*fields))
    merged = []
    for p, held in zip(problems, parts, strict=True):
        if not held:
            held = [_nothing(groups * (p.rows.stop - p.rows.start), v)]
        merged.append(held[0].merge(*held[1:]) if len(held) > 1 else held[0])
    return _assembled(merged, problems, batch, k.shape[1], groups, n, v)


def _nothing(rows: int, v: Tensor) -> Partial:
    empty = v.new_zeros(rows, dtype=stats_dtype(v.dtype))
    return Partial(empty - float("inf"), empty, v.new_zeros(rows, v.shape[-1], dtype=empty.dtype))


def _assembled(
    merged: list[Partial], problems: list[Problem], batch: int, heads: int, groups: int, n: int, v: Tensor
) -> Partial:
    """Parts of the outputs as one part (B, H, N)."""
    if not problems:
        shape, dtype = (batch, heads * groups, n), stats_dtype(v.dtype)
        empty = v.new_zeros(shape, dtype=dtype)
        return Partial(empty - float("inf"), empty, v.new_zeros(*shape, v.shape[-1], dtype=dtype))
    blocks = len(problems) // (batch * heads)
    fields = []
    for index in range(3):
        columns = []
        for block in range(blocks):
            chosen = [x[index] for b in range(batch) for x in merged[(b * blocks + block) * heads :][:heads]]
            columns.append(torch.stack(chosen).unflatten(1, (groups, -1)).unflatten(0, (batch, heads)).flatten(1, 2))
        fields.append(torch.cat(columns, 2) if blocks > 1 else columns[0])
    return Partial(*fields)


def split_decoding(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    causal: bool = False,
    scale: float | None = None,
    tile: int | None = None,
    q_tile: int | None = None,
    workers: int | None = None,
    schedule: str = "stream-k",
    splits: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Exact softmax attention of few queries over many keys, by a schedule.

    Args:
        q: (B, Hq, N, D) queries; those of a key head share its tiles.
        k: (B, Hk, M, D) keys.
        v: (B, Hv, M, Dv) values.
        lengths: keys of each sample, the first of M; all by default.
        causal: query ``i`` of ``N`` reads keys up to ``length - N + i``: the queries are the last tokens.
        scale: defaults to ``D ** -0.5``.
        tile: keys per tile; by default 256 for ``D = 64``, otherwise 128.
        q_tile: queries per output; all by default. Causal blocks of queries end at their diagonal.
        workers: pieces that the work is cut into; torch's threads by default.
        schedule: ``"stream-k"`` or ``"fixed"``.
        splits: pieces per output of the fixed schedule.
        backend: ``"triton"``, kernels for CUDA (extra ``triton``; they cut keys evenly, by ``splits`` where given);
            ``"split"``, the schedule, else by default; or a backend of :func:`attnlib.attention` on the dense
            problem (``"eager"`` is the specification).

    Returns:
        (B, Hq, N, Dv). A sample without keys gives zeros.

    Raises:
        ValueError: lengths beyond the keys, an unknown schedule, sizes below 1.

    Reference: Sanovar et al., 2024, arXiv 2405.10480, algorithm 2.

    >>> q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    >>> split_decoding(q, k, v, lengths=[50, 7], tile=4, workers=3).shape
    torch.Size([2, 4, 1, 8])
    """
    call = _prepare(
        q, k, v, lengths=lengths, causal=causal, scale=scale, tile=tile, q_tile=q_tile, workers=workers,
        schedule=schedule, splits=splits,
    )  # fmt: skip
    return OPERATOR.run(call, backend)


def _scheduled(problem: _Call) -> Tensor | Partial:
    def run(call: AttentionCall) -> Tensor | Partial:
        part = _run(call, [(0, n) for n in problem.lengths], problem.causal, *problem.settings)
        return part if call.want == "partial" else part.finish().to(call.q.dtype)

    # A piece holds keys of its sample only; which of them a query may read matters when it is causal.
    return guarded(run, problem.call, lambda: problem.dense)


# ``attention`` adds its backends, which then run on the dense problem.
OPERATOR = Operator("split_decoding", _prepare, entries={"split_partial": {"partial": True}})
decoding.register(OPERATOR)
OPERATOR.register("split", _scheduled, transforms="it reads how many keys each sample has")


# --------------------------------------------------------------------------------------------------------------------
# As a backend of ``attention``

#: Elements of keys and values that have to be spared before reading samples one by one pays.
PAYS = 1 << 22


def _ranges(valid: Tensor) -> list[tuple[int, int]] | None:
    """First and last (exclusive) key of each sample; ``None`` when some sample's keys do not stand together."""
    m = valid.shape[1]
    count, first = valid.sum(1), valid.to(torch.uint8).argmax(1)
    last = m - valid.flip(1).to(torch.uint8).argmax(1)
    if bool(((last - first != count) & (count > 0)).any()):
        return None
    first = torch.where(count > 0, first, 0)
    return list(zip(first.tolist(), (first + count).tolist(), strict=True))


def _traced(call: AttentionCall) -> bool:
    tensors = [t for t in (call.q, call.k, call.v, call.valid) if t is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta" for t in tensors)
    return torch.compiler.is_compiling() or not plain


def register(operator: Operator) -> None:
    operator.register(
        "split", run, supports=supports, prefers=prefers, transforms="it reads how many keys each sample has"
    )


def supports(call: AttentionCall) -> str | None:
    """Why the split schedule cannot serve the call; ``None`` when it can."""
    if not call.plain_softmax:
        return f"its normalizer is {call.normalizer.name}, merging parts needs softmax"
    if call.want == "weights":
        return "parts of the keys do not give whole rows of weights"
    if call.mask is not None or call.bias is not None:
        return "it takes no mask or bias, only which keys of a sample exist"
    if call.dropout_p:
        return "it has no dropout"
    if _traced(call):
        return "it reads how many keys each sample has, which cannot be traced"
    if call.valid is not None and _ranges(call.valid) is None:
        return "the keys of a sample do not stand together"
    return None


def prefers(call: AttentionCall) -> str | None:
    """Why the automatic choice passes over this backend; ``None`` when it is the right one.

    It reads the keys that exist and no others, a sample at a time. That pays for few queries over long samples of
    unlike length, where another backend would read padding.
    """
    if device_kind(call.q) != "cpu":
        return "lengths would have to come from the device first, and there is no kernel for its schedule there"
    if call.valid is None:
        return "every sample has all keys"
    if _traced(call):
        return "lengths cannot be traced"
    if call.q.shape[2] * (call.heads // call.k.shape[1]) > 32:
        return "there are many queries per key head"
    size = call.k.shape[1] * call.k.shape[3] + call.v.shape[1] * call.v.shape[3]
    if call.valid.numel() * size < PAYS:
        return f"keys and values have fewer than {PAYS} elements"
    missing = call.valid.numel() - int(call.valid.sum())
    if missing * size < PAYS or missing * 3 < call.valid.numel():
        return "too few keys are missing to read samples one by one"
    return None


def run(call: AttentionCall) -> Tensor | Partial:
    """(B, H, N, Dv), or a :class:`Partial`. Samples take turns here, so nothing is cut further."""
    m = call.k.shape[2]
    ranges = [(0, m)] * call.q.shape[0] if call.valid is None else _ranges(call.valid)
    assert ranges is not None
    part = _run(call, ranges, tile=max(m, 1), workers=1)
    return part if call.want == "partial" else part.finish().to(call.q.dtype)
