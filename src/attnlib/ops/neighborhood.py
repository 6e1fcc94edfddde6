"""Engine A, grid-local attention: a window around every query of a grid, in one to three dimensions.

Along one axis a window is described by its kernel, dilation, stride and causality (:class:`AxisRule`). The fast path
cuts every axis into tiles of queries; the windows of a tile lie in one box of keys. Tiles whose windows look alike
relative to the tile form a class (along an undilated axis of a large grid: the first, the inner ones and the last), so
that one small mask and one small bias serve every tile of a class, and the class is a batch of dense attentions.
Work and memory are O(N). The specification (``backend="eager"``) is dense attention under a mask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import masks
from ..grids import coordinates
from ..masks import Mask, as_mask
from ..types import Partial, check_choice, check_rank, check_valid, to_tuple
from .attention import attention, attention_partial
from .partition import forced_eager, grouped_attention, pair_mask

BORDERS = ("clamp", "mask", "zero")

# Cost of the tiled path in units of one (query, key) pair: fetching one key, and starting one class of tiles.
_ROW_COST, _CLASS_COST = 40, 15000


class AxisRule(NamedTuple):
    """How windows lie along one axis of ``length`` tokens. Tokens meet only within their residue modulo ``dilation``.

    In units of ``dilation``: queries ``stride`` by ``stride`` share the window of their leader, which is ``kernel``
    wide (with even ``kernel`` the extra key is on the left). ``border`` says what happens where a window leaves the
    grid: ``"clamp"`` shifts it back inside, so that every query sees ``kernel`` keys; ``"mask"`` cuts it off;
    ``"zero"`` keeps it, with zero keys and values outside. Causal windows end at the query and are never shifted.
    """

    length: int
    kernel: int
    dilation: int = 1
    stride: int = 1
    causal: bool = False
    border: str = "clamp"

    def group_length(self, group: int) -> int:
        """Tokens in residue class ``group``."""
        return self.length // self.dilation + (group < self.length % self.dilation)

    def window(self, i: int, length: int) -> tuple[int, int]:
        """First and last key (inclusive) of query ``i`` in a residue class of ``length`` tokens."""
        w, s, clamp = self.kernel, self.stride, self.border == "clamp"
        if self.causal:
            leader = min(i // s * s + s - 1, length - 1) if clamp else i // s * s + s - 1
            first = leader - w + 1
            return (first if self.border == "zero" else max(first, 0)), i
        left, right = w // 2, (w - 1) // 2
        leader = i // s * s + s // 2
        if clamp:
            centre = min(max(min(leader, length - 1), left), length - 1 - right)
            return centre - left, centre + right
        if self.border == "mask":
            return max(leader - left, 0), min(leader + right, length - 1)
        return leader - left, leader + right


class TileClass(NamedTuple):
    """Tiles of one axis whose windows look alike. Positions are token numbers; steps are ``dilation``."""

    q_starts: tuple[int, ...]
    q_size: int
    k_starts: tuple[int, ...]
    k_size: int
    first: tuple[int, ...]  # of each query: first key of its window, counted from the box
    last: tuple[int, ...]
    shift: int  # start of the box minus start of the tile, in dilated units


@lru_cache(maxsize=1024)
def _tile_classes(rule: AxisRule, tile: int) -> tuple[TileClass, ...]:
    found: dict[tuple[Any, ...], tuple[list[int], list[int]]] = {}
    d = rule.dilation
    for group in range(d):
        length = rule.group_length(group)
        for start in range(0, length, tile):
            windows = [rule.window(i, length) for i in range(start, min(start + tile, length))]
            low, high = min(w[0] for w in windows), max(w[1] for w in windows)
            look = (tuple(w[0] - low for w in windows), tuple(w[1] - low for w in windows), high - low + 1, low - start)
            q_starts, k_starts = found.setdefault(look, ([], []))
            q_starts.append(group + start * d)
            k_starts.append(group + low * d)
    return tuple(
        TileClass(tuple(q), len(first), tuple(k), size, first, last, shift)
        for (first, last, size, shift), (q, k) in found.items()
    )


def _axis_costs(rule: AxisRule) -> list[tuple[int, int, int, int]]:
    """``(tile, pairs, keys fetched, classes)`` for each tile size worth trying."""
    longest = rule.group_length(0)
    tiles = set()
    for wish in (4, 8, 16, 32, 64, 128, 256, 512, longest):
        count = -(-longest // min(wish, longest))
        even = -(-longest // count)
        tiles.add(min(longest, -(-even // rule.stride) * rule.stride))
    out = []
    for tile in sorted(tiles):
        count = -(-longest // tile) * rule.dilation
        reach = tile - 1 if rule.causal else (-(-tile // rule.stride) - 1) * rule.stride
        box = reach + rule.kernel if rule.border == "zero" else min(longest, reach + rule.kernel)
        out.append((tile, count * tile * box, count * box, min(3, -(-longest // tile))))
    return out


@lru_cache(maxsize=1024)
def _choose_tile(rules: tuple[AxisRule, ...]) -> tuple[int, ...]:
    def cost(choice: tuple[tuple[int, int, int, int], ...]) -> int:
        pairs, keys, classes = (math.prod(c[i] for c in choice) for i in (1, 2, 3))
        return pairs + _ROW_COST * keys + _CLASS_COST * classes

    best = min(itertools.product(*(_axis_costs(rule) for rule in rules)), key=cost)
    return tuple(c[0] for c in best)


@torch.compiler.assume_constant_result
def _plan(settings: tuple[tuple[Any, ...], ...], tile: tuple[int, ...] | None) -> tuple[tuple[TileClass, ...], ...]:
    rules = tuple(AxisRule(*s) for s in settings)
    return tuple(_tile_classes(rule, t) for rule, t in zip(rules, tile or _choose_tile(rules), strict=True))


# --------------------------------------------------------------------------------------------------------------------
# The fast path


def _numbers(starts: tuple[int, ...], size: int, step: int, device: torch.device) -> Tensor:
    """(tiles, size) token numbers."""
    return torch.tensor(starts, device=device)[:, None] + step * torch.arange(size, device=device)


def _fetch(t: Tensor, dim: int, starts: tuple[int, ...], size: int, step: int) -> Tensor:
    """Tiles of ``size`` tokens along ``dim``, one after the other; a view when they lie so already."""
    if step == 1 and all(b - a == size for a, b in itertools.pairwise(starts)):
        return t.narrow(dim, starts[0], size * len(starts))
    return t.index_select(dim, _numbers(starts, size, step, t.device).flatten())


def _fold_tiles(t: Tensor, tiles: list[int], sizes: list[int]) -> Tensor:
    """(B, H, tiles_1 * size_1, ..., C) -> (B, G, H, S, C)."""
    r = len(tiles)
    t = t.reshape(*t.shape[:2], *(n for pair in zip(tiles, sizes, strict=True) for n in pair), t.shape[-1])
    t = t.permute(0, *range(2, 2 * r + 2, 2), 1, *range(3, 2 * r + 3, 2), 2 * r + 2)
    return t.reshape(t.shape[0], math.prod(tiles), t.shape[r + 1], math.prod(sizes), t.shape[-1])


def _unfold_tiles(t: Tensor, tiles: list[int], sizes: list[int]) -> Tensor:
    """Inverse of :func:`_fold_tiles`."""
    r = len(tiles)
    t = t.reshape(t.shape[0], *tiles, t.shape[2], *sizes, t.shape[-1])
    t = t.permute(0, r + 1, *(d for a in range(r) for d in (1 + a, r + 2 + a)), 2 * r + 2)
    return t.reshape(*t.shape[:2], *(n * s for n, s in zip(tiles, sizes, strict=True)), t.shape[-1])


def _outer(parts: list[Tensor], dims: int, combine: Any) -> Tensor:
    """Combine one tensor per axis, each with ``dims`` axes, into one whose axes are flattened products."""
    r = len(parts)
    total = None
    for axis, part in enumerate(parts):
        shape = [1] * (dims * r)
        for i in range(dims):
            shape[i * r + axis] = part.shape[i]
        part = part.reshape(shape)
        total = part if total is None else combine(total, part)
    assert total is not None
    for i in range(dims):
        total = total.flatten(i, i + r - 1)
    return total


class _Problem(NamedTuple):
    """Everything a class of tiles needs besides the tensors that are cut along the grid."""

    plan: tuple[tuple[TileClass, ...], ...]
    rules: tuple[AxisRule, ...]
    pads: tuple[int, ...]
    table: Tensor | None
    extra: tuple[Tensor, Tensor, Tensor | None] | None
    extra_pos: Tensor | None
    mask: Mask | None
    offset: int
    partial: bool
    options: dict[str, Any]


def _table_bias(problem: _Problem, chosen: list[TileClass]) -> Tensor:
    """(1, 1, H, Sq, Sk): the relative table read at ``key - query + kernel - 1``."""
    table = problem.table
    assert table is not None
    r = len(chosen)
    shape = [table.shape[0]]
    for axis, (c, rule) in enumerate(zip(chosen, problem.rules, strict=True)):
        step = torch.arange(c.k_size, device=table.device) - torch.arange(c.q_size, device=table.device)[:, None]
        index = (step + c.shift + rule.kernel - 1).clamp(0, 2 * rule.kernel - 2)
        table = table.index_select(1 + axis, index.flatten())
        shape += [c.q_size, c.k_size]
    order = [0, *range(1, 2 * r + 1, 2), *range(2, 2 * r + 2, 2)]
    area = [math.prod([c.q_size for c in chosen]), math.prod([c.k_size for c in chosen])]
    return table.reshape(shape).permute(order).reshape(1, 1, table.shape[0], *area)


def _axis_bias(problem: _Problem, chosen: list[TileClass], factors: list[Tensor]) -> Tensor:
    """(B, G, H, Sq, Sk): per-query factors (B, G, H, Sq, 2 * kernel - 1) of each axis, read at ``key - query``."""
    total: Tensor | None = None
    sizes = [c.q_size for c in chosen]
    for axis, (c, rule, factor) in enumerate(zip(chosen, problem.rules, factors, strict=True)):
        step = torch.arange(c.k_size, device=factor.device) - torch.arange(c.q_size, device=factor.device)[:, None]
        index = (step + c.shift + rule.kernel - 1).clamp(0, 2 * rule.kernel - 2)
        shape = [1] * len(chosen) + [c.k_size]
        shape[axis] = c.q_size
        index = index.reshape(shape).expand(*sizes, c.k_size).flatten(0, -2)
        part = factor.gather(-1, index.expand(*factor.shape[:-1], c.k_size))
        shape = [1] * len(chosen)
        shape[axis] = c.k_size
        part = part.unflatten(-1, shape)
        total = part if total is None else total + part
    assert total is not None
    return total.flatten(-len(chosen))


def _run_class(problem: _Problem, chosen: list[TileClass], queries: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
    """Attention of all tiles of one class; returns fields (B, H, *tokens, C)."""
    tiles = [len(c.q_starts) for c in chosen]
    q_sizes, k_sizes = [c.q_size for c in chosen], [c.k_size for c in chosen]
    q, *factors = (_fold_tiles(t, tiles, q_sizes) for t in queries)
    k, v, *flags = (_fold_tiles(t, tiles, k_sizes) for t in keys)
    device = q.device
    valid = flags[0][:, :, 0, :, 0] if flags else None
    allowed: Tensor | None = None
    if any(min(c.last) < c.k_size - 1 or max(c.first) > 0 for c in chosen):
        inside = []
        for c in chosen:
            j = torch.arange(c.k_size, device=device)
            first, last = (torch.tensor(t, device=device)[:, None] for t in (c.first, c.last))
            inside.append((j >= first) & (j <= last))
        allowed = _outer(inside, 2, torch.logical_and)[None, None, None]
    q_pos = k_pos = outside = None
    if problem.mask is not None:
        weight = [math.prod(r.length for r in problem.rules[a + 1 :]) for a in range(len(chosen))]
        q_parts, k_parts, off = [], [], []
        for c, rule, w in zip(chosen, problem.rules, weight, strict=True):
            q_parts.append(_numbers(c.q_starts, c.q_size, rule.dilation, device) * w)
            place = _numbers(c.k_starts, c.k_size, rule.dilation, device)
            off.append((place < 0) | (place >= rule.length))
            k_parts.append(place.clamp(0, rule.length - 1) * w)
        q_pos = _outer(q_parts, 2, torch.add) + problem.offset
        k_pos = _outer(k_parts, 2, torch.add) + problem.offset
        outside = _outer(off, 2, torch.logical_or)
        pairs = pair_mask(problem.mask, q_pos, k_pos) | outside[None, :, None, None, :]
        allowed = pairs if allowed is None else allowed & pairs
    bias = None
    if problem.table is not None:
        bias = _table_bias(problem, chosen)
    if factors:
        per_query = _axis_bias(problem, chosen, factors)
        bias = per_query if bias is None else bias + per_query
    if problem.extra is not None:
        extra_k, extra_v, extra_valid = problem.extra
        more = extra_k.shape[2]
        groups = k.shape[1]
        k = torch.cat([k, extra_k.to(k.dtype)[:, None].expand(-1, groups, -1, -1, -1)], 3)
        v = torch.cat([v, extra_v.to(v.dtype)[:, None].expand(-1, groups, -1, -1, -1)], 3)
        if allowed is not None:
            allowed = F.pad(allowed, (0, more), value=True)
        if problem.mask is not None:
            assert allowed is not None and q_pos is not None and problem.extra_pos is not None
            pairs = pair_mask(problem.mask, q_pos, problem.extra_pos.expand(q_pos.shape[0], -1))
            lead = torch.broadcast_shapes(allowed.shape[:-1], pairs.shape[:-1])
            known = torch.ones(*lead, allowed.shape[-1] - more, dtype=torch.bool, device=device)
            allowed = allowed & torch.cat([known, pairs.expand(*lead, more)], -1)
        if bias is not None:
            bias = F.pad(bias, (0, more))
        if valid is not None or extra_valid is not None:
            if valid is None:
                valid = torch.ones(k.shape[0], groups, k.shape[3] - more, dtype=torch.bool, device=device)
            if extra_valid is None:
                extra_valid = torch.ones(k.shape[0], more, dtype=torch.bool, device=device)
            valid = torch.cat([valid, extra_valid[:, None].expand(-1, groups, -1)], 2)
    out = grouped_attention(
        q, k, v, allowed=allowed, valid=valid, bias=bias, partial=problem.partial, **problem.options
    )
    fields = [out.log_scale.unsqueeze(-1), out.den.unsqueeze(-1), out.num] if isinstance(out, Partial) else [out]
    return [_unfold_tiles(t, tiles, q_sizes) for t in fields]


def _run_axis(problem: _Problem, chosen: list[TileClass], queries: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
    """Cut axis ``len(chosen)`` into its classes of tiles, run each, and put the outputs in order again."""
    axis = len(chosen)
    if axis == len(problem.rules):
        return _run_class(problem, chosen, queries, keys)
    rule, pad, dim = problem.rules[axis], problem.pads[axis], 2 + axis
    parts = []
    for c in problem.plan[axis]:
        k_starts = tuple(s + pad for s in c.k_starts)
        q_part = [_fetch(t, dim, c.q_starts, c.q_size, rule.dilation) for t in queries]
        k_part = [_fetch(t, dim, k_starts, c.k_size, rule.dilation) for t in keys]
        parts.append(_run_axis(problem, [*chosen, c], q_part, k_part))
    order = [s + i * rule.dilation for c in problem.plan[axis] for s in c.q_starts for i in range(c.q_size)]
    fields = [torch.cat(field, dim) if len(field) > 1 else field[0] for field in zip(*parts, strict=True)]
    if order == list(range(rule.length)):
        return fields
    inverse = [0] * len(order)
    for place, number in enumerate(order):
        inverse[number] = place
    index = torch.tensor(inverse, device=fields[0].device)
    return [t.index_select(dim, index) for t in fields]


def _tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[AxisRule, ...],
    tile: tuple[int, ...] | None,
    valid: Tensor | None,
    axis_bias: Sequence[Tensor] | None,
    **rest: Any,
) -> list[Tensor]:
    plan = _plan(tuple(tuple(rule) for rule in rules), tile)
    keys = [k, v]
    pads = [0] * len(rules)
    if valid is not None:
        keys.append(valid[:, None, ..., None])
    if rules[0].border == "zero":
        widths: list[int] = []
        for axis, (rule, classes) in enumerate(zip(rules, plan, strict=True)):
            low = min(min(c.k_starts) for c in classes)
            high = max(max(c.k_starts) + (c.k_size - 1) * rule.dilation for c in classes)
            pads[axis] = max(0, -low)
            widths = [max(0, -low), max(0, high - rule.length + 1), *widths]
        # Tokens outside the grid exist: that is what keeps their zero keys under the softmax.
        keys = [F.pad(t, (0, 0, *widths), value=int(t.dtype == torch.bool)) for t in keys]
    problem = _Problem(plan=plan, rules=rules, pads=tuple(pads), **rest)
    return _run_axis(problem, [], [q, *(axis_bias or ())], keys)


# --------------------------------------------------------------------------------------------------------------------
# The specification


def _spec_keys(
    k: Tensor, v: Tensor, rules: tuple[AxisRule, ...], valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[int, ...]]:
    """Flat keys and values of the specification (with a halo of zeros if need be), validity, coordinates, grid."""
    grid = tuple(r.length for r in rules)
    if rules[0].border != "zero":
        return k.flatten(2, -2), v.flatten(2, -2), valid, coordinates(grid, k.device), grid
    halo = [(r.kernel + r.stride) * r.dilation for r in rules]
    widths = [w for h in reversed(halo) for w in (h, h)]
    k, v = F.pad(k, (0, 0, *widths)), F.pad(v, (0, 0, *widths))
    if valid is not None:
        valid = F.pad(valid.unflatten(1, grid), widths, value=True).flatten(1)
    place = coordinates(k.shape[2:-1], k.device) - torch.tensor(halo, device=k.device)
    return k.flatten(2, -2), v.flatten(2, -2), valid, place, grid


def _spec_allowed(rules: tuple[AxisRule, ...], places: Tensor, device: torch.device) -> Tensor:
    """(N, K): the rule for every pair; ``places`` (K, r) are coordinates of keys, which may lie outside the grid."""
    grid = tuple(r.length for r in rules)
    if rules[0].border == "clamp":
        columns = [[getattr(r, name) for r in rules] for name in ("kernel", "dilation", "stride", "causal")]
        return masks.neighborhood(grid, *columns).dense(math.prod(grid), device=device)
    here = coordinates(grid, device)
    allowed = torch.ones(here.shape[0], places.shape[0], dtype=torch.bool, device=device)
    for axis, r in enumerate(rules):
        x, y = here[:, axis, None], places[None, :, axis]
        i, j = x // r.dilation, y // r.dilation
        if r.causal:
            first, last = i // r.stride * r.stride + r.stride - r.kernel, i
        else:
            first = i // r.stride * r.stride + r.stride // 2 - r.kernel // 2
            last = first + r.kernel - 1
        allowed &= (x % r.dilation == y % r.dilation) & (j >= first) & (j <= last)
    return allowed


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: tuple[AxisRule, ...],
    valid: Tensor | None,
    axis_bias: Sequence[Tensor] | None,
    *,
    table: Tensor | None,
    extra: tuple[Tensor, Tensor, Tensor | None] | None,
    extra_pos: Tensor | None,
    mask: Mask | None,
    offset: int,
    partial: bool,
    options: dict[str, Any],
) -> list[Tensor]:
    device, lead = q.device, q.shape[2:-1]
    k, v, valid, places, grid = _spec_keys(k, v, rules, None if valid is None else valid.flatten(1))
    allowed = _spec_allowed(rules, places, device)
    here = coordinates(grid, device)
    if mask is not None:
        size = torch.tensor(grid, device=device)
        inside = ((places >= 0) & (places < size)).all(-1)
        weight = torch.tensor([math.prod(grid[a + 1 :]) for a in range(len(grid))], device=device)
        number = (torch.minimum(places.clamp(min=0), size - 1) * weight).sum(-1)
        allowed = allowed & (mask.at(torch.arange(here.shape[0], device=device) + offset, number + offset) | ~inside)
    bias: Tensor | None = None
    steps = []
    for axis, r in enumerate(rules):
        step = places[None, :, axis] // r.dilation - here[:, None, axis] // r.dilation + r.kernel - 1
        steps.append(step.clamp(0, 2 * r.kernel - 2))
    if table is not None:
        extents = [2 * r.kernel - 1 for r in rules]
        index = torch.zeros_like(steps[0])
        for step, extent in zip(steps, extents, strict=True):
            index = index * extent + step
        bias = table.flatten(1)[:, index][None]
    for step, factor in zip(steps, axis_bias or (), strict=False):
        flat = factor.flatten(2, -2)
        part = flat.gather(-1, step.expand(*flat.shape[:3], -1))
        bias = part if bias is None else bias + part
    if extra is not None:
        extra_k, extra_v, extra_valid = extra
        more = extra_k.shape[2]
        seen = torch.ones(*allowed.shape[:-1], more, dtype=torch.bool, device=device)
        if mask is not None:
            assert extra_pos is not None
            seen = seen & mask.at(torch.arange(here.shape[0], device=device) + offset, extra_pos)
        allowed = torch.cat([allowed.expand(*seen.shape[:-1], -1), seen], -1)
        if valid is not None or extra_valid is not None:
            ones = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=device)
            others = torch.ones(k.shape[0], more, dtype=torch.bool, device=device)
            valid = torch.cat([ones if valid is None else valid, others if extra_valid is None else extra_valid], 1)
        k, v = torch.cat([k, extra_k], 2), torch.cat([v, extra_v], 2)
        bias = None if bias is None else F.pad(bias, (0, more))
    call: dict[str, Any] = dict(mask=allowed, valid=valid, bias=bias, scale=options["scale"], backend="eager")
    if partial:
        seen_part = attention_partial(q.flatten(2, -2), k, v, **call)
        fields = [seen_part.log_scale.unsqueeze(-1), seen_part.den.unsqueeze(-1), seen_part.num]
    else:
        fields = [attention(q.flatten(2, -2), k, v, dropout_p=options["dropout_p"], **call)]
    return [t.unflatten(2, lead) for t in fields]


# --------------------------------------------------------------------------------------------------------------------
# The operator


def axis_rules(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    border: str = "clamp",
) -> tuple[AxisRule, ...]:
    """One checked :class:`AxisRule` per axis of ``grid``.

    Raises:
        ValueError: kernels below 2 (1 unless clamped), windows that do not fit a clamped grid, a stride beyond the
            kernel, settings for another number of axes.

    >>> axis_rules((8, 8), 3, dilation=(1, 2))[1].window(0, 4)
    (0, 2)
    """
    grid = tuple(int(s) for s in grid)
    check_choice("border", border, BORDERS)
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid must have 1 to 3 axes, got {grid}")
    kernel = to_tuple("kernel_size", kernel_size, len(grid))
    steps = to_tuple("dilation", dilation, len(grid))
    strides = to_tuple("stride", stride, len(grid))
    flags = to_tuple("causal", causal, len(grid))
    for name, values in (("kernel_size", kernel), ("dilation", steps), ("stride", strides)):
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in values):
            raise ValueError(f"{name} must be an integer or one per axis, got {values}")
    if min(steps) < 1:
        raise ValueError(f"dilation must be at least 1, got {steps}")
    if border == "clamp":
        masks.neighborhood(grid, kernel, steps, strides, flags)  # its checks are ours
    for axis, (w, s) in enumerate(zip(kernel, strides, strict=True)):
        if w < 1 or not 1 <= s <= w:
            raise ValueError(f"on axis {axis}: kernel_size={w} must be at least 1, stride={s} from 1 to {w}")
    return tuple(
        AxisRule(x, w, d, s, bool(c), border) for x, w, d, s, c in zip(grid, kernel, steps, strides, flags, strict=True)
    )


def _check_extra(
    extra_k: Tensor | None, extra_v: Tensor | None, extra_valid: Tensor | None, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    if extra_k is None and extra_v is None:
        if extra_valid is not None:
            raise ValueError("extra_valid was given without extra_k and extra_v")
        return None
    if extra_k is None or extra_v is None:
        raise ValueError("extra_k and extra_v belong together; one of them is None")
    for name, t, like in (("extra_k", extra_k, k), ("extra_v", extra_v, v)):
        check_rank(name, t, 4, "(B, H, M, D)")
        if t.shape[:2] != like.shape[:2] or t.shape[3] != like.shape[-1]:
            raise ValueError(
                f"{name} must be {(*like.shape[:2], 'M', like.shape[-1])} like {name[-1]}, got {tuple(t.shape)}"
            )
    if extra_k.shape[2] != extra_v.shape[2]:
        raise ValueError(f"extra_k has {extra_k.shape[2]} tokens, extra_v has {extra_v.shape[2]}; they must agree")
    check_valid("extra_valid", extra_valid, (k.shape[0], extra_k.shape[2]))
    return extra_k, extra_v, extra_valid


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int] | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    stride: int | Sequence[int],
    causal: bool | Sequence[bool],
    border: str,
    bias_table: Tensor | None,
    axis_bias: Sequence[Tensor] | None,
    extra: tuple[Tensor | None, Tensor | None, Tensor | None],
    valid: Tensor | None,
    mask: Mask | Tensor | None,
    offset: int,
    extra_pos: Tensor | None,
    scale: float | None,
    dropout_p: float,
    tile: int | Sequence[int] | None,
    backend: str | None,
    partial: bool,
) -> list[Tensor]:
    shapes = "(B, H, *grid, D) with 1 to 3 axes, or (B, H, N, D) with grid"
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_rank(name, t, (4, 5, 6), shapes)
    if grid is None:
        grid = tuple(q.shape[2:-1])
    grid = tuple(int(s) for s in grid)
    flat = q.dim() == 4 and len(grid) > 1
    for name, t in (("q", q), ("k", k), ("v", v)):
        if tuple(t.shape[2:-1]) not in (grid, (math.prod(grid),)):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, which does not lie on the grid {grid}; {shapes}")
    rules = axis_rules(grid, kernel_size, dilation, stride, causal, border)
    q, k, v = (t.reshape(*t.shape[:2], *grid, t.shape[-1]) for t in (q, k, v))
    if valid is not None:
        shape = (q.shape[0], math.prod(grid)) if valid.dim() == 2 and len(grid) > 1 else (q.shape[0], *grid)
        check_valid("valid", valid, shape)
        valid = valid.reshape(q.shape[0], *grid)
    extents = [2 * r.kernel - 1 for r in rules]
    if bias_table is not None:
        if bias_table.dim() == 2 and len(grid) > 1 and bias_table.shape[1] == math.prod(extents):
            bias_table = bias_table.unflatten(1, extents)
        if tuple(bias_table.shape) != (q.shape[1], *extents):
            raise ValueError(
                f"bias_table must be {(q.shape[1], *extents)} for {q.shape[1]} heads and kernel_size="
                f"{tuple(r.kernel for r in rules)}, got {tuple(bias_table.shape)}"
            )
    if axis_bias is not None:
        want = [(*q.shape[:2], *grid, e) for e in extents]
        if [tuple(f.shape) for f in axis_bias] != want:
            raise ValueError(f"axis_bias must be tensors of shapes {want}, got {[tuple(f.shape) for f in axis_bias]}")
    more = _check_extra(*extra, k, v)
    mask = as_mask(mask)
    if mask is not None and more is not None and (extra_pos is None or extra_pos.shape != (more[0].shape[2],)):
        raise ValueError("with a mask and extra keys, extra_pos must give the (M,) positions of the extra keys")
    if backend is not None and backend not in ("eager", "tiles"):
        raise ValueError(f"backend={backend!r} is not possible; choose one of ['eager', 'tiles'] or None")
    rest: dict[str, Any] = dict(
        table=bias_table, extra=more, extra_pos=extra_pos, mask=mask, offset=offset, partial=partial,
        options=dict(scale=scale, dropout_p=dropout_p),
    )  # fmt: skip
    if backend != "tiles" and forced_eager(backend):
        fields = _eager(q, k, v, rules, valid, axis_bias, **rest)
    else:
        chosen = None if tile is None else to_tuple("tile", tile, len(grid))
        if chosen is not None and any(not isinstance(t, int) or t < 1 for t in chosen):
            raise ValueError(f"tile={chosen} must hold integers of at least 1")
        fields = _tiles(q, k, v, rules, chosen, valid, axis_bias, **rest)
    return [t.flatten(2, -2) for t in fields] if flat or partial else fields


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int] | None = None,
    kernel_size: int | Sequence[int] = 7,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    border: str = "clamp",
    bias_table: Tensor | None = None,
    axis_bias: Sequence[Tensor] | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_valid: Tensor | None = None,
    valid: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    offset: int = 0,
    extra_pos: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    tile: int | Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every query of a grid attends to the ``kernel_size`` keys around it, in one to three dimensions.

    Args:
        q: (B, H, *grid, D) queries, or (B, H, N, D) with ``grid``.
        k: (B, Hk, *grid, D) keys, ``H % Hk == 0``.
        v: (B, Hv, *grid, Dv) values.
        grid: the grid, when the tensors are flat.
        kernel_size: keys per axis; on clamped axes at least 2.
        dilation: tokens between neighbouring keys of a window, per axis.
        stride: this many queries in a row share the window of their leader, per axis.
        causal: the window ends at the query, per axis.
        border: where a window leaves the grid: ``"clamp"`` shifts it inside, so that every query of a bidirectional
            axis sees exactly ``kernel_size`` keys; ``"mask"`` cuts it off; ``"zero"`` keeps zero keys and values.
        bias_table: (H, *(2 * kernel - 1)) added at ``key - query + kernel - 1``, in units of dilation.
        axis_bias: per axis (B, H, *grid, 2 * kernel - 1), the same read per query: query-dependent relative positions.
        extra_k: (B, Hk, M, D) keys that every query attends to besides, such as class or text tokens.
        extra_v: (B, Hv, M, Dv) their values.
        extra_valid: (B, M) boolean, which of them exist.
        valid: (B, *grid) or (B, N) boolean, which keys exist.
        mask: which pairs may meet besides, on row-major token numbers plus ``offset``.
        offset: position of the first token of the grid, as ``mask`` sees it.
        extra_pos: (M,) positions of the extra keys, as ``mask`` sees them.
        scale: defaults to ``D ** -0.5``.
        dropout_p: dropout of weights.
        tile: queries per tile and axis; chosen from the shape by default.
        backend: ``"tiles"``, O(N); ``"eager"``, the specification: dense attention under a mask; ``None``: tiles unless
            ``use_backend("eager")`` is in force.

    Returns:
        (B, H, *grid, Dv), or (B, H, N, Dv) for flat tensors.

    Raises:
        ValueError: shapes that do not fit; clamped windows larger than the grid; a stride beyond the kernel.

    Reference: Hassani et al., 2024, arXiv 2403.04690; Hassani et al., 2025, arXiv 2504.16922 (stride).

    >>> x = torch.randn(1, 2, 8, 8, 4)
    >>> whole = attention(*[x.flatten(2, 3)] * 3).unflatten(2, (8, 8))
    >>> torch.allclose(neighborhood_attention(x, x, x, kernel_size=8), whole, atol=1e-6)
    True
    """
    return _call(
        q, k, v, grid, kernel_size, dilation, stride, causal, border, bias_table, axis_bias,
        (extra_k, extra_v, extra_valid), valid, mask, offset, extra_pos, scale, dropout_p, tile, backend, False,
    )[0]  # fmt: skip


def neighborhood_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int] | None = None,
    kernel_size: int | Sequence[int] = 7,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    *,
    border: str = "clamp",
    bias_table: Tensor | None = None,
    valid: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Partial:
    """:func:`neighborhood_attention` as a mergeable :class:`attnlib.types.Partial` over (B, H, N).

    Arguments as in :func:`neighborhood_attention`.

    >>> x = torch.randn(1, 2, 8, 4)
    >>> neighborhood_partial(x, x, x, kernel_size=3).finish().shape
    torch.Size([1, 2, 8, 4])
    """
    scale_, den, num = _call(
        q, k, v, grid, kernel_size, dilation, stride, causal, border, bias_table, None, (None, None, None), valid, None,
        0, None, scale, 0.0, None, backend, True,
    )  # fmt: skip
    return Partial(scale_[..., 0], den[..., 0], num)
